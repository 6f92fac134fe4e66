"""Models that write clear text of their own, and how they go on."""

from llama import generate
from llama.config import ModelConfig
from llama.model import Transformer


def small(seed: int, vocab_size: int = 60) -> Transformer:
    cfg = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=vocab_size)
    model = Transformer(cfg)
    model.init_weights(seed)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(8)
    return model


def continued(model: Transformer, prompts: list[list[int]], n: int, **options: object) -> list:
    return list(zip(*generate.generate(model, prompts, n, **options), strict=True))  # type: ignore[arg-type]
