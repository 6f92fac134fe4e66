"""A run with shards, a tokenizer and a checkpoint of random weights, for the conversion tests."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from made_data import make_source, make_tokenizer, text

from llama import config, files
from llama.config import Config, DataConfig, ModelConfig
from llama.convert import __main__ as command
from llama.convert import check, hf
from llama.data import schedule, shards
from llama.data.writer import open_tokenizer, place_tokenizer
from llama.model import Transformer
from llama.runtime import checkpoint, world
from tokenizer.tokenizer import SPACE_PIECE, Tokenizer

LINEAR: dict[str, Any] = {"type": "linear", "factor": 4.0}
# slow enough that pairs of all three kinds (kept, blended, slowed) matter within 64 positions
LLAMA3: dict[str, Any] = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"dim": 48, "n_layers": 2, "n_heads": 3},
    "grouped": {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 72},
    "one kv head": {"dim": 64, "n_layers": 1, "n_heads": 8, "n_kv_heads": 1, "norm_eps": 1e-3},
    "linear": {"dim": 32, "n_layers": 2, "n_heads": 2, "rope_scaling": LINEAR},
    "llama3": {
        "dim": 96,
        "n_layers": 2,
        "n_heads": 6,
        "n_kv_heads": 3,
        "rope_theta": 500.0,
        "rope_scaling": LLAMA3,
    },
}


def random_model(cfg: ModelConfig, rng: random.Random) -> Transformer:
    """Weights large enough that every part of the model matters to the logits, gains not 1."""
    model = Transformer(cfg)
    model.init_weights(rng.randrange(2**31))
    torch.manual_seed(rng.randrange(2**31))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(6)
    return model


def make_run(place: Path, rng: random.Random, name: str = "run", **model: Any) -> Path:
    """`place`/runs/<name> with a checkpoint, on shards in `place`/tokens made with a tokenizer."""
    tokens = place / "tokens"
    if not tokens.exists():
        file, tokenizer, vocabulary = open_tokenizer(make_tokenizer(place / "pieces"))
        for source in ("web", "code"):
            documents = [(f"{source}/{i}", text(rng, rng.randrange(1, 90))) for i in range(40)]
            files.write_json(place / f"{source}.json", dict(documents))
            encoded = [(key, [1, *tokenizer.encode(content), 2]) for key, content in documents]
            make_source(tokens / source, [encoded], vocabulary)
        place_tokenizer(file, tokens)
    sources = shards.open_sources(tokens, ["web", "code"])
    cfg = Config(
        name=name,
        seed=rng.randrange(1000),
        data=DataConfig(path=str(tokens), mixture={"web": 0.75, "code": 0.25}, seq_len=64),
        model=ModelConfig(**model, vocab_size=sources["web"].vocab_size),
    )
    transformer = random_model(cfg.model, rng)
    tensors = {f"model.{name}": p.detach() for name, p in transformer.named_parameters()}
    tensors |= {f"exp_avg.{name}": torch.rand_like(p) for name, p in transformer.named_parameters()}
    state = {
        "step": 5,
        "segments": schedule.plan(cfg, sources).segments,
        "fingerprints": {"tokenizer": sources["web"].tokenizer_sha256},
        "config": config.to_dict(cfg),
    }
    run = place / "runs" / name
    here = world.start()
    try:
        assert checkpoint.save(run, 5, tensors, state, here, keep=1) is None
    finally:
        world.stop()
    return run


def convert(
    src: Path, dst: Path, to: str, *options: str, shard_bytes: int = hf.SHARD_BYTES
) -> None:
    """The command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "SHARD_BYTES", shard_bytes)
        command.main([str(src), str(dst), "--to", to, *options])


def edit_json(path: Path, **facts: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def weights_of(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def fresh_rng() -> random.Random:
    """For fixtures that outlive a test; pytest shows what they print."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@contextmanager
def without_transformers() -> Iterator[None]:
    """The second implementation judges, as where transformers, slow to start, is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "ask_transformers", lambda *_: None)
        yield


def fuzz(tokenizer: Tokenizer, n: int, rng: random.Random) -> list[str]:
    """Texts that tokenizers disagree on: runs, spaces, control pieces, rare characters."""
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    marks = ["<s>", "</s>", "<unk>", "<0x41>", SPACE_PIECE, " ", "  ", "\n", "\t", "=", "==", "0"]

    def piece() -> str:
        return tokenizer.decode([rng.randrange(tokenizer.vocab_size)])

    def text() -> str:
        kind, length = rng.randrange(5), rng.randrange(1, 30)
        if kind == 0:
            return (" " * rng.randrange(2)).join(piece() for _ in range(length))
        if kind == 1:
            return "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(length))
        if kind == 2:
            return "".join(rng.choice(marks) for _ in range(length))
        if kind == 3:
            return rng.choice(["a", " ", "=", "-", "0", "\n", SPACE_PIECE, "é"]) * length
        return " " * rng.randrange(4) + " ".join(piece() for _ in range(length)) + rng.choice(marks)

    return [text() for _ in range(n)]
