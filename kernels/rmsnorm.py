"""RMSNorm in Triton (Zhang and Sennrich 2019; paper §2.2), with the residual addition before it.

(..., C) and the gain (C,) in, (..., C) out, in one pass over memory:

    s = 1 / sqrt(mean(x²) + eps)        y = x s w
    dx = s (dy w - x s mean(dy w x s))  dw = sum of dy x s over the rows

Sums are float32. dw is deterministic: every program adds up its own rows, one reduction adds up the
programs. Signatures are those of eager.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from kernels.launch import case, empty32, launch, n_processors, rows

if TYPE_CHECKING:
    from torch import Tensor

# Programs of the backward pass: enough to hide each other's waiting, few enough that writing and
# reading their partial sums, 8 bytes beside the 6 of each row, stays at 2 % of the traffic.
PROGRAMS_PER_PROCESSOR, ROWS_PER_PROGRAM = 4, 64


@triton.jit
def rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, scale_ptr,
    x_stride, residual_stride, C, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        # normalised is what is stored, rounded: the backward pass has nothing else
        total = (x + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * C + columns, total, mask=inside)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / C + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * C + columns, x * scale * weight, mask=inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr, grad_sum_ptr, x_ptr, weight_ptr, scale_ptr, grad_x_ptr, partial_ptr,
    grad_stride, grad_sum_stride, x_stride, N, C,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(program.to(tl.int64), N, tl.num_programs(0)):
        scale = tl.load(scale_ptr + row)
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + columns, mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        normed = x * scale
        grad_weight += grad * normed
        grad_normed = grad * weight
        grad_x = (grad_normed - normed * (tl.sum(grad_normed * normed) / C)) * scale
        if ADD:
            past = tl.load(grad_sum_ptr + row * grad_sum_stride + columns, mask=inside, other=0.0)
            grad_x += past.to(tl.float32)
        tl.store(grad_x_ptr + row * C + columns, grad_x, mask=inside)
    tl.store(partial_ptr + program.to(tl.int64) * C + columns, grad_weight, mask=inside)


# -- launchers -------------------------------------------------------------------------------------


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (..., C), and 1 / sqrt(mean(x²) + eps) of every row (..., 1) for the backward pass."""
    y, _, scale = add_rms_norm_forward(x, None, weight, eps)
    return y, scale


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (C,)."""
    return add_rms_norm_backward(grad, None, x, weight, scale)


def add_rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x + residual, that sum, if there is one, and the scale of every row (..., 1)."""
    C, y, scale = x.shape[-1], x.new_empty(x.shape), empty32(x, *x.shape[:-1], 1)
    total = y if residual is None else x.new_empty(x.shape)
    x, added, weight = rows(x), rows(x if residual is None else residual), weight.contiguous()
    launch(
        rms_norm_forward_kernel, x.shape[0], x, added, weight, y, total, scale,
        x.stride(0), added.stride(0), C, eps, ADD=residual is not None, **_layout(C),
    )  # fmt: skip
    return y, total, scale


def add_rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, which is that of the residual too, and of the weight."""
    C, grad_x = total.shape[-1], total.new_empty(total.shape)
    grad, x, past = rows(grad), rows(total), rows(grad if grad_total is None else grad_total)
    N, least, weight = x.shape[0], n_processors(x), weight.contiguous()
    programs = min(max(N // ROWS_PER_PROGRAM, least), PROGRAMS_PER_PROCESSOR * least, N)
    partial = empty32(x, programs, C)
    launch(
        rms_norm_backward_kernel, programs, grad, past, x, weight, scale, grad_x, partial,
        grad.stride(0), past.stride(0), x.stride(0), N, C, ADD=grad_total is not None, **_layout(C),
    )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


def _layout(C: int) -> dict[str, int]:
    """One program holds a whole row: 16 elements a thread, as far as 1,024 threads go."""
    block = triton.next_power_of_2(C)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 32)}


def gate(arch: int) -> Iterator[dict[str, Any]]:
    """Every kernel with the types and sizes it is launched with, for check.py."""
    types = {"scale_ptr": "*fp32:16", "partial_ptr": "*fp32:16", "eps": "fp32"}
    fused = ((C, "bf16", True) for C in (2048, 4096, 8192))
    for C, dtype, add in (*fused, (5120, "fp16", False), (4096, "fp32", False)):
        for kernel in (rms_norm_forward_kernel, rms_norm_backward_kernel):
            name = f"{C} add" if add else f"{C}"
            yield case(kernel, name, dtype, types, ADD=add, **_layout(C))
