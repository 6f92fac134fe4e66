"""Fully sharded data parallelism (ZeRO-3) through torch's FSDP2, one unit per block.

Replicas of the sharded model (HSDP) are a second mesh dimension. Gradients are averaged by FSDP;
the loop scales the loss by ranks / (tokens of the batch), so that this is the mean over tokens.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from llama.config import ParallelConfig
from llama.parallel import context, layout


@dataclass(frozen=True)
class Place:
    """Where this process stands in the layout.

    Args:
        weights: What parameters lie on: (replicate,) shard (, tensor). FSDP divides them over the
            processes of a sequence too.
        data_rank, data_size: Which share of a batch's windows it trains on.
        context: The processes that share its sequences, if there are others.
        tensor_rank: Which part of each matrix it has. All of a tensor group know the same losses,
            so that only those of the first count.
    """

    weights: DeviceMesh
    data_rank: int
    data_size: int
    context: dist.ProcessGroup | None
    tensor_rank: int

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of (B, T) sequences."""
        if self.context is None:
            return whole
        return context.part(whole, self.context.rank(), self.context.size())


def place(cfg: ParallelConfig, device_type: str) -> Place:
    """Make the groups of a layout; all processes call it together."""
    n = layout.sizes(cfg, dist.get_world_size())
    data_size, rank = n["replicate"] * n["shard"], dist.get_rank()
    dims = {
        "replicate": n["replicate"],
        "shard": n["shard"] * n["context"],
        "tensor": n["tensor"],
    }
    dims = {name: size for name, size in dims.items() if size > 1 or name == "shard"}
    group = None
    if n["context"] > 1:
        shape = data_size, n["context"], n["tensor"]
        names = ("data", "context", "tensor")
        group = init_device_mesh(device_type, shape, mesh_dim_names=names).get_group("context")
    return Place(
        weights=init_device_mesh(device_type, tuple(dims.values()), mesh_dim_names=tuple(dims)),
        data_rank=rank // (n["context"] * n["tensor"]),
        data_size=data_size,
        context=group,
        tensor_rank=rank % n["tensor"],
    )


def apply(model: nn.Module, device_mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard every block, then the rest, in place. Works on the meta device."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if dtype == torch.float32:
        policy = MixedPrecisionPolicy()
    layers: nn.ModuleList = model.layers  # type: ignore[assignment]
    for block in layers:
        fully_shard(block, mesh=device_mesh, mp_policy=policy)
    # the root's parameters are used first and last: gathering them twice buys no memory
    fully_shard(model, mesh=device_mesh, mp_policy=policy, reshard_after_forward=False)
