"""Fully sharded data parallelism (ZeRO-3) through torch's FSDP2, one unit per block.

Replicas of the sharded model (HSDP) are a second mesh dimension. Gradients are averaged by FSDP;
the loop scales the loss by ranks / (tokens of the batch), so that this is the mean over tokens.
Gathers and reductions run beside the computation: the weights of the next blocks are asked for
before a block begins, and a block's gradients are reduced while the one before it is computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

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
    dims = {"replicate": n["replicate"], "shard": n["shard"] * n["context"], "tensor": n["tensor"]}
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


def apply(
    model: nn.Module, device_mesh: DeviceMesh, dtype: torch.dtype, cfg: ParallelConfig
) -> None:
    """Shard every block, then the rest, in place. Works on the meta device."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if dtype == torch.float32:
        policy = MixedPrecisionPolicy()
    blocks: Any = list(model.layers)  # type: ignore[arg-type]
    for block in blocks:
        fully_shard(block, mesh=device_mesh, mp_policy=policy, reshard_after_forward=cfg.reshard)
    # the root's parameters are used first and last: gathering them twice buys no memory
    fully_shard(model, mesh=device_mesh, mp_policy=policy, reshard_after_forward=False)
    for ask, order in (
        (FSDPModule.set_modules_to_forward_prefetch, [model, *blocks]),
        (FSDPModule.set_modules_to_backward_prefetch, [model, *blocks[::-1]]),
    ):
        for i, unit in enumerate(order):
            ask(unit, order[i + 1 : i + 1 + cfg.prefetch])


def prepare(model: nn.Module, cfg: ParallelConfig, last: bool) -> None:
    """Before each micro-batch, the `last` of a step or not: what its backward pass leaves."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_backward(last or cfg.reshard)
        model.set_requires_gradient_sync(last or cfg.accumulate != "unsharded")
        model.set_requires_all_reduce(last or cfg.accumulate == "sharded")


def reshard(model: nn.Module) -> None:
    """Give up gathered weights: a forward pass without a backward pass leaves them behind."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def without_effect(model: nn.Module, cfg: ParallelConfig, micro_batches: int) -> Iterator[str]:
    """Sentences about keys that change nothing in this run."""
    mesh = getattr(next(model.parameters()), "device_mesh", None)
    sizes = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)) if mesh else {}
    replicas, divided = (sizes.get(name, 1) > 1 for name in ("replicate", "shard"))
    deferred = cfg.accumulate == "replica_deferred"
    reduced = micro_batches > 1 and (replicas or divided and not deferred)
    groups = "replicas" if deferred else "processes"
    for key, usual, works, needs in (
        ("accumulate", "sharded", reduced, f"several micro-batches, {groups}"),
        ("reshard", True, divided, "parallel.shard"),
        ("prefetch", 1, divided, "parallel.shard"),
    ):
        if getattr(cfg, key) != usual and not works:
            yield f"parallel.{key} {getattr(cfg, key)} has no effect: it needs {needs}"
