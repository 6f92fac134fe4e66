"""One table of weight names, and the one difference in layout behind them.

In: a name of ours, which is also Meta's. Out: the names in Hugging Face's and GGUF's files, and the
shapes a configuration gives. Rotary embeddings (paper §2.2) turn neighbouring features of wq and wk
here, in Meta's code and in GGUF's architecture "llama". In Hugging Face's, feature i of a head goes
with i + D/2, so the rows of both matrices lie in another order there.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from llama.config import ModelConfig
from llama.model import Transformer

Row = tuple[str, str, str]  # ours and Meta's, Hugging Face's, GGUF's
TABLE: tuple[Row, ...] = (
    ("tok_embeddings", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("output", "lm_head", "output"),
)
BLOCK: Row = ("layers.{}.", "model.layers.{}.", "blk.{}.")
BLOCK_TABLE: tuple[Row, ...] = (
    ("attention_norm", "input_layernorm", "attn_norm"),
    ("attention.wq", "self_attn.q_proj", "attn_q"),
    ("attention.wk", "self_attn.k_proj", "attn_k"),
    ("attention.wv", "self_attn.v_proj", "attn_v"),
    ("attention.wo", "self_attn.o_proj", "attn_output"),
    ("ffn_norm", "post_attention_layernorm", "ffn_norm"),
    ("feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
    ("feed_forward.w2", "mlp.down_proj", "ffn_down"),
    ("feed_forward.w3", "mlp.up_proj", "ffn_up"),
)


def hf(name: str) -> str:
    """Hugging Face's name of one of our parameters."""
    return _translate(name, 1)


def gguf(name: str) -> str:
    """GGUF's name of one of our parameters."""
    return _translate(name, 2)


def _translate(name: str, column: int) -> str:
    stem = name.removesuffix(".weight")
    block = re.fullmatch(r"layers\.(\d+)\.(.+)", stem)
    table, prefix = TABLE, ""
    if block:
        table, prefix, stem = BLOCK_TABLE, BLOCK[column].format(block[1]), block[2]
    row = next(row for row in table if row[0] == stem)
    return f"{prefix}{row[column]}.weight"


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model, in its order; nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(cfg)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def rotary_heads(name: str, cfg: ModelConfig) -> int:
    """Heads whose features are turned: H for wq, K for wk, 0 for every other parameter."""
    return {"wq": cfg.n_heads, "wk": cfg.kv_heads}.get(name.split(".")[-2], 0)


def halves(name: str, weight: Tensor, cfg: ModelConfig) -> Tensor:
    """Rows of wq and wk from (x0, x1), (x2, x3), ... to x0, x2, ..., x1, x3, ... in each head."""
    if not (heads := rotary_heads(name, cfg)):
        return weight
    pairs = weight.unflatten(0, (heads, -1, 2))  # (H or K, D/2, 2, C)
    return pairs.transpose(1, 2).reshape(weight.shape)


def neighbours(name: str, weight: Tensor, cfg: ModelConfig) -> Tensor:
    """Back from `halves`."""
    if not (heads := rotary_heads(name, cfg)):
        return weight
    parts = weight.unflatten(0, (heads, 2, -1))  # (H or K, 2, D/2, C)
    return parts.transpose(1, 2).reshape(weight.shape)
