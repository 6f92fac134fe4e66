"""Folders of the original code: one file or several, settings, and what is refused."""

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_convert import (
    LINEAR,
    SHAPES,
    convert,
    edit_json,
    fresh_rng,
    make_run,
    without_transformers,
)

from llama.cli import UserError
from llama.config import ModelConfig
from llama.convert import load, meta

Folder = Path


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with without_transformers():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # an epsilon that is neither ours nor the original's by default
    shape = SHAPES["grouped"] | {"norm_eps": 3e-6}
    return make_run(tmp_path_factory.mktemp("place"), fresh_rng(), **shape)


@pytest.fixture(scope="module")
def made(run: Path) -> Folder:
    convert(run, run.parent / "meta", "meta")
    return run.parent / "meta"


@pytest.fixture
def exported(made: Folder, tmp_path: Path) -> Folder:
    return Path(shutil.copytree(made, tmp_path / "meta"))


def test_the_file_is_what_torch_save_writes(run: Path, exported: Folder) -> None:
    source = load.open_source(run)
    for mmap in (False, True):
        found = torch.load(exported / "consolidated.00.pth", weights_only=True, mmap=mmap)
        assert list(found) == list(source.shapes)
        for name, weight in found.items():
            assert torch.equal(weight, source.read(name)), name
            assert weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes
    facts = json.loads((exported / "params.json").read_text())
    assert facts["norm_eps"] == 3e-6 and facts["n_kv_heads"] == 2
    again = load.open_source(exported)
    assert asdict(again.cfg) == asdict(source.cfg) and again.format == "meta"


def test_half_the_bytes(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "half", "meta", "--dtype", "bfloat16")
    source, half = load.open_source(run), load.open_source(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    for name in source.shapes:
        assert torch.equal(half.read(name), source.read(name).bfloat16()), name


def divided(weights: dict[str, torch.Tensor], parts: int, by_rows: bool) -> list[dict[str, Any]]:
    """As the original code divides weights over model-parallel processes."""
    files: list[dict[str, Any]] = [{"rope.freqs": torch.ones(8)} for _ in range(parts)]
    for name, weight in weights.items():
        rows = any(word in name for word in ("wq", "wk", "wv", "w1", "w3", "output"))
        # LLaMA and Llama 2 divide the width of the embedding, Llama 3 its vocabulary
        rows |= by_rows and name.startswith("tok")
        for k, file in enumerate(files):
            whole = weight.dim() == 1
            file[name] = weight if whole else weight.chunk(parts, 0 if rows else 1)[k].clone()
    return files


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
def test_files_of_several_processes_are_merged(
    tmp_path: Path, parts: int, by_rows: bool, rng: random.Random
) -> None:
    cfg = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 96}
    run = make_run(tmp_path, rng, **cfg)
    convert(run, tmp_path / "one", "meta")
    one = load.open_source(tmp_path / "one")
    assert one.cfg.vocab_size and one.cfg.vocab_size % parts == 0
    many = Path(shutil.copytree(tmp_path / "one", tmp_path / "many"))
    weights = {name: one.read(name) for name in one.shapes}
    for k, file in enumerate(divided(weights, parts, by_rows)):
        torch.save(file, many / f"consolidated.{k:02d}.pth")
    # as in the first release
    edit_json(many / "params.json", vocab_size=-1, multiple_of=256)
    merged = load.open_source(many)
    assert asdict(merged.cfg) == asdict(one.cfg)
    for name, weight in weights.items():
        assert torch.equal(merged.read(name), weight), name
    convert(many, tmp_path / "native", "native")
    last = many / f"consolidated.{parts - 1:02d}.pth"
    for name in ("norm.weight", "layers.1.attention.wo.weight"):
        weights = torch.load(last, weights_only=True)
        torch.save(weights | {name: torch.ones(3, 5)}, last)
        with pytest.raises(UserError, match=f"{name} is .*, expected"):
            load.open_source(many)
        torch.save({key: weight for key, weight in weights.items() if key != name}, last)
        if name != "norm.weight":
            with pytest.raises(UserError, match=f"{name} is .*, expected"):
                load.open_source(many)
        torch.save(weights, last)
    last.unlink()
    with pytest.raises(UserError, match=f"in each of {parts - 1} files|is .*, expected"):
        load.open_source(many)


