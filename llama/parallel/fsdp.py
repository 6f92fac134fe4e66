"""Fully sharded data parallelism (ZeRO-3) through torch's FSDP2, one unit per block.

Replicas of the sharded model (HSDP) are a second mesh dimension. Gradients are averaged by FSDP;
the loop scales the loss by ranks / (tokens of the batch), so that this is the mean over tokens.
Gathers and reductions run beside the computation: the weights of the next blocks are asked for
before a block begins, and a block's gradients are reduced while the one before it is computed.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

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


def apply(
    model: nn.Module, device_mesh: DeviceMesh, dtype: torch.dtype, cfg: ParallelConfig
) -> None:
    """Shard every block, then the rest, in place. Works on the meta device."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if dtype == torch.float32:
        policy = MixedPrecisionPolicy()
    layers: nn.ModuleList = model.layers  # type: ignore[assignment]
    for block in layers:
        fully_shard(block, mesh=device_mesh, mp_policy=policy, reshard_after_forward=cfg.reshard)
    # the root's parameters are used first and last: gathering them twice buys no memory
    fully_shard(model, mesh=device_mesh, mp_policy=policy, reshard_after_forward=False)
    backward = FSDPModule.set_modules_to_backward_prefetch
    for ask, order in (
        (FSDPModule.set_modules_to_forward_prefetch, [model, *layers]),
        (backward, [model, *reversed(layers)]),
    ):
        for i, unit in enumerate(order):
            ask(unit, order[i + 1 : i + 1 + cfg.prefetch])


def prepare(model: nn.Module, cfg: ParallelConfig, last: bool) -> None:
    """Before each micro-batch, the `last` of a step or not: what its backward pass leaves."""
    if not isinstance(model, FSDPModule):
        return
    if not cfg.reshard:
        model.set_reshard_after_backward(last)
    if cfg.accumulate == "unsharded":
        model.set_requires_gradient_sync(last)
    elif cfg.accumulate == "replica_deferred":
        model.set_requires_all_reduce(last)


def reshard(model: nn.Module) -> None:
    """Give up gathered weights: a forward pass without a backward pass leaves them behind."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def without_effect(model: nn.Module, cfg: ParallelConfig, micro_batches: int) -> Iterator[str]:
    """Sentences about keys that change nothing in this run."""
    mesh = getattr(next(model.parameters()), "device_mesh", None)
    sizes = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)) if mesh else {}
    replicas = sizes.pop("replicate", 1) > 1
    divided = max(sizes.values(), default=1) > 1
    reduced = replicas if cfg.accumulate == "replica_deferred" else replicas or divided
    for key, usual, works, needs in (
        ("accumulate", "sharded", micro_batches > 1 and reduced, "several micro-batches, which"),
        ("reshard", True, divided, "weights that"),
        ("prefetch", 1, divided, "weights that"),
    ):
        if getattr(cfg, key) != usual and not works:
            yield f"parallel.{key} {getattr(cfg, key)} has no effect: it needs {needs}"
