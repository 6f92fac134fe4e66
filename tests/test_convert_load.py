"""Weights of any format into a model, whole or sharded; and what is no format."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_convert import (
    SHAPES,
    convert,
    fresh_rng,
    make_run,
    random_model,
    weights_of,
    without_transformers,
)

from llama import generate
from llama.cli import UserError
from llama.convert import load
from llama.convert.load import load_weights
from llama.model import Transformer
from llama.runtime import checkpoint, world

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its export in every format that is read."""
    place = tmp_path_factory.mktemp("place")
    run = make_run(place, fresh_rng(), **SHAPES["plain"])
    with without_transformers():
        convert(run, place / "hf", "hf", shard_bytes=60_000)
        convert(place / "hf", place / "meta", "meta")
        convert(place / "meta", place / "native", "native")
    return place


@pytest.fixture
def here() -> Iterator[world.World]:
    yield world.start()
    world.stop()


SOURCES = ["runs/run", "runs/run/ckpt/step-00000005", "hf", "meta", "native"]


@pytest.mark.parametrize("source", SOURCES)
def test_every_format_fills_a_model(
    place: Path, source: str, here: world.World, rng: random.Random
) -> None:
    original = load.open_source(place / "runs/run")
    model = random_model(original.cfg, rng)
    sha256 = str(original.tokenizer_sha256)
    line = load_weights(place / source, dict(model.named_parameters()), here, sha256)
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, original.read(name)), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert source.split("/")[0] in line


def test_what_was_converted_to_native_is_a_run(place: Path, tmp_path: Path) -> None:
    """llama.generate takes it, with the tokenizer that was put beside it."""
    model, tokenizer, context = generate.load(place / "native")
    assert tokenizer.path == place / "native/tokenizer/tokenizer.model"
    original = load.open_source(place / "runs/run")
    for name, weight in weights_of(model).items():
        assert torch.equal(weight.float().cpu(), original.read(name).to(weight.dtype).float())
    step = checkpoint.newest(place / "native")
    assert step.name == "step-00000000" and checkpoint.damage(step) is None
    # and it can be moved
    (place / "native").rename(tmp_path / "moved")
    try:
        moved = load.open_source(tmp_path / "moved")
        assert moved.open_tokenizer(None).sha256 == tokenizer.sha256
    finally:
        (tmp_path / "moved").rename(place / "native")


def without_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["norm.weight"]


def with_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["output.bias"] = torch.zeros(3)


def wider(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"] = torch.zeros(49)


@pytest.mark.parametrize("source", ["runs/run", "hf", "meta"])
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without_norm, "holds norm.weight, which this model does not have"),
        (with_bias, "lacks output.bias"),
        (wider, "norm.weight is 48, expected 49"),
    ],
)
def test_another_model_is_refused(
    place: Path,
    source: str,
    here: world.World,
    edit: Callable[[dict[str, torch.Tensor]], None],
    words: str,
) -> None:
    original = load.open_source(place / source)
    tensors = weights_of(Transformer(original.cfg))
    edit(tensors)
    sha256 = str(load.open_source(place / "runs/run").tokenizer_sha256)
    with pytest.raises(UserError, match=f"^train.init_from: {place / source}.*{words}"):
        load_weights(place / source, tensors, here, sha256)


def test_another_tokenizer_is_refused(place: Path, here: world.World) -> None:
    tensors = weights_of(Transformer(load.open_source(place / "hf").cfg))
    with pytest.raises(UserError, match="trained with another tokenizer"):
        load_weights(place / "runs/run", tensors, here, "0" * 64)


def test_a_changed_byte_is_found(place: Path, tmp_path: Path, here: world.World) -> None:
    run = Path(shutil.copytree(place / "runs/run", tmp_path / "run"))
    file = next(run.glob("ckpt/*/__0_0.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    tensors = weights_of(Transformer(load.open_source(place / "hf").cfg))
    with pytest.raises(UserError, match="damaged: the content of __0_0.distcp has changed"):
        load_weights(run, tensors, here, "")
    with pytest.raises(UserError, match="damaged: the content of __0_0.distcp has changed"):
        load.open_source(run)


def test_reading_one_weight_needs_no_other(place: Path) -> None:
    """A source reads when asked, and what it read is not tied to the file."""
    source = load.open_source(place / "meta")
    weight = source.cast(torch.bfloat16).read("norm.weight")
    assert weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match="not finite in float16"):
        large = replace(source, read=lambda name: torch.full((3,), 1e5))
        large.cast(torch.float16).read("norm.weight")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "is of no known format: expected a run"),
        (lambda p: p.write_text("hello"), "is a file: name the folder"),
        (lambda p: (p / "ckpt").mkdir(parents=True), "holds no complete checkpoint"),
        (
            lambda p: [p.mkdir(), (p / "config.json").write_text("{}")],
            "has config.json, but neither model.safetensors nor",
        ),
    ],
)
def test_what_is_no_format(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "source")
    with pytest.raises(UserError, match=words):
        load.open_source(tmp_path / "source")
    (tmp_path / "a.gguf").touch()
    with pytest.raises(UserError, match="GGUF file: these are written, not read"):
        load.open_source(tmp_path / "a.gguf")


SHARDED = """
import sys
import torch
from torch.distributed.tensor import DTensor
from llama.config import Config, Count, TrainConfig
from llama.convert import load
from llama.model import Transformer
from llama.parallel import apply, fsdp
from llama.runtime import world

def main():
    here = world.start()
    truth = load.open_source(sys.argv[1])
    with torch.device("meta"):
        model = Transformer(truth.cfg)
    cfg = Config(model=truth.cfg, train=TrainConfig(batch_tokens=Count(3 * 256)))
    apply.apply(model, cfg, fsdp.place(cfg.parallel, "cpu"), torch.float32)
    for source in sys.argv[2:]:
        model.to_empty(device=here.device)
        parameters = dict(model.named_parameters())
        assert all(isinstance(p, DTensor) for p in parameters.values())
        load.load_weights(source, parameters, here, truth.tokenizer_sha256)
        for name, parameter in parameters.items():
            assert torch.equal(parameter.full_tensor().cpu(), truth.read(name)), (source, name)
    here.say(f"loaded {len(sys.argv) - 2}")


# in a function: meshes that outlive the process group abort the interpreter's end now and then
main()
world.stop()
"""


@pytest.mark.slow
def test_every_format_fills_a_sharded_model(place: Path, tmp_path: Path) -> None:
    """Three processes: neither 392 pieces nor 256 features divide evenly."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    sources = [str(place / source) for source in ("runs/run", *SOURCES)]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3",
         str(script), *sources],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"loaded {len(SOURCES)}" in result.stdout