def test_the_original_code_comes_to_our_feed_forward_width(rng: random.Random) -> None:
    for _ in range(300):
        dim = 2 * rng.randrange(1, 4096)
        cfg = ModelConfig(dim=dim, ffn_dim=rng.choice([None, rng.randrange(1, 5 * dim)]))
        facts = meta.feed_forward(cfg)
        # FeedForward.__init__ there
        hidden = int(2 * (4 * dim) / 3)
        if "ffn_dim_multiplier" in facts:
            hidden = int(facts["ffn_dim_multiplier"] * hidden)
        multiple = facts["multiple_of"]
        assert multiple * math.ceil(hidden / multiple) == cfg.hidden_dim, (dim, facts)


def test_scaled_rope(run: Path, tmp_path: Path) -> None:
    scaling = {
        "type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    source = load.open_source(run)
    scaled = replace(source, cfg=replace(source.cfg, rope_scaling=scaling))
    facts = meta.params_json(scaled)
    assert facts["use_scaled_rope"] is True and facts["rope_scaling_factor"] == 32
    assert meta.read_params(tmp_path, facts, {}).rope_scaling == scaling
    # what the first files with scaling had
    plain = {k: v for k, v in facts.items() if not k.startswith("rope_s")}
    read = meta.read_params(tmp_path, plain, {}).rope_scaling
    assert read is not None and read["factor"] == 8
    with pytest.raises(UserError, match="cannot hold rope_scaling type linear"):
        meta.params_json(replace(source, cfg=replace(source.cfg, rope_scaling=LINEAR)))


# -- what is refused -------------------------------------------------------------------------------


class Foreign:
    """Something that only a pickle with code could bring back."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never be printed",)


def weights_file(folder: Folder) -> Path:
    return folder / "consolidated.00.pth"


def rewrite(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Folder], None]:
    def spoil(folder: Folder) -> None:
        weights = torch.load(weights_file(folder), weights_only=True)
        torch.save(edit(weights) or weights, weights_file(folder))

    return spoil


def params(**facts: Any) -> Callable[[Folder], None]:
    return lambda folder: edit_json(folder / "params.json", **facts)


def truncate(folder: Folder) -> None:
    weights_file(folder).write_bytes(weights_file(folder).read_bytes()[:-100])


def hollow(folder: Folder) -> None:
    """Missing bytes in the middle, as of a broken download."""
    data = weights_file(folder).read_bytes()
    weights_file(folder).write_bytes(data[:1000] + data[2000:])


BAD: dict[str, tuple[Callable[[Folder], Any], str]] = {
    "truncated": (truncate, "consolidated.00.pth is truncated or no file of tensors"),
    "hollow": (hollow, "consolidated.00.pth is truncated or no file of tensors"),
    "text": (lambda f: weights_file(f).write_text("<html>"), "is truncated or no file of tensors"),
    "code": (lambda f: torch.save({"a": Foreign()}, weights_file(f)), "no file of tensors"),
    "nested": (rewrite(lambda w: {"model": w}), "holds no plain tensors by name"),
    "a list": (rewrite(lambda w: list(w.values())), "holds no plain tensors by name"),
    "a weight gone": (
        rewrite(lambda w: {name: weight for name, weight in w.items() if name != "norm.weight"}),
        "lacks norm.weight",
    ),
    "integers": (
        rewrite(lambda w: {name: weight.to(torch.int8) for name, weight in w.items()}),
        "weight is of type torch.int8",
    ),
    "a shape": (
        rewrite(lambda w: w.update({"norm.weight": torch.ones(3)})),
        "norm.weight is 3, expected 64",
    ),
    "no params": (lambda f: (f / "params.json").unlink(), "is of no known format"),
    "bad params": (lambda f: (f / "params.json").write_text("dim: 3"), "is not valid JSON"),
    "no dim": (params(dim=None), "params.json has no dim"),
    "another dim": (params(dim=128), "tok_embeddings.weight is .* x 64, expected .* x 128"),
    "odd heads": (params(n_heads=3), "params.json: model.dim 64 .* model.n_heads 3"),
    "more layers": (params(n_layers=5), "lacks layers.3.* and 17 more weights"),
    "no weights": (lambda f: weights_file(f).unlink(), "has params.json, but no consolidated.00"),
    "a gap": (
        lambda f: weights_file(f).rename(f / "consolidated.01.pth"),
        "has consolidated.01.pth, but no consolidated.00.pth",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "has no tokenizer.*--tokenizer"),
}


@pytest.mark.parametrize(("spoil", "words"), BAD.values(), ids=BAD)
def test_bad_folders_are_one_sentence(
    exported: Folder,
    tmp_path: Path,
    spoil: Callable[[Folder], Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(exported)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words) as caught:
        convert(exported, tmp_path / "out", "native")
    assert "\n" not in str(caught.value)
    assert "never be printed" not in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
