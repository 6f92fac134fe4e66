"""Conversions are judged: right ones pass, and of wrong ones nothing is left."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_convert import SHAPES, convert, fresh_rng, make_run, random_model, without_transformers
from torch import Tensor

from llama.cli import UserError
from llama.config import ModelConfig
from llama.convert import check, hf, judges, load, names, pieces
from llama.convert.check import ask_transformers
from llama.convert.source import Source, model_config


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with without_transformers():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("place"), fresh_rng(), **SHAPES["grouped"])


def source_of(shape: dict[str, Any], rng: random.Random) -> tuple[Source, torch.nn.Module]:
    cfg = model_config(Path("made"), **shape, vocab_size=50)
    model = random_model(cfg, rng)
    weights = dict(model.named_parameters())
    source = Source(
        Path("made"), "native", cfg, 64, torch.float32, lambda name: weights[name].detach()
    )
    return source, model


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_two_implementations_agree(
    shape: dict[str, Any], tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = source_of(shape, rng)
    tokens = check.sample(source)
    ours = check.logits(source, tokens)
    scale = ours.abs().max()
    assert scale > 1 and (ours - model(tokens)).abs().max() < 1e-5 * scale
    monkeypatch.setattr(hf, "SHARD_BYTES", 50_000)
    hf.write_weights(source, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf.config_json(source)))
    theirs = judges.logits_hf(tmp_path, tokens)
    assert (ours - theirs).abs().max() < 1e-5 * scale
    # neither positions nor earlier tokens are without effect
    assert (theirs[:, -1] - judges.logits_hf(tmp_path, tokens.flip(1))[:, -1]).abs().max() > 1


def as_it_is(name: str, weight: Tensor, cfg: ModelConfig) -> Tensor:
    return weight


def heads_as_queries(name: str, weight: Tensor, cfg: ModelConfig) -> Tensor:
    """The classic mistake: H heads for wk too."""
    if not name.endswith("wk.weight"):
        return HALVES(name, weight, cfg)
    return weight.unflatten(0, (cfg.n_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


HALVES = names.halves
RIGHT = hf.config_json


def swapped(name: str, one: str, other: str) -> str:
    return name.replace(one, other) if one in name else name.replace(other, one)


def config_with(**facts: Any) -> Callable[..., dict[str, Any]]:
    return lambda *arguments: RIGHT(*arguments) | facts


WRONG: dict[str, tuple[object, str, Any, str]] = {
    "rows": (names, "halves", as_it_is, "logits differ by"),
    "rows of keys": (names, "halves", heads_as_queries, "logits differ by"),
    "epsilon": (hf, "config_json", config_with(rms_norm_eps=1e-6), "logits differ by"),
    "theta": (
        hf,
        "config_json",
        config_with(rope_parameters=None, rope_theta=10500.0),
        "logits differ by",
    ),
    "gate and up": (
        names,
        "TABLE",
        [(ours, swapped(theirs, "gate", "up"), other) for ours, theirs, other in names.TABLE],
        "logits differ by",
    ),
    "no BOS": (
        pieces.processors,
        "TemplateProcessing",
        lambda **_: pieces.processors.ByteLevel(),
        "cannot be written as tokenizer.json.*has the ids",
    ),
    "spaces": (
        pieces.normalizers,
        "Prepend",
        lambda piece: pieces.normalizers.Replace("  ", " "),
        "cannot be written as tokenizer.json.*has the ids",
    ),
}


@pytest.mark.parametrize(("place", "name", "wrong", "words"), WRONG.values(), ids=WRONG)
def test_of_a_wrong_export_nothing_is_left(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: object,
    name: str,
    wrong: Any,
    words: str,
) -> None:
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises(UserError, match=f"{words}.*nothing was kept"):
        convert(run, tmp_path / "hf", "hf")
    assert not list(tmp_path.iterdir())


def test_of_a_wrong_gguf_nothing_is_left(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    table = [(ours, hf, swapped(theirs, "ffn_gate", "ffn_up")) for ours, hf, theirs in names.TABLE]
    monkeypatch.setattr(names, "TABLE", table)
    with pytest.raises(UserError, match="GGUF.* logits differ by .*nothing was kept"):
        convert(run, tmp_path / "model.gguf", "gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["meta", "native"])
def test_weights_that_read_back_otherwise_are_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    opened, calls = load.open_source, []

    def wrong(path: Path) -> Source:
        """The second time, for what was written, one weight is off by a last bit."""
        source = opened(path)
        calls.append(path)
        if len(calls) == 1:
            return source
        return replace(source, read=lambda name: source.read(name) * (1 + 1e-7 * ("w3" in name)))

    monkeypatch.setattr(load, "open_source", wrong)
    with pytest.raises(UserError, match="w3.weight read back differs by .*nothing was kept"):
        convert(run, tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_transformers_that_crash_are_as_good_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformers.py").write_text("raise RuntimeError('built for another machine')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert ask_transformers(tmp_path, torch.zeros(1, 1, dtype=torch.long), []) is None
