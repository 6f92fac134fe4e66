"""The attention kernels as operators of torch, so that compile and selective recompute see them.

`llama::attention` is differentiable; what it calls is imported at its first call. "triton" is
attention_launch.py, "gluon" takes its forward pass from attention_gluon.py. Tensors as there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from kernels.launch import STATISTICS_ROWS


def documents(doc_ids: Tensor) -> Tensor:
    """First and last position of everyone's document: (B, S) ids to (2, B, S) int32.

    Documents are contiguous: an id that comes back begins another one.
    """
    positions = torch.arange(doc_ids.shape[1], device=doc_ids.device)
    begins = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)
    ends = F.pad(begins[:, 1:], (0, 1), value=True)
    first = torch.where(begins, positions, 0).cummax(1).values
    last = torch.where(ends, positions, doc_ids.shape[1]).flip(1).cummin(1).values.flip(1)
    return torch.stack((first, last)).int()


@custom_op("llama::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, keep: bool, gluon: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (B, T, H, D), what `keep` keeps of its rounding, and log2 of the sums of 2^s."""
    from kernels import attention_launch

    if gluon:
        from kernels import attention_gluon

        return attention_gluon.forward(q, k, v, docs, keep)
    return attention_launch.forward(q, k, v, docs, keep)


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, keep: bool, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, _ = q.shape
    rows = (T + STATISTICS_ROWS - 1) // STATISTICS_ROWS * STATISTICS_ROWS
    wide = torch.float64 if q.dtype == torch.float32 else torch.float32
    kept = keep and q.element_size() == 2
    rest = q.new_empty(q.shape if kept else (0,), dtype=torch.int8)
    return q.new_empty(q.shape), rest, q.new_empty(B, H, rows, dtype=wide)


@custom_op("llama::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rest: Tensor, lse: Tensor,
    docs: Tensor | None, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from kernels import attention_launch

    return attention_launch.backward(grad, q, k, v, out, rest, lse, docs, deterministic)


@attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, docs, _, _, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, docs)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = attention_backward(grad, *ctx.saved_tensors, ctx.deterministic)
    return *gradients, None, None, None, None


attention.register_autograd(_backward, setup_context=_save)
