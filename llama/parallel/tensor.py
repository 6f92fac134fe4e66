"""Tensor and sequence parallelism: each matrix divided over a few processes, and between them the
sequence (Shoeybi et al. 2019, §3; Korthikanti et al. 2022, §4.2).

A model on the meta device in; the same model with its weights as DTensors of the mesh's `tensor`
dimension out. wq, wk, wv, w1, w3 and the vocabulary's matrices are divided by rows, wo and w2 by
columns. Activations are this process's own tensors: whole sequences inside attention and
feed-forward, divided ones in norms and residuals. The logits are never put together for a loss.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from kernels import ops
from kernels.reference import VocabularyShard

ROWS, COLUMNS = Shard(0), Shard(1)
PLACES = {
    "tok_embeddings": ROWS, "wq": ROWS, "wk": ROWS, "wv": ROWS, "wo": COLUMNS,
    "w1": ROWS, "w2": COLUMNS, "w3": ROWS, "output": ROWS,
}  # fmt: skip

Seam = Callable[[Tensor], Tensor]


def apply(model: Any, mesh: DeviceMesh) -> tuple[Seam, Seam]:
    """Divide a finished model in place over the one dimension of `mesh`.

    Returns `gather` and `reduce_scatter` of sequences, each the other's backward, which a block
    needs that takes its weights apart itself.
    """
    group = mesh.get_group()
    gather = partial(Gather.apply, group)
    reduce_scatter = partial(ReduceScatter.apply, group)
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        # a norm's gain is whole on every process, its gradient a sum over parts of the sequence
        place = PLACES.get(path.rpartition(".")[2], Replicate())
        divided = distribute_tensor(weight.data, mesh, [place], src_data_rank=None)
        module.weight = nn.Parameter(divided)
        module.forward = partial(_forward, module)
    for block in model.layers:
        for part in (block.attention, block.feed_forward):
            part.register_forward_pre_hook(lambda _, given: (gather(given[0]), *given[1:]))
            part.register_forward_hook(lambda _, given, out: reduce_scatter(out))
    embedding, head = model.tok_embeddings, model.output
    rows = head.weight.to_local().shape[0]
    first = mesh.get_local_rank() * rows
    embedding.forward = partial(_embed, embedding, first, reduce_scatter)
    shard = VocabularyShard(first, partial(_reduce, group))
    head.loss = partial(ops.linear_cross_entropy, shard=shard)
    head.register_forward_pre_hook(lambda _, given: (gather(given[0]), *given[1:]))
    head.register_forward_hook(lambda _, given, out: _whole_logits(group, out))
    return gather, reduce_scatter


def overlap(mesh: DeviceMesh) -> None:
    """Let blocks that are compiled from now on send while they compute, through symmetric memory.

    To be had on GPUs alone.
    """
    inductor._micro_pipeline_tp = True
    # torch calls this needless by now, but its compiler passes over groups that were not named
    with warnings.catch_warnings(action="ignore"):
        enable_symm_mem_for_group(mesh.get_group().group_name)


def local(weight: Tensor) -> Tensor:
    """This process's part of a weight, with a gradient that finds its way back."""
    if not isinstance(weight, DTensor):
        return weight
    partly = [Partial() if place.is_replicate() else place for place in weight.placements]
    return weight.to_local(grad_placements=partly)


class _Own:
    """A module as its forward sees it, with this process's part of the weight."""

    def __init__(self, module: Any) -> None:
        self._module, self.weight = module, local(module.weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _forward(module: Any, *args: Any) -> Any:
    return type(module).forward(_Own(module), *args)


def _embed(module: nn.Embedding, first: int, reduce_scatter: Seam, tokens: Tensor) -> Tensor:
    """Rows of this process's part of the vocabulary, 0 for others: they sum to all."""
    weight = local(module.weight)
    rows = tokens - first
    here = (rows >= 0) & (rows < weight.shape[0])
    found = nn.functional.embedding(rows * here, weight)
    return reduce_scatter(found * here.unsqueeze(-1))


def _whole_logits(group: dist.ProcessGroup, out: Any) -> Any:
    """Without targets the head's output, (B, T, V / processes), is put together."""
    if isinstance(out, tuple):
        return out
    return _gather(group, out.transpose(1, 2)).transpose(1, 2)


# -- collectives -----------------------------------------------------------------------------------


class Gather(Function):
    """(B, T, ...) parts of a sequence to the whole; backward sums and divides."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        return _gather(group, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _reduce_scatter(ctx.group, grad)


class ReduceScatter(Function):
    """Whole (B, T, ...), one term of a sum, to this process's part of the sum."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        return _reduce_scatter(group, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _gather(ctx.group, grad)


def _gather(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    size, (B, *rest) = group.size(), x.shape
    parts = x.new_empty(size * B, *rest)
    dist.all_gather_into_tensor(parts, x.contiguous(), group)
    return torch.cat(parts.chunk(size), dim=1)


def _reduce_scatter(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    parts = x.chunk(group.size(), dim=1)
    out = x.new_empty(parts[0].shape)
    dist.reduce_scatter_tensor(out, torch.cat(parts), group=group)
    return out


def _reduce(group: dist.ProcessGroup, x: Tensor, how: str) -> Tensor:
    dist.all_reduce(x, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, group)
    return x
