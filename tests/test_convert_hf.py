"""Folders of Hugging Face's: what is written, and what is read or refused."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from made_convert import (
    LINEAR,
    LLAMA3,
    SHAPES,
    convert,
    edit_json,
    fresh_rng,
    make_run,
    without_transformers,
)
from safetensors.torch import load_file, save_file

from llama.cli import UserError
from llama.config import ModelConfig
from llama.convert import hf, load, names

Folder = Path


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with without_transformers():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("place"), fresh_rng(), **SHAPES["grouped"])


@pytest.fixture(scope="module")
def made(run: Path) -> Folder:
    with without_transformers():
        convert(run, run.parent / "hf", "hf", shard_bytes=100_000)
    return run.parent / "hf"


@pytest.fixture
def exported(made: Folder, tmp_path: Path) -> Folder:
    """A folder of this test's own."""
    return Path(shutil.copytree(made, tmp_path / "hf"))


def test_the_weights_come_back_bit_for_bit(run: Path, exported: Folder) -> None:
    ours, theirs = load.open_source(run), load.open_source(exported)
    assert (theirs.format, theirs.context, theirs.dtype) == ("hf", 64, torch.float32)
    assert asdict(theirs.cfg) == asdict(ours.cfg)
    for name in ours.shapes:
        assert torch.equal(theirs.read(name), ours.read(name)), name


def test_shards_are_what_the_library_reads(run: Path, exported: Folder) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    found, sizes = {}, []
    for file in sorted(exported.glob("model-*.safetensors")):
        weights = load_file(file)
        assert {name for name, place in index["weight_map"].items() if place == file.name} == set(
            weights
        )
        sizes.append(sum(w.nbytes for w in weights.values()))
        assert sizes[-1] <= 100_000 or len(weights) == 1
        found |= weights
    assert len(sizes) > 3 and sum(sizes) == index["metadata"]["total_size"]
    source = load.open_source(run)
    for name in source.shapes:
        weight = names.halves(name, source.read(name), source.cfg)
        assert torch.equal(found[names.hf(name)], weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_single_file_in_another_type(run: Path, tmp_path: Path, dtype: str) -> None:
    convert(run, tmp_path / "half", "hf", "--dtype", dtype, "--license", "apache-2.0")
    assert not (tmp_path / "half/model.safetensors.index.json").exists()
    source, written = load.open_source(run), load.open_source(tmp_path / "half")
    assert written.dtype == getattr(torch, dtype)
    for name in source.shapes:
        assert torch.equal(written.read(name), source.read(name).to(written.dtype)), name
    facts = json.loads((tmp_path / "half/config.json").read_text())
    assert facts["dtype"] == facts["torch_dtype"] == dtype


def test_the_card_names_data_tokens_and_licence(
    run: Path, exported: Folder, tmp_path: Path
) -> None:
    card = (exported / "README.md").read_text()
    # 5 steps of 8,192 tokens, three quarters from one source
    assert card.startswith("---\nlicense: other\n")
    assert "40,960 tokens in 5 steps" in card
    assert "| web | 75.00% | 30,720 |" in card and "| code | 25.00% | 10,240 |" in card
    assert load.open_source(run).tokenizer_sha256 in card
    assert str(tmp_path) not in card
    convert(exported, tmp_path / "again", "hf", "--license", "mit")
    card = (tmp_path / "again/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "does not record the data" in card


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3])
def test_keys_of_transformers_4_and_of_5(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 100,
        "rms_norm_eps": 1e-6,
    }
    expected = ModelConfig(64, 2, 4, 2, 100, 96, 1e-6, 5e5, scaling)
    rest = {key: value for key, value in (scaling or {}).items() if key != "type"}
    kind = scaling["type"] if scaling else "default"
    old = facts | {"rope_theta": 5e5, "rope_scaling": scaling}
    newer = facts | {"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **rest}}
    new = facts | {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **rest}}
    for each in (old, newer, new, old | new):
        assert hf.read_config(tmp_path, each) == expected
    # what is left out has the defaults of transformers
    short = {k: v for k, v in facts.items() if k not in ("rms_norm_eps", "num_key_value_heads")}
    read = hf.read_config(tmp_path, short)
    assert (read.norm_eps, read.kv_heads, read.rope_theta) == (1e-6, 4, 1e4)


