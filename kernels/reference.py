"""Every operation of the model in plain PyTorch: the truth in the tests, and the path on a CPU.

Tensors in, tensors out; nothing here knows of modules or processes. Norm, RoPE, attention weights
and loss are computed in promote_types(dtype, float32); results have the dtype of the input.

Axes, the same letters everywhere:
    B batch   T tokens (S: with those already in a cache)   C width   N rows, B·T of them
    H heads   K key/value heads   D head size   F feed-forward width   V vocabulary
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

# Targets with this value have no loss, as in torch's cross_entropy.
IGNORED = -100

# Logits held at once by the loss: 4 MB stay in a CPU's cache, a GPU needs taller products
# (2,048 rows at V = 32,000).
CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS, LEAST_CHUNK_ROWS = 2**20, 2**26, 128


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · w over the last axis: (..., C) and (C,) to (..., C).

    Zhang and Sennrich 2019; paper §2.2.
    """
    wide = _wide(x.dtype)
    return _RMSNorm.apply(x.to(wide), weight.to(wide), eps).to(x.dtype)


class _RMSNorm(Function):
    """By hand, because autograd walks through twice as many tensors (7.2 ms against 3.1 ms)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        product = grad * unit
        grad_weight = product.flatten(0, -2).sum(0)
        along = (product @ weight / x.shape[-1]).unsqueeze(-1)
        grad_x = torch.addcmul(grad * weight, unit, along, value=-1).mul_(scale)
        return grad_x, grad_weight, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, all (..., F). Shazeer 2020; paper §2.2."""
    return F.silu(gate) * up


def rope_frequencies(
    head_dim: int, theta: float, scaling: dict[str, str | float] | None = None
) -> Tensor:
    """Angle per position, theta^(-2i/D), of each of the D/2 pairs: (D/2,) float32.

    `scaling` stretches the context: {type: linear, factor} (Chen et al. 2023) or {type: llama3,
    factor, low_freq_factor, high_freq_factor, original_max_position_embeddings} (Llama 3.1).
    """
    frequencies = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / -head_dim)
    if scaling is None:
        return frequencies
    kind, factor = scaling.get("type"), _positive(scaling, "factor")
    if kind == "linear":
        return frequencies / factor
    if kind != "llama3":
        raise ValueError(f"rope_scaling type is {kind!r}, expected linear or llama3")
    low, high = _positive(scaling, "low_freq_factor"), _positive(scaling, "high_freq_factor")
    context = _positive(scaling, "original_max_position_embeddings")
    # pairs that turn often within the original context keep their speed, slow ones are slowed down
    # further, those between are blended
    turns = context * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def _positive(scaling: dict[str, str | float], key: str) -> float:
    value = scaling.get(key)
    if not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"rope_scaling {key} is {value!r}, expected a number above 0")
    return float(value)


def rope_table(positions: int, frequencies: Tensor) -> Tensor:
    """exp(i · angle) of every position and pair: (positions, D/2) complex64."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), ... of (B, T, H, D) by the table of their T positions.

    Su et al. 2021, with neighbouring features as pairs like the original code.
    """
    pairs = x.to(_wide(x.dtype)).unflatten(-1, (-1, 2))  # (B, T, H, D/2, 2)
    table = table.unsqueeze(1)  # (T, 1, D/2)
    if torch.compiler.is_compiling():
        # the compiler fuses real arithmetic only; eager, one complex product is 7 times as fast
        (x0, x1), (cos, sin) = pairs.unbind(-1), torch.view_as_real(table).unbind(-1)
        turned = torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * table)
    return turned.flatten(-2).to(x.dtype)


def visible(n_queries: int, doc_ids: Tensor) -> Tensor:
    """Whether a query sees a key: not after it, not of another document. (B, S) to (B, 1, T, S).

    The queries are the last T of the S positions; ids are any integers, equal within a document.
    """
    positions = torch.arange(doc_ids.shape[1], device=doc_ids.device)
    causal = positions <= positions[-n_queries:, None]  # (T, S)
    same = doc_ids[:, -n_queries:, None] == doc_ids[:, None, :]  # (B, T, S)
    return (causal & same).unsqueeze(1)


def attention(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None = None) -> Tensor:
    """Causal softmax(q kᵀ / sqrt(D)) v: (B, T, H, D) over (B, S, K, D), T <= S, to (B, T, H, D).

    `doc_ids` are (B, S), or the (B, 1, T, S) mask that `visible` makes of them.
    """
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    wide = _wide(q.dtype)
    if doc_ids is None:
        doc_ids = torch.zeros(1, S, dtype=torch.long, device=q.device)
    grouped = q.to(wide).unflatten(2, (K, H // K))  # (B, T, K, H/K, D)
    scores = torch.einsum("btkgd,bskd->bkgts", grouped, k.to(wide)) / math.sqrt(D)
    seen = doc_ids if doc_ids.dim() == 4 else visible(T, doc_ids)
    weights = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)  # (B, K, H/K, T, S)
    return torch.einsum("bkgts,bskd->btkgd", weights, v.to(wide)).reshape(B, T, H, D).to(q.dtype)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """logsumexp(z) - z[target] with z = x Wᵀ: (N, C), (V, C), (N,) int64 to (N,), float32 or wider.

    Targets of -100 give 0. Only a chunk of rows ever has its logits in memory, and its gradients
    are formed at once. So the losses must enter the result with one common factor, as in a sum or
    a mean over tokens; the backward pass refuses anything else (compute logits for that).
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(x, weight, targets)
    chunks = _chunks(x, weight)
    return torch.cat([_chunk_loss(x[rows], weight, targets[rows])[0] for rows in chunks])


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    elements = CPU_CHUNK_ELEMENTS if x.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    rows = max(LEAST_CHUNK_ROWS, elements // weight.shape[0])
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]


def _chunk_loss(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (n,) and probabilities (n, V); in place, as nothing in a step is larger."""
    logits = (x @ weight.t()).to(_wide(x.dtype))
    ignored = targets == IGNORED
    hit = logits.gather(1, targets.masked_fill(ignored, 0).unsqueeze(1))
    top = logits.amax(1, keepdim=True)
    odds = logits.sub_(top).exp_()
    total = odds.sum(1, keepdim=True)
    losses = (top + total.log() - hit).squeeze(1).masked_fill(ignored, 0)
    return losses, odds.div_(total)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = _wide(x.dtype)
        losses, grad_x = x.new_empty(x.shape[0], dtype=wide), torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        for rows in _chunks(x, weight):
            losses[rows], odds = _chunk_loss(x[rows], weight, targets[rows])
            # d loss / d z = softmax(z) - onehot(target), and 0 in ignored rows
            valid = (targets[rows] != IGNORED).unsqueeze(1)
            odds.scatter_add_(1, targets[rows].unsqueeze(1).where(valid, 0), -valid.to(wide))
            grad = odds.mul_(valid).to(x.dtype)
            grad_x[rows] = grad @ weight
            if x.dtype == wide:
                grad_weight.addmm_(grad.t(), x[rows])
            else:
                grad_weight.add_(grad.t() @ x[rows])
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_weight = ctx.saved_tensors
        # checked on the device, without waiting for it
        torch._assert_async((grad == grad[0]).all(), "token losses enter with unequal factors")
        factor = grad[0]
        return grad_x * factor.to(grad_x.dtype), (grad_weight * factor).to(ctx.weight_dtype), None
