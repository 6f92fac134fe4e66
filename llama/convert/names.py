"""One table of weight names, and the one difference in layout behind them.

In: a name of ours, which is also Meta's. Out: the names in Hugging Face's and GGUF's files, and the
shapes a configuration gives. Rotary embeddings (paper §2.2) turn neighbouring features of wq and wk
here, in Meta's code and in GGUF's architecture "llama". In Hugging Face's, feature i of a head goes
with i + D/2, so the rows of both matrices lie in another order there.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from llama.config import ModelConfig
from llama.model import Transformer

# ours and Meta's, Hugging Face's, GGUF's; {} is the number of a block
TABLE = [line.split() for line in Path(__file__).with_suffix(".txt").read_text().splitlines()]


def hf(name: str) -> str:
    """Hugging Face's name of one of our parameters."""
    return _translate(name, 1)


def gguf(name: str) -> str:
    """GGUF's name of one of our parameters."""
    return _translate(name, 2)


def _translate(name: str, column: int) -> str:
    block = re.match(r"layers\.(\d+)\.", name)
    number = block[1] if block else ""
    row = next(row for row in TABLE if row[0].format(number) + ".weight" == name)
    return row[column].format(number) + ".weight"


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model, in its order; nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(cfg)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def halves(name: str, weight: Tensor, cfg: ModelConfig) -> Tensor:
    """Rows of wq and wk from (x0, x1), (x2, x3), ... to x0, x2, ..., x1, x3, ... in each head."""
    return _moved(name, weight, (-1, cfg.head_dim // 2, 2))


def neighbours(name: str, weight: Tensor, cfg: ModelConfig) -> Tensor:
    """Back from `halves`."""
    return _moved(name, weight, (-1, 2, cfg.head_dim // 2))


def _moved(name: str, weight: Tensor, rows: tuple[int, int, int]) -> Tensor:
    """With the last two axes of `rows` (heads, a, b) exchanged; only wq and wk are rotary."""
    if not name.endswith((".wq.weight", ".wk.weight")):
        return weight
    return weight.unflatten(0, rows).transpose(1, 2).reshape(weight.shape)
