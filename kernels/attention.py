"""Causal attention: (B, T, H, D) queries over (B, S, K, D) keys and values, by the backend chosen.

Checks every argument before anything is launched, then calls one of the backends. H/K query heads
share one key/value head; attention stays inside documents where their ids are given.
"""

import math
from functools import cache, partial
from importlib import import_module, metadata

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention_cpu, attention_op, dispatch, reference

BACKENDS = ("triton", "gluon", "sdpa", "xformers", "reference")
GLUON_TRITON = "3.6"
HALF = (torch.bfloat16, torch.float16)


def choose(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    deterministic: bool = True,
) -> str:
    """The backend that will run for `name`; call it once at start-up and print the answer.

    `auto` is torch's sdpa everywhere: no measurement on a GPU shows the Triton kernels right and
    faster yet (`benchmarks/results/` would hold it). Raises `ValueError` where the one asked for
    cannot run: nothing is replaced silently. Without `deterministic` the name says so.
    """
    if name == "auto":
        return "sdpa"
    if reason := _why_not(name, torch.device(device), dtype, head_dim):
        raise ValueError(
            f"kernels.attention {name!r} cannot run on {torch.device(device).type} with {dtype} "
            f"and head size {head_dim}: {reason}"
        )
    fused = name in ("triton", "gluon") and not deterministic
    return f"{name} (backward not deterministic)" if fused else name


@cache
def _why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    kind = name.split(" ")[0]
    if kind not in BACKENDS:
        return f"it is not built; there are auto, {', '.join(BACKENDS)}"
    if kind in ("sdpa", "reference"):
        return None
    package = "xformers" if kind == "xformers" else "triton"
    try:
        import_module("xformers.ops" if kind == "xformers" else package)
    except Exception as error:  # a broken package raises anything
        return f"{package} cannot be imported: {error}"
    interpreted = package == "triton" and dispatch.INTERPRETED
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    if not (on_gpu or interpreted):
        return "it needs a CUDA GPU"
    chip = torch.cuda.get_device_capability(device) if on_gpu else (8, 0)
    if chip < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {chip[0]}.{chip[1]}"
    if kind == "triton" and (dtype not in (*HALF, torch.float32) or not 1 <= head_dim <= 256):
        return "it takes bfloat16, float16 and float32, and head sizes up to 256"
    if interpreted and dtype == torch.bfloat16:
        return "Triton's interpreter does not multiply bfloat16"
    if kind == "gluon":
        version = metadata.version("triton")
        if chip != (9, 0) or interpreted:
            return "it needs a Hopper GPU"
        if version.rsplit(".", 1)[0] != GLUON_TRITON:
            return f"it is written for triton {GLUON_TRITON}, here is {version}"
        if dtype not in HALF or head_dim not in (64, 128):
            return "it takes bfloat16 and float16, and head sizes 64 and 128"
    return None


