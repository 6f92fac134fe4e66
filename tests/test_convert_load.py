"""Weights of any format into a model, whole or sharded; and what is no format."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
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
from llama.corpus import guard
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


# -- files made to harm ----------------------------------------------------------------------------


def safetensors(header: object, body: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def pth(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def packed(pickled: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.save writes, of any bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", "3\n")
    return file.getvalue()


class Payload:
    """Pickled, it makes a file when it is read."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.sentinel),)


def hostile(place: Path, sentinel: Path) -> Iterator[tuple[str, str, bytes]]:
    """(format, file of it, bytes that replace it)."""
    good = (place / "hf/model.safetensors.index.json").read_bytes()
    shard = json.loads(good)["weight_map"]["model.norm.weight"]
    data = (place / "hf" / shard).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:end]), data[end:]
    (first, second), whole = [name for name in header if name != "__metadata__"][:2], len(body)

    def edited(name: str, **facts: object) -> bytes:
        return safetensors({**header, name: header[name] | facts}, body)

    for content in (
        *(safetensors(header, body, size) for size in (2**63, 2**64 - 1, 2**40)),
        # a million weights that no model has
        safetensors(b'{"%s": 0}' % (b"x" * 60_000_000)),
        edited(second, data_offsets=header[first]["data_offsets"]),
        edited(first, data_offsets=[-1, 5]),
        edited(first, data_offsets=[whole, 0]),
        edited(first, data_offsets=[0, 2**63]),
        edited(first, shape=[2**62, 2**62]),
        safetensors(b"[" * 100_000),
        safetensors(b'{"a":' * 100_000),
        b"",
        b"\1\2",
    ):
        yield "hf", shard, content
    facts = json.loads((place / "hf/config.json").read_bytes())
    for content in (b"[" * 100_000, b'{"a":' * 100_000, b"[1]", b"\xff", b'{"hidden_size": NaN}'):
        yield "hf", "config.json", content
        yield "meta", "params.json", content
    for key, values in {
        "num_hidden_layers": [2**31, 10**18, 0, -1, True, "x"],
        "vocab_size": [2**62, 10**18, -1],
        "intermediate_size": [2**62, 1.5],
        "max_position_embeddings": [0, -1],
    }.items():
        for value in values:
            yield "hf", "config.json", json.dumps({**facts, key: value}).encode()
    for name in ("../x.safetensors", "/etc/passwd", ".", 5, None, [1], "x" * 5000, "a\0b"):
        index = json.dumps({"weight_map": {"model.norm.weight": name}})
        yield "hf", "model.safetensors.index.json", index.encode()
    params = json.loads((place / "meta/params.json").read_bytes())
    for value in (2**31, 10**18, 0):
        yield "meta", "params.json", json.dumps({**params, "n_layers": value}).encode()
    weights = torch.load(place / "meta/consolidated.00.pth", weights_only=True)
    norm = torch.ones(48)
    for content in (
        pth({"a": Payload(sentinel)}),
        pickle.dumps({"a": Payload(sentinel)}),
        packed(pickle.dumps(Payload(sentinel))),
        packed(b"\x80\x02" + bytes(1 << 28), zipfile.ZIP_DEFLATED),
        # a place of the memo that was never filled, and a number cut off
        packed(b"\x80\x02r\xff\xff\xff\x7f."),
        packed(b"\x80\x02\x8a\xff."),
        packed(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
        pth([1]),
        pth({**weights, "norm.weight": norm.to_sparse()}),
        pth({**weights, "norm.weight": norm.to("meta")}),
        pth({**weights, "norm.weight": norm[:1].expand(10**12)}),
        pth({**weights, 1: norm}),
        b"",
        os.urandom(5000),
    ):
        yield "meta", "consolidated.00.pth", content


@pytest.mark.faults
def test_weights_made_to_harm_are_refused(
    place: Path, tmp_path: Path, rng: random.Random, scale: Callable[[int, int], int], score
) -> None:
    """In a child with a deadline and a bound on its memory: refused, or read as they are."""
    cases = list(hostile(place, tmp_path / "escaped"))
    must = len(cases)
    for number in range(scale(20, 400)):
        kind, name = rng.choice([("meta", "consolidated.00.pth"), ("hf", "model.safetensors")])
        path = next((place / kind).glob(name.replace(".safetensors", "-*.safetensors")))
        data = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(2000) if number % 3 else -1 - rng.randrange(2000)
            data[at] ^= 1 << rng.randrange(8)
        cases.append((kind, path.name, bytes(data)))

    def read(number: int) -> str:
        kind, name, data = cases[number]
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in (place / kind).iterdir():
            (folder / path.name).symlink_to(path)
        (folder / name).unlink()
        (folder / name).write_bytes(data)
        try:
            source = load.open_source(folder)
            for weight in source.shapes:
                source.read(weight).clone()
        except UserError as error:
            return str(error)
        return ""

    numbers = range(len(cases))
    answers = guard.each(read, numbers, 60.0, memory_bytes=2 << 30)
    wrong = [
        (cases[n][0], cases[n][1], cases[n][2][:40], answer)
        for n, answer in enumerate(answers)
        if not isinstance(answer, str) or "\n" in answer or (n < must and not answer)
    ]
    score("hostile", len(cases), ">= 80")
    score("hostile.harm", len(wrong) + (tmp_path / "escaped").exists(), "0")
    assert not wrong and not (tmp_path / "escaped").exists()
