"""The operations of the model as it calls them: differentiable, by the fastest way there is.

Each joins a pair of forward and backward functions, of eager.py or of a Triton file. While torch
compiles, the formulas of reference.py are taken instead: they are what it can fuse.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kernels import eager, reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · w over the last axis: (..., C) and (C,) to (..., C)."""
    if torch.compiler.is_compiling():
        return reference.rms_norm(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = eager.rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *eager.rms_norm_backward(grad, *ctx.saved_tensors), None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, all (..., F)."""
    if torch.compiler.is_compiling():
        return reference.swiglu(gate, up)
    return _SwiGLU.apply(gate, up)


class _SwiGLU(Function):
    """Keeps two tensors where autograd keeps three."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return eager.swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return eager.swiglu_backward(grad, *ctx.saved_tensors)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs of (B, T, H, D) by the (T, D/2) table of `reference.rope_table`."""
    if torch.compiler.is_compiling():
        return reference.rope(x, table)
    return _RoPE.apply(x, table)


class _RoPE(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return eager.rope_forward(x, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return eager.rope_backward(grad, table), None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """logsumexp(z) - z[target] with z = x Wᵀ: (N, C), (V, C), (N,) int64 to (N,), float32 or wider.

    Targets of -100 give 0. Gradients are formed in the forward pass, chunk by chunk. So the losses
    must enter the result with one common factor, as in a sum or a mean over tokens; the backward
    pass refuses anything else (compute logits for that).
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(x, weight, targets)
    return eager.linear_cross_entropy_forward(x, weight, targets, gradients=False)[0]


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        losses, *gradients = eager.linear_cross_entropy_forward(x, weight, targets, gradients=True)
        ctx.save_for_backward(*gradients)
        ctx.weight_dtype = weight.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_weight = ctx.saved_tensors
        # checked on the device, without waiting for it
        torch._assert_async((grad == grad[0]).all(), "token losses enter with unequal factors")
        factor = grad[0]
        return grad_x * factor.to(grad_x.dtype), (grad_weight * factor).to(ctx.weight_dtype), None
