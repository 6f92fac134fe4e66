"""Fully sharded data parallelism (ZeRO-3) through torch's FSDP2, one unit per block.

Replicas of the sharded model (HSDP) are a second mesh dimension. Gradients are averaged by FSDP;
the loop scales the loss by ranks / (tokens of the batch), so that this is the mean over tokens.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from llama.cli import UserError
from llama.config import ParallelConfig


def layout(cfg: ParallelConfig, world_size: int) -> tuple[int, int]:
    """(replicate, shard) with -1 filled in. Raises `UserError` where they do not give the world."""
    replicate, shard = cfg.replicate, cfg.shard
    known = (replicate if shard == -1 else 1) * (shard if replicate == -1 else 1)
    if -1 in (replicate, shard) and world_size % known == 0:
        rest = world_size // known
        replicate, shard = (rest, shard) if replicate == -1 else (replicate, rest)
    if replicate * shard != world_size:
        raise UserError(
            f"parallel.replicate {cfg.replicate} x parallel.shard {cfg.shard} "
            f"do not make the {world_size} processes of this run"
        )
    return replicate, shard


def mesh(cfg: ParallelConfig, device_type: str) -> DeviceMesh:
    """The mesh FSDP runs on: (shard,) or (replicate, shard)."""
    replicate, shard = layout(cfg, dist.get_world_size())
    if replicate == 1:
        return init_device_mesh(device_type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


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
