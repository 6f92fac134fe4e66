"""The operations of the model as it calls them: differentiable, by the fastest way there is.

Each joins a forward and a backward function, of eager.py or of a Triton file: dispatch.py chooses.
Shapes and types that no kernel could compute are a `ValueError` before anything is launched.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kernels import eager, reference
from kernels.dispatch import formula, function, on_triton
from kernels.reference import VocabularyShard


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · w over the last axis: (..., C) and (C,) to (..., C)."""
    _check_norm(x, weight)
    if formula("rms_norm", x):
        return reference.rms_norm(x, weight, eps)
    # where nothing is learnt, generating token by token, autograd's call costs a fifth of the norm
    if not torch.is_grad_enabled():
        return function("rms_norm_forward", x)(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = function("rms_norm_forward", x)(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *function("rms_norm_backward", grad)(grad, *ctx.saved_tensors), None


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and that sum, both (..., C): one pass over memory for the two."""
    _check_norm(x, weight)
    _check("residual", residual, tuple(x.shape), x.dtype, x)
    if formula("add_rms_norm", x):
        return reference.add_rms_norm(x, residual, weight, eps)
    if not torch.is_grad_enabled():
        out, total, _ = function("add_rms_norm_forward", x)(x, residual, weight, eps)
        return out, total
    return _AddRMSNorm.apply(x, residual, weight, eps)


class _AddRMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        out, total, scale = function("add_rms_norm_forward", x)(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return out, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        backward = function("add_rms_norm_backward", grad)
        grad_x, grad_weight = backward(grad, grad_total, *ctx.saved_tensors)
        return grad_x, grad_x, grad_weight, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, all (..., F)."""
    _check_first("gate", gate, gate.dim() > 0, "(..., F)")
    _check("up", up, tuple(gate.shape), gate.dtype, gate)
    if formula("swiglu", gate):
        return reference.swiglu(gate, up)
    if not torch.is_grad_enabled():
        return function("swiglu_forward", gate)(gate, up)
    return _SwiGLU.apply(gate, up)


class _SwiGLU(Function):
    """Keeps two tensors where autograd keeps three."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return function("swiglu_forward", gate)(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return function("swiglu_backward", grad)(grad, *ctx.saved_tensors)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs of (B, T, H, D) by the (T, D/2) table of `reference.rope_table`."""
    _check_first("x", x, x.dim() == 4 and x.shape[3] % 2 == 0, "(B, T, H, D) with an even D")
    _check("table", table, (x.shape[1], x.shape[3] // 2), torch.complex64, x)
    if formula("rope", x):
        return reference.rope(x, table)
    if not torch.is_grad_enabled():
        return function("rope_forward", x)(x, table)
    return _RoPE.apply(x, table)


class _RoPE(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return function("rope_forward", x)(x, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return function("rope_backward", grad)(grad, table), None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """logsumexp(z) - z[target] + z_loss · logsumexp(z)², where z = x Wᵀ: (N, C), (V, C), (N,) int64
    to (N,), float32 or wider.

    Targets of -100 give 0. Gradients are formed in the forward pass, chunk by chunk. So the losses
    must enter the result with one common factor, as in a sum or a mean over tokens; the backward
    pass refuses anything else (compute logits for that). With a `shard`, `weight` is this process's
    part of the matrix, the losses are the whole ones, and the gradient of x is one part of a sum.
    """
    _check_first("x", x, x.dim() == 2, "(N, C)")
    _check_first("weight", weight, weight.dim() == 2 and len(weight) > 0, "(V, C) with V > 0")
    N, C = x.shape
    _check("weight", weight, (weight.shape[0], C), x.dtype, x)
    _check("targets", targets, (N,), torch.int64, x)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(x, weight, targets, z_loss, shard)
    return _losses_and_gradients(x, weight, targets, False, z_loss, shard)[0]


def _losses_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, gradients: bool, z_loss: float,
    shard: VocabularyShard | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    forward = function("linear_cross_entropy_forward", x)
    if shard is None:
        return forward(x, weight, targets, gradients, z_loss)
    # no operator of torch takes a callable
    module = import_module("kernels.cross_entropy") if on_triton(x) else eager
    return module.linear_cross_entropy_forward(x, weight, targets, gradients, z_loss, shard)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, z_loss: float,
        shard: VocabularyShard | None,
    ) -> Tensor:  # fmt: skip
        losses, *gradients = _losses_and_gradients(x, weight, targets, True, z_loss, shard)
        ctx.save_for_backward(*gradients)
        ctx.weight_dtype = weight.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        # checked on the device, without waiting for it
        torch._assert_async((grad == grad[0]).all(), "token losses enter with unequal factors")
        # with an axis: a scalar would be rounded to the type of grad_x, a scale error of 0.2 %. A
        # power of two, as one over the tokens of a batch is, rounds nothing again.
        factor = grad[:1]
        of_x = torch.mul(grad_x, factor, out=torch.empty_like(grad_x))
        of_weight = grad_weight.new_empty(grad_weight.shape, dtype=ctx.weight_dtype)
        return of_x, torch.mul(grad_weight, factor, out=of_weight), None, None, None


def _check_norm(x: Tensor, weight: Tensor) -> None:
    _check_first("x", x, x.dim() > 0, "(..., C)")
    _check_first("weight", weight, weight.dim() == 1, "(C,)")
    _check("weight", weight, (x.shape[-1],), weight.dtype, x)


def _check_first(name: str, x: Tensor, fits: bool, shape: str) -> None:
    """Refuse what has no shape or type that others could agree with."""
    if not (fits and x.is_floating_point()):
        found = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        raise ValueError(f"{name} is {found}, expected floating point {shape}")


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    """Refuse what no kernel could compute, before anything is launched."""
    if tuple(x.shape) != shape or x.dtype != dtype or x.device != like.device:
        raise ValueError(
            f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"expected {shape} {dtype} on {like.device}"
        )
