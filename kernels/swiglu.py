"""SwiGLU in Triton (Shazeer 2020; paper §2.2): gate and up (..., F) in, their product (..., F) out.

    y = silu(g) u,  silu(g) = g σ(g)
    du = dy silu(g)        dg = dy u (σ(g) + silu(g) (1 - σ(g)))

Everything between the rounding of the inputs and that of the results is float32. The backward pass
has gate and up alone, and makes the product again where the gradient of the next matrix needs it.
Signatures are those of eager.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from kernels.launch import case, launch, rows

if TYPE_CHECKING:
    from torch import Tensor

# 8 elements a thread: one load of 16 bytes from each bfloat16 operand.
BLOCK, WARPS = 1024, 4


@triton.jit
def swiglu_forward_kernel(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, F, BLOCK: tl.constexpr
):  # fmt: skip
    per_row = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // per_row).to(tl.int64)
    columns = tl.program_id(0) % per_row * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside).to(tl.float32)
    tl.store(out_ptr + row * F + columns, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def swiglu_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, product_ptr,
    grad_stride, gate_stride, up_stride, F,
    PRODUCT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    per_row = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // per_row).to(tl.int64)
    columns = tl.program_id(0) % per_row * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=inside).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid + silu * (1 - sigmoid)
    tl.store(grad_gate_ptr + row * F + columns, grad * up * slope, mask=inside)
    tl.store(grad_up_ptr + row * F + columns, grad * silu, mask=inside)
    if PRODUCT:
        tl.store(product_ptr + row * F + columns, silu * up, mask=inside)


# -- launchers -------------------------------------------------------------------------------------


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, all (..., F)."""
    out, F = gate.new_empty(gate.shape), gate.shape[-1]
    gate, up = rows(gate), rows(up)
    launch(
        swiglu_forward_kernel, gate.shape[0] * triton.cdiv(F, BLOCK), gate, up, out,
        gate.stride(0), up.stride(0), F, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return out


def swiglu_backward_with_product(
    grad: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and silu(gate) · up again."""
    product = gate.new_empty(gate.shape)
    return *swiglu_backward(grad, gate, up, product), product


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, product: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; silu(gate) · up goes into `product`, if one is given."""
    F = gate.shape[-1]
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    grad, gate, up = rows(grad), rows(gate), rows(up)
    out = grad_gate, grad_up, grad if product is None else product
    launch(
        swiglu_backward_kernel, gate.shape[0] * triton.cdiv(F, BLOCK), grad, gate, up, *out,
        grad.stride(0), gate.stride(0), up.stride(0), F,
        PRODUCT=product is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return grad_gate, grad_up


def gate(arch: int) -> Iterator[dict[str, Any]]:
    """Every kernel with the types it is launched with, for check.py."""
    for dtype in ("bf16", "fp16", "fp32"):
        options = {"BLOCK": BLOCK, "num_warps": WARPS}
        yield case(swiglu_forward_kernel, "", dtype, {}, **options)
        yield case(swiglu_backward_kernel, "", dtype, {}, PRODUCT=dtype == "bf16", **options)
