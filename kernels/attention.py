"""Causal attention: (B, T, H, D) queries over (B, S, K, D) keys and values, by the backend chosen.

Checks every argument before anything is launched, then calls one of the backends. H/K query heads
share one key/value head; attention stays inside documents where their ids are given.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention_cpu, reference

BACKENDS = ("sdpa", "reference")


def choose(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
) -> str:
    """The backend that will run for `name`; call it once at start-up and print the answer.

    Raises `ValueError` where the one asked for cannot run: nothing is replaced silently.
    """
    if name == "auto":
        return "sdpa"
    if name not in BACKENDS:
        raise ValueError(
            f"kernels.attention {name!r} cannot run on {torch.device(device).type} with {dtype} "
            f"and head size {head_dim}: it is not built; there are auto, {' and '.join(BACKENDS)}"
        )
    return name


def document_mask(doc_ids: Tensor, n_queries: int, backend: str) -> Tensor:
    """What `attention` wants to know of documents, made once for all layers of a model.

    The (B, 1, T, S) mask where a backend cannot compare the (B, S) ids itself.
    """
    assert backend in ("auto", *BACKENDS), f"unknown attention backend {backend!r}"
    return reference.visible(n_queries, doc_ids)


def attention(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v to (B, T, H, D); the T queries are the last of S >= T positions.

    `doc_ids`: (B, S), equal for positions that may see each other, or `document_mask` of them.
    """
    _check(q, k, v, doc_ids)
    backend = choose(backend, q.device, q.dtype, q.shape[-1])
    if backend == "reference":
        return reference.attention(q, k, v, doc_ids)
    return _sdpa(q, k, v, doc_ids)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None) -> Tensor:
    n_queries, n_keys = q.shape[1], k.shape[1]
    if doc_ids is None and 1 < n_queries < n_keys:
        # sdpa's own causal mask takes the queries as the first positions, not the last
        doc_ids = torch.zeros(1, n_keys, dtype=torch.long, device=q.device)
    mask = doc_ids
    if doc_ids is not None and doc_ids.dim() == 2:
        mask = reference.visible(n_queries, doc_ids)
    grouped = q.shape[2] != k.shape[2]
    causal = mask is None and n_queries > 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T, D)
    if causal and q.device.type == "cpu" and n_queries in attention_cpu.WORTH_BLOCKS:
        out = attention_cpu.causal_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
    return out.transpose(1, 2)  # (B, T, H, D)


def _check(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None) -> None:
    """Refuse what no backend could compute, naming the argument and its value."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (B, T, H, D)")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} beside q in {q.dtype}, expected one float type")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    if k.shape != (B, S, K, D) or v.shape != k.shape:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"shapes disagree: {shapes}; expected (B, T, H, D), (B, S, K, D) twice")
    if H % K:
        raise ValueError(f"q has {H} heads, not a multiple of the {K} key/value heads of k")
    if T > S:
        raise ValueError(f"q has {T} tokens, more than the {S} of k")
    if doc_ids is None:
        return
    if doc_ids.shape not in ((B, S), (B, 1, T, S)) or doc_ids.is_floating_point():
        shape = f"{tuple(doc_ids.shape)} {doc_ids.dtype}"
        raise ValueError(f"doc_ids is {shape}, expected integers ({B}, {S}) or their mask")
