"""Every operation of the model as its formula in plain PyTorch: the truth in the tests.

Tensors in, tensors out; nothing here knows of modules or processes. Norm, RoPE, attention weights
and loss are computed in promote_types(dtype, float32); results have the dtype of the input.

Axes, the same letters everywhere:
    B batch   T tokens (S: with those already in a cache)   C width   N rows, B·T of them
    H heads   K key/value heads   D head size   F feed-forward width   V vocabulary
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Targets with this value have no loss, as in torch's cross_entropy.
IGNORED = -100


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · w over the last axis: (..., C) and (C,) to (..., C).

    Zhang and Sennrich 2019; paper §2.2.
    """
    x32 = x.to(wide_dtype(x.dtype))
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale * weight.to(x32.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and that sum in their dtype, both (..., C)."""
    total = x + residual
    return rms_norm(total, weight, eps), total


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
    x0, x1 = x.to(wide_dtype(x.dtype)).unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, D/2)
    cos, sin = torch.view_as_real(table.unsqueeze(1)).unbind(-1)  # (T, 1, D/2)
    turned = torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1)
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
    weights = _scores(q, k, doc_ids).softmax(-1)  # (B, K, H/K, T, S)
    out = torch.einsum("bkgts,bskd->btkgd", weights, v.to(weights.dtype))
    return out.reshape(q.shape).to(q.dtype)


def attention_log_sums(q: Tensor, k: Tensor, doc_ids: Tensor | None = None) -> Tensor:
    """log Σ exp(q kᵀ / sqrt(D)) over the keys that each query of `attention` sees: (B, H, T)."""
    return _scores(q, k, doc_ids).logsumexp(-1).flatten(1, 2)


def _scores(q: Tensor, k: Tensor, doc_ids: Tensor | None) -> Tensor:
    """q kᵀ / sqrt(D), -inf where a query does not see a key: (B, K, H/K, T, S)."""
    (T, H, D), (S, K) = q.shape[1:], k.shape[1:3]
    wide = wide_dtype(q.dtype)
    if doc_ids is None:
        doc_ids = torch.zeros(1, S, dtype=torch.long, device=q.device)
    grouped = q.to(wide).unflatten(2, (K, H // K))  # (B, T, K, H/K, D)
    scores = torch.einsum("btkgd,bskd->bkgts", grouped, k.to(wide)) / math.sqrt(D)
    seen = doc_ids if doc_ids.dim() == 4 else visible(T, doc_ids)
    return scores.masked_fill(~seen.unsqueeze(1), -torch.inf)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """logsumexp(z) - z[target] + z_loss · logsumexp(z)², where z = x Wᵀ: (N, C), (V, C), (N,) int64
    to (N,), float32 or wider.

    Targets of -100 give 0. z-loss: Chowdhery et al. 2022, §5.
    """
    logits = (x @ weight.t()).to(wide_dtype(x.dtype))
    ignored = targets == IGNORED
    hit = logits.gather(1, targets.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
    log_sum = logits.logsumexp(1)
    losses = log_sum - hit + z_loss * log_sum.square()
    return losses.masked_fill(ignored, 0)


class VocabularyShard(NamedTuple):
    """A process's rows of an output matrix that is divided over processes, from row `first` on.

    `reduce(tensor, "max" or "sum")` is the elementwise maximum or sum over these processes.
    """

    first: int
    reduce: Callable[[Tensor, str], Tensor]