def document_mask(doc_ids: Tensor, n_queries: int, backend: str, dtype: torch.dtype) -> Tensor:
    """What `attention` of this dtype wants to know of documents, made once for all layers.

    Positions (2, B, S) for the Triton kernels; else the (B, 1, T, S) mask, as other backends cannot
    compare the (B, S) ids themselves. But for the reference it is what is added to the scores: sdpa
    would make that of a boolean one in every layer, and keep it for the backward pass.
    """
    kind = backend.split(" ")[0]
    assert kind in ("auto", *BACKENDS), f"unknown attention backend {backend!r}"
    if kind in ("triton", "gluon"):
        return attention_op.documents(doc_ids)
    seen = reference.visible(n_queries, doc_ids)
    if kind == "reference":
        return seen
    # rows of a bias begin at multiples of 8 elements
    bias = seen.new_zeros(*seen.shape[:3], (seen.shape[3] + 7) // 8 * 8, dtype=dtype)
    return bias[..., : seen.shape[3]].masked_fill_(~seen, -torch.inf)


def attention(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v to (B, T, H, D); the T queries are the last of S >= T positions.

    `doc_ids`: (B, S), equal for positions that may see each other, or `document_mask` of them. A
    document lies in one piece: with Triton's kernels an id that comes back begins another one.
    """
    _check(q, k, v, doc_ids, backend)
    if not torch.compiler.is_compiling():
        backend = choose(backend, q.device, q.dtype, q.shape[-1])
    kind = backend.split(" ")[0]
    if kind in ("triton", "gluon"):
        return _triton(q, k, v, doc_ids, backend)[0]
    if kind == "reference":
        return reference.attention(q, k, v, doc_ids)
    if doc_ids is not None and doc_ids.dim() == 2:
        doc_ids = document_mask(doc_ids, q.shape[1], backend, q.dtype)
    return _xformers(q, k, v, doc_ids) if kind == "xformers" else _sdpa(q, k, v, doc_ids)


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None = None, backend: str = "reference"
) -> tuple[Tensor, Tensor]:
    """`attention`, and log Σ exp(s) of every query's scores s: (B, H, T), float32 or wider.

    Outputs over several sets of keys join by it to that over all. It has no gradient. Raises
    `ValueError` for a backend that keeps it to itself.
    """
    _check(q, k, v, doc_ids, backend)
    backend = choose(backend, q.device, q.dtype, q.shape[-1])
    if backend == "reference":
        log_sums = reference.attention_log_sums(q.detach(), k.detach(), doc_ids)
        return reference.attention(q, k, v, doc_ids), log_sums
    if not backend.startswith(("triton", "gluon")):
        raise ValueError(f"backend {backend!r} has no lse to return: triton, gluon, reference do")
    out, lse = _triton(q, k, v, doc_ids, backend)
    # the operator's gradient is that of the output alone
    lse = lse.detach()[..., : q.shape[1]] * math.log(2)
    return out, lse.to(reference.wide_dtype(q.dtype))


def _triton(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Output, and the log2 that the operator keeps."""
    kind = backend.split(" ")[0]
    if doc_ids is not None and doc_ids.dim() == 2:
        doc_ids = attention_op.documents(doc_ids)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    out, _, lse = attention_op.attention(q, k, v, doc_ids, keep, kind == "gluon", kind == backend)
    return out, lse


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # takes seconds to import
    from xformers import ops

    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    causal = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask()
    bias = causal if mask is None else mask.expand(B, H, T, S)
    if H != K:
        k, v = (x.repeat_interleave(H // K, dim=2) for x in (k, v))
    return ops.memory_efficient_attention(q, k, v, attn_bias=bias)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    n_queries, n_keys = q.shape[1], k.shape[1]
    if mask is None and 1 < n_queries < n_keys:
        # sdpa's own causal mask takes the queries as the first positions, not the last
        mask = reference.visible(n_queries, torch.zeros(1, n_keys, device=q.device))
    grouped = q.shape[2] != k.shape[2]
    causal = mask is None and n_queries > 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T, D)
    if causal and q.device.type == "cpu" and attention_cpu.worth_blocks(n_queries):
        out = attention_cpu.causal_attention(q, k, v)
    elif grouped and q.is_cuda and _groups_by_formula(q, mask):
        out = _head_by_head(q, k, v, mask, causal)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
    return out.transpose(1, 2)  # (B, T, H, D)


def _head_by_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """sdpa of (B, H, T, D) over (B, K, S, D): the first head of every group, then the second ..."""
    heads = q.unflatten(1, (k.shape[1], -1)).unbind(2)  # each (B, K, T, D)
    attend = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=causal)
    return torch.stack([attend(head, k, v) for head in heads], dim=2).flatten(1, 2)


def _groups_by_formula(q: Tensor, mask: Tensor | None) -> bool:
    """Whether sdpa has no kernel for grouped heads here, and would hold all of the T x S scores.

    FlashAttention takes groups, but neither masks nor float32; cuDNN, from Hopper on, takes masks.
    """
    masked = mask is not None and torch.cuda.get_device_capability(q.device) < (9, 0)
    return masked or q.dtype not in HALF


def _check(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, backend: str) -> None:
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
    if not K or H % K:
        raise ValueError(f"q has {H} heads, not a multiple of the {K} key/value heads of k")
    if T > S:
        raise ValueError(f"q has {T} tokens, more than the {S} of k")
    if doc_ids is None:
        return
    by_kernels = backend.startswith(("triton", "gluon"))
    mask = (B, 1, T, S), torch.bool if backend == "reference" else q.dtype
    made, kind = ((2, B, S), torch.int32) if by_kernels else mask
    fits = doc_ids.dtype == kind and doc_ids.shape == made
    fits |= doc_ids.shape == (B, S) and not doc_ids.is_floating_point()
    if not fits or doc_ids.device != q.device:
        found = f"{tuple(doc_ids.shape)} {doc_ids.dtype} on {doc_ids.device}"
        expected = f"integers ({B}, {S}) or {made} {kind} on {q.device}"
        raise ValueError(f"doc_ids is {found}, expected {expected}")
