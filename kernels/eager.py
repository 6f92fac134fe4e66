"""Forward and backward passes by hand in torch: the path on a CPU, and wherever Triton is not.

The functions come in pairs, `<op>_forward` and `<op>_backward`, tensors in and tensors out, and the
Triton files of this folder have the same pairs; `ops.py` joins a pair to one differentiable
operation. Axes as in reference.py. Norm, RoPE and loss compute in promote_types(dtype, float32).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.reference import IGNORED, VocabularyShard, wide_dtype

# Logits held at once by the loss: 4 MB stay in a CPU's cache, a GPU needs taller products
# (2,048 rows at V = 32,000).
CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS, LEAST_CHUNK_ROWS = 2**20, 2**26, 128

# Elements of each operand that several passes in a row find in a CPU core's cache.
CPU_CACHE_ELEMENTS = 2**17


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (..., C), and 1 / sqrt(mean(x²) + eps) of every row (..., 1) for the backward pass."""
    x32 = x.to(wide_dtype(x.dtype))
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
    return (x32 * scale).mul_(weight).to(x.dtype), scale


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (C,)."""
    grad32, x32, weight32 = (t.to(scale.dtype) for t in (grad, x, weight))
    # LayerNorm's backward pass is one kernel. With a mean of 0 it is that of RMSNorm, but for the
    # gradient through the mean, which it has taken away from grad_x.
    mean, wanted = torch.zeros_like(scale), (True, True, False)
    grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
        grad32.contiguous(), x32, weight.shape, mean, scale, weight32, None, wanted
    )
    through_mean = (grad32 @ weight32 / x.shape[-1]).unsqueeze(-1) * scale
    return grad_x.add_(through_mean).to(x.dtype), grad_weight.to(weight.dtype)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, all (..., F)."""
    if gate.numel() <= CPU_CACHE_ELEMENTS:
        return torch.nn.functional.silu(gate).mul_(up)
    out = gate.new_empty(gate.shape)
    for g, u, o in _rows(gate, up, out):
        torch.ops.aten.silu.out(g, out=o).mul_(u)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; silu(gate) is computed again."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    for g, u, d, d_gate, d_up in _rows(gate, up, grad, grad_gate, grad_up):
        torch.ops.aten.silu.out(g, out=d_up).mul_(d)
        torch.ops.aten.silu_backward.grad_input(d * u, g, grad_input=d_gate)
    return grad_gate, grad_up


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows (n, F) of every (..., F), a cacheful after the other; on a GPU all at once."""
    first = tensors[0].flatten(0, -2)
    n = first.shape[0]
    if first.device.type == "cpu":
        n = max(1, CPU_CACHE_ELEMENTS // first.shape[1]) * torch.get_num_threads()
    return zip(*(x.flatten(0, -2).split(n) for x in tensors), strict=True)


def rope_forward(x: Tensor, table: Tensor) -> Tensor:
    """The turned (B, T, H, D); one complex product is 7 times as fast as four real ones."""
    wide = x.to(wide_dtype(x.dtype)).contiguous()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table.unsqueeze(1)).flatten(-2).to(x.dtype)


def rope_backward(grad: Tensor, table: Tensor) -> Tensor:
    """Gradient of x: turned back."""
    return rope_forward(grad, table.conj())


def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    gradients: bool,
    z_loss: float = 0.0,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (N,), and of their sum the gradients of x (N, C) and of the weight (V, C).

    Only a chunk of rows ever has its logits in memory. With a `shard` of the vocabulary the
    gradient of x is this shard's part of a sum.
    """
    wide = wide_dtype(x.dtype)
    losses = x.new_empty(x.shape[0], dtype=wide)
    grad_x = torch.empty_like(x) if gradients else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if gradients else None
    for rows in _chunks(x, weight):
        losses[rows], grad = _chunk_loss(x[rows], weight, targets[rows], z_loss, shard)
        if grad_x is None or grad_weight is None:
            continue
        grad = grad.to(x.dtype)
        grad_x[rows] = grad @ weight
        if x.dtype == wide:
            grad_weight.addmm_(grad.t(), x[rows])
        else:
            grad_weight.add_(grad.t() @ x[rows])
    return losses, grad_x, grad_weight


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    elements = CPU_CHUNK_ELEMENTS if x.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    rows = max(LEAST_CHUNK_ROWS, elements // weight.shape[0])
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]


def _chunk_loss(
    x: Tensor, weight: Tensor, targets: Tensor, z_loss: float, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor]:
    """Losses (n,) and their gradient by the logits (n, V), both 0 where the target is ignored.

    In place, as nothing in a step is larger.
    """
    logits = (x @ weight.t()).to(wide_dtype(x.dtype))
    ignored = (targets == IGNORED).unsqueeze(1)
    column, here = targets.unsqueeze(1), ~ignored
    if shard is not None:
        column = column - shard.first
        here = (column >= 0) & (column < weight.shape[0])
    column = column.where(here, 0)
    hit = logits.gather(1, column) * here
    top = logits.amax(1, keepdim=True)
    if shard is not None:
        top = shard.reduce(top, "max")
    odds = logits.sub_(top).exp_()
    total = odds.sum(1, keepdim=True)
    if shard is not None:
        total, hit = shard.reduce(torch.stack((total, hit)), "sum")
    losses, factor = top + total.log() - hit, total.reciprocal()
    if z_loss:
        log_sum = top + total.log()
        losses = losses + z_loss * log_sum.square()
        factor = factor * (1 + 2 * z_loss * log_sum)
    odds.mul_(factor.masked_fill(ignored, 0)).scatter_add_(1, column, -here.to(odds.dtype))
    return losses.masked_fill(ignored, 0).squeeze(1), odds


def add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x + residual, that sum, and the scale of every row (..., 1)."""
    total = x + residual
    out, scale = rms_norm_forward(total, weight, eps)
    return out, total, scale


def add_rms_norm_backward(
    grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, which is that of the residual too, and of the weight."""
    grad_x, grad_weight = rms_norm_backward(grad, total, weight, scale)
    return grad_x.add_(grad_total), grad_weight


def swiglu_backward_with_product(
    grad: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and silu(gate) · up again."""
    return *swiglu_backward(grad, gate, up), swiglu_forward(gate, up)