def test_tied_embeddings_become_two(exported: Folder, tmp_path: Path) -> None:
    tied = tmp_path / "tied"
    tied.mkdir()
    weights = {}
    for file in exported.glob("*.safetensors"):
        weights |= load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, tied / "model.safetensors")
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(exported / name, tied / name)
    edit_json(tied / "config.json", tie_word_embeddings=True)
    source = load.open_source(tied)
    assert torch.equal(source.read("output.weight"), source.read("tok_embeddings.weight"))
    convert(tied, tmp_path / "native", "native")


# -- what is refused -------------------------------------------------------------------------------


def change(**facts: Any) -> Callable[[Folder], None]:
    return lambda folder: edit_json(folder / "config.json", **facts)


def first(folder: Folder) -> Path:
    return min(folder.glob("model-*.safetensors"))


def truncate(folder: Folder) -> None:
    first(folder).write_bytes(first(folder).read_bytes()[:-1])


def scramble(folder: Folder) -> None:
    first(folder).write_bytes(b"PK\x03\x04" + random.randbytes(999))


def rewrite(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Folder], None]:
    def spoil(folder: Folder) -> None:
        weights = load_file(first(folder))
        edit(weights)
        save_file({name: w.contiguous() for name, w in weights.items()}, first(folder))

    return spoil


def embedding(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Folder], None]:
    name = "model.embed_tokens.weight"
    return rewrite(lambda weights: weights.update({name: change(weights[name])}))


def nan(weight: torch.Tensor) -> torch.Tensor:
    weight[0, 0] = torch.nan
    return weight


BAD: dict[str, tuple[Callable[[Folder], None], str]] = {
    "truncated": (truncate, "model-00001-of-.* is truncated or no safetensors file"),
    "scrambled": (scramble, "model-00001-of-.* says that its header has"),
    "a shard gone": (lambda f: first(f).unlink(), "model-00001-of-.* is missing"),
    "a weight gone": (
        rewrite(lambda weights: weights.pop("model.embed_tokens.weight")),
        "lacks model.embed_tokens.weight",
    ),
    "a bias": (
        rewrite(lambda w: w.update({"model.layers.0.mlp.up_proj.bias": torch.ones(3)})),
        "holds model.layers.0.mlp.up_proj.bias, which this model does not have",
    ),
    "a shape": (embedding(lambda w: w[:-1]), "model.embed_tokens.weight is .*, expected "),
    "integers": (
        embedding(lambda w: w.to(torch.int8)),
        "embed_tokens.weight is of type torch.int8",
    ),
    "nan": (embedding(nan), "tok_embeddings.weight holds values that are not finite"),
    "too large": (embedding(lambda w: w * 1e6), "not finite in float16"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "no tokenizer.*--tokenizer"),
    "bad tokenizer": (
        lambda f: (f / "tokenizer.model").write_bytes(b"no"),
        "tokenizer.model is no SentencePiece model",
    ),
    "no json": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json .*object"),
    "another family": (change(model_type="qwen2"), "model_type is 'qwen2', only 'llama'"),
    "another activation": (change(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "quantised": (change(quantization_config={"bits": 4}), "quantization_config is"),
    "a word": (change(hidden_size="64"), "hidden_size is '64', expected a whole number"),
    "nothing": (change(hidden_size=None), "has no hidden_size"),
    "no heads": (change(num_attention_heads=0), "config.json: .*"),
    "fractions": (change(num_hidden_layers=1.5), "config.json: .*"),
    "wide heads": (change(head_dim=32), "head_dim is 32, expected 16"),
    "yarn": (change(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "'yarn'"),
    "a list of scaling": (change(rope_parameters=[1]), "rope"),
    "more layers": (change(num_hidden_layers=4), "lacks model.layers.3.* and 8 more weights"),
    "fewer layers": (change(num_hidden_layers=2), "holds model.layers.2.* and 8 more weights"),
}


@pytest.mark.parametrize(("spoil", "words"), BAD.values(), ids=BAD)
def test_bad_folders_are_one_sentence(
    exported: Folder, tmp_path: Path, spoil: Callable[[Folder], None], words: str
) -> None:
    spoil(exported)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words) as caught:
        convert(exported, tmp_path / "out", "meta", "--dtype", "float16")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
