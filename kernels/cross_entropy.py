"""Linear + cross-entropy in Triton: (N, C), (V, C) and targets (N,) in, losses and gradients out.

    z = x Wᵀ   loss = logsumexp(z) - z[target] + z_loss · logsumexp(z)²
    dz = softmax(z) (1 + 2 z_loss · logsumexp(z)) - onehot(target)   dx = dz W   dW = dzᵀ x

Only a chunk of rows ever has its logits in memory, in the type of x, and dz takes their place. dW
is summed in float32. z-loss: Chowdhery et al. 2022, §5. Signatures are those of eager.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from kernels.launch import case, empty32, launch

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.reference import VocabularyShard

# Logits held at once: 268 MB in bfloat16, 4,096 rows at V = 32,000. Each chunk reads and writes dW.
CHUNK_ELEMENTS, CHUNK_ROWS_MULTIPLE = 2**27, 256

# A row goes by in blocks of 16 elements a thread. It is read twice, the second time from L2.
BLOCK, WARPS = 8192, 16

IGNORED = tl.constexpr(-100)


@triton.jit
def softmax_kernel(
    logits_ptr, targets_ptr, statistics_ptr, statistics_stride, first, V, elsewhere, z_loss,
    FIND: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """FIND a row's maximum, sum of exponentials and target logit, then WRITE dz over the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    top_ptr = statistics_ptr + row
    total_ptr = top_ptr + statistics_stride
    target = tl.load(targets_ptr + row)
    column = target - first
    if FIND:
        here = (column >= 0) & (column < V)
        hit = tl.load(logits_ptr + column, mask=here, other=elsewhere).to(tl.float32)
        tl.store(total_ptr + statistics_stride, hit)
        top = -float("inf")
        total = 0.0
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(z))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher))
            top = higher
        tl.store(top_ptr, top)
        tl.store(total_ptr, total)
    else:
        top = tl.load(top_ptr)
        total = tl.load(total_ptr)
    if WRITE:
        valid = tl.where(target == IGNORED, 0.0, 1.0)
        factor = valid * (1 + 2 * z_loss * (top + tl.log(total))) / total
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
            grad = tl.exp(z - top) * factor - tl.where(columns == column, valid, 0.0)
            tl.store(logits_ptr + columns, grad, mask=columns < V)


# -- launchers -------------------------------------------------------------------------------------


def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    gradients: bool,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (N,), and of their sum the gradients of x (N, C) and of the weight (V, C) in float32.

    With a `shard` of the vocabulary the gradient of x is this shard's part of a sum.
    """
    N, V = x.shape[0], weight.shape[0]
    statistics = empty32(x, 3, N)
    grad_x = x.new_empty(x.shape) if gradients else None
    grad_weight = empty32(weight, *weight.shape).zero_() if gradients else None
    n = max(CHUNK_ELEMENTS // V // CHUNK_ROWS_MULTIPLE, 1) * CHUNK_ROWS_MULTIPLE
    for start in range(0, N, n):
        rows = slice(start, start + n)
        logits = x[rows] @ weight.t()
        chunk = logits, targets[rows].contiguous(), statistics[:, rows]
        if shard is None:
            _softmax(*chunk, 0, float("nan"), z_loss, find=True, write=gradients)
        else:
            # the process that has the target adds its logit, the others add 0
            _softmax(*chunk, shard.first, 0.0, z_loss, find=True, write=False)
            _unite(statistics[:, rows], shard)
            if gradients:
                _softmax(*chunk, shard.first, 0.0, z_loss, find=False, write=True)
        if grad_x is not None and grad_weight is not None:
            grad_x[rows] = logits @ weight
            _accumulate(grad_weight, logits.t(), x[rows])
    top, total, hit = statistics
    losses = total.log() + (top - hit)
    if z_loss:
        losses += z_loss * (top + total.log()).square()
    return losses.masked_fill(targets == IGNORED.value, 0), grad_x, grad_weight


def _softmax(
    logits: Tensor, targets: Tensor, statistics: Tensor, first: int, elsewhere: float,
    z_loss: float, find: bool, write: bool,
) -> None:  # fmt: skip
    launch(
        softmax_kernel, logits.shape[0], logits, targets, statistics, statistics.stride(0), first,
        logits.shape[1], elsewhere, z_loss, FIND=find, WRITE=write, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _unite(statistics: Tensor, shard: VocabularyShard) -> None:
    """Statistics (3, n) of a part of the vocabulary become those of all of it."""
    highest = shard.reduce(statistics[0].clone(), "max")
    statistics[1] *= (statistics[0] - highest).exp()
    statistics[0] = highest
    statistics[1:] = shard.reduce(statistics[1:].contiguous(), "sum")


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, with every sum in float32."""
    import torch

    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def gate(arch: int) -> Iterator[dict[str, Any]]:
    """The kernel with the types it is launched with, for check.py."""
    types = {"targets_ptr": "*i64:16", "statistics_ptr": "*fp32:16", "first": "i32"}
    types |= {"elsewhere": "fp32", "z_loss": "fp32"}
    both = ((dtype, True, True) for dtype in ("bf16", "fp16", "fp32"))
    for dtype, find, write in (*both, ("bf16", True, False), ("bf16", False, True)):
        options = {"FIND": find, "WRITE": write, "BLOCK": BLOCK, "num_warps": WARPS}
        yield case(softmax_kernel, f"{find} {write}", dtype, types, **options)
