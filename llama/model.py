"""The LLaMA decoder: token ids in, logits or summed losses out.

Paper §2.2: pre-normalisation with RMSNorm, SwiGLU, rotary embeddings. Names of modules and weights
are those of the original code. Parallelism, recompute and compilation are applied from outside
(`llama/parallel/`); the model knows nothing of them.

Axes: B batch, T tokens, C width, H heads, K key/value heads, D head size, F feed-forward width,
V vocabulary, S tokens including those in a cache.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kernels import ops, reference
from kernels.attention import attention, document_mask
from llama.config import ModelConfig

# Initial weights: normal with this deviation, over sqrt(2 n_layers) where a matrix writes into the
# residual stream (GPT-2; Megatron-LM, Shoeybi et al. 2019, §4.2). The LLaMA paper states none.
INIT_STD = 0.02
INIT_ROWS = 256


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """The norm of x; with a residual the norm of x + residual, and that sum."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class KVCache:
    """Keys and values of the tokens one block has seen, for generation."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, T, K, D) keys and values; all S of them so far."""
        B, T, K, D = k.shape
        if self.length == 0:
            # head by head in memory, as attention reads them
            self.k, self.v = (k.new_empty(B, K, self.capacity, D).transpose(1, 2) for _ in range(2))
        end = self.length + T
        assert end <= self.capacity, f"{end} tokens in a cache for {self.capacity}"
        self.k[:, self.length : end] = k
        self.v[:, self.length : end] = v
        self.length = end
        return self.k[:, :end], self.v[:, :end]


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig, backend: str) -> None:
        super().__init__()
        self.head_dim, self.attend = cfg.head_dim, partial(attention, backend=backend)
        kv_dim = cfg.kv_heads * cfg.head_dim
        self.wq = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wk = nn.Linear(cfg.dim, kv_dim, bias=False)
        self.wv = nn.Linear(cfg.dim, kv_dim, bias=False)
        self.wo = nn.Linear(cfg.dim, cfg.dim, bias=False)

    def forward(
        self, x: Tensor, freqs_cis: Tensor, docs: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = ops.rope(q, freqs_cis), ops.rope(k, freqs_cis)  # (B, T, H or K, D)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.wo(self.attend(q, k, v, docs).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(cfg.dim, cfg.hidden_dim, bias=False)
        self.w2 = nn.Linear(cfg.hidden_dim, cfg.dim, bias=False)
        self.w3 = nn.Linear(cfg.dim, cfg.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(ops.swiglu(self.w1(x), self.w3(x)))


class TransformerBlock(nn.Module):
    def __init__(self, cfg: ModelConfig, backend: str) -> None:
        super().__init__()
        self.attention = Attention(cfg, backend)
        self.feed_forward = FeedForward(cfg)
        self.attention_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        docs: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        h = self.attention(self.attention_norm(x), freqs_cis, docs, cache)
        h, x = self.ffn_norm(h, x)
        return x + self.feed_forward(h)


class Head(nn.Module):
    """Output projection, with the loss inside so that the logits need never exist at once."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.loss = ops.linear_cross_entropy

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if targets is None:
            return nn.functional.linear(x, self.weight)
        losses = self.loss(x.flatten(0, 1), self.weight, targets.flatten())
        return losses.view(targets.shape).sum(1), (targets != reference.IGNORED).sum(1)


class Transformer(nn.Module):
    """The whole decoder; `attention` names a backend of kernels/attention.py."""

    def __init__(self, cfg: ModelConfig, attention: str = "auto") -> None:
        super().__init__()
        self.cfg, self.attention = cfg, attention
        self.documents = partial(document_mask, backend=attention)
        assert cfg.vocab_size, "the vocabulary size is known before a model is built"
        self.tok_embeddings = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(TransformerBlock(cfg, attention) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = Head(cfg.dim, cfg.vocab_size)
        # Not a buffer: no cast, no to_empty and no state dict may touch it.
        self.freqs_cis: Tensor | None = None

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V); with `targets` (B, T), -100 ignored: sums of token losses and numbers
        of valid targets, (B,) each.

        `doc_ids` (B, T) keeps attention inside documents. With a `cache` per block, the tokens
        follow those in it, `doc_ids` are those of all S, and logits (B, 1, V) of the last token.
        """
        T, start = tokens.shape[1], cache[0].length if cache else 0
        freqs_cis = self.rotations(start + T, tokens.device)[start:]
        h = self.tok_embeddings(tokens)
        docs = None if doc_ids is None else self.documents(doc_ids, T, dtype=h.dtype)
        for i, layer in enumerate(self.layers):
            h = layer(h, freqs_cis, docs, cache[i] if cache else None)
        h = self.norm(h if cache is None else h[:, -1:])
        return self.output(h, targets)

    def rotations(self, positions: int, device: torch.device) -> Tensor:
        """RoPE's table (positions, D/2), complex64: FSDP casts real inputs of a block to bf16."""
        table = self.freqs_cis
        if table is None or table.shape[0] < positions or table.device != device:
            cfg = self.cfg
            # a table made under inference_mode could not be used in training afterwards
            with torch.inference_mode(False):
                speed = reference.rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
                # powers of two: while generating, the table is rarely made anew
                table = reference.rope_table(2 ** math.ceil(math.log2(positions)), speed).to(device)
            self.freqs_cis = table
        return table[:positions]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter in place with bits that depend on the seed and its name alone.

        Call it on a materialised model; of a DTensor only the local part is drawn and filled.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            writes_residual = name.endswith(("wo.weight", "w2.weight"))
            std = INIT_STD / math.sqrt(2 * self.cfg.n_layers) if writes_residual else INIT_STD
            _fill_normal(parameter, std, [seed, *name.encode()])


def _fill_normal(parameter: Tensor, std: float, key: list[int]) -> None:
    """Fill a matrix or its local shard, chunk of rows by chunk of rows, each from its own seed.

    numpy's generators take the whole key as their seed; torch's keep 32 bits of it, and two of the
    100,000 chunks of a large model would be the same.
    """
    n_rows, n_columns = parameter.shape
    local, (row, column) = parameter, (0, 0)
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        _, (row, column) = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    if local.numel() == 0:
        return
    end, columns = row + local.shape[0], slice(column, column + local.shape[1])

    def fill(chunk: int) -> None:
        top = chunk * INIT_ROWS
        shape = (min(INIT_ROWS, n_rows - top), n_columns)
        drawn = np.random.default_rng([*key, chunk]).standard_normal(shape, dtype=np.float32)
        first, last = max(top, row), min(top + INIT_ROWS, end)
        block = torch.from_numpy(drawn)[first - top : last - top, columns]
        local[first - row : last - row].copy_(block * std)

    chunks = range(row // INIT_ROWS, math.ceil(end / INIT_ROWS))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(torch.no_grad()(fill), chunks))
