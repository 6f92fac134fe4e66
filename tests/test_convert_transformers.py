"""Parity with transformers, in both directions: logits, loss, every gradient, and token ids.

transformers runs in one process of its own, started outside the repository root: with our root on
its path it would take our package `kernels` for another one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from made_convert import SHAPES, convert, edit_json, fresh_rng, fuzz, make_run, without_transformers
from safetensors.torch import load_file
from torch import Tensor

from llama import files
from llama.config import ModelConfig
from llama.convert import check, load, names
from llama.convert.source import Source
from llama.data.shards import open_sources
from llama.model import Transformer
from tokenizer.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
    ),
]

LOGITS, GRADIENTS = 1e-5, 1e-4
IGNORED = -100
# transformers reads GGUF with accelerate's help, and passes over RoPE scaling in it.
READS_GGUF = all(importlib.util.find_spec(name) for name in ("gguf", "accelerate"))
GGUF = [name for name in SHAPES if "rope_scaling" not in SHAPES[name]] if READS_GGUF else []

THEIRS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

place = Path(sys.argv[1])
asked = json.loads((place / "asked.json").read_bytes())
tokens, targets = torch.tensor(asked["tokens"]), torch.tensor(asked["targets"])

def answer(model, name):
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    found = {"logits": logits.detach(), "loss": loss.detach()}
    found |= {"grad." + key: p.grad for key, p in model.named_parameters()}
    save_file({key: value.contiguous() for key, value in found.items()}, place / name)

def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, **options)

for name, shape in asked["shapes"].items():
    answer(loaded(place / name / "hf"), f"{name}/exported.safetensors")
    torch.manual_seed(asked["seed"])
    model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.mul_(6)
    model.save_pretrained(place / name / "theirs", max_shard_size="100KB")
    answer(model, f"{name}/theirs.safetensors")
for name in asked["gguf"]:
    answer(loaded(place / name, gguf_file="model.gguf"), f"{name}/gguf.safetensors")
tokenizer = AutoTokenizer.from_pretrained(place / asked["tokenizer"])
ids = {key: tokenizer(text).input_ids for key, text in asked["texts"].items()}
(place / "ids.json").write_text(json.dumps(ids))
texts = {key: tokenizer.decode(value, skip_special_tokens=True) for key, value in ids.items()}
(place / "texts.json").write_text(json.dumps(texts))
"""


def their_config(cfg: ModelConfig) -> dict[str, Any]:
    scaling = cfg.rope_scaling and {"rope_type": cfg.rope_scaling["type"], **cfg.rope_scaling}
    return {
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.kv_heads,
        "intermediate_size": cfg.hidden_dim,
        "vocab_size": cfg.vocab_size,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": 128,
    }


@dataclass
class Place:
    """A folder per shape with our run and exports, and everything transformers answered."""

    folder: Path
    tokens: Tensor
    targets: Tensor

    def run(self, shape: str) -> Path:
        return self.folder / shape / "runs/run"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder, rng = tmp_path_factory.mktemp("parity"), fresh_rng()
    configs = {}
    with without_transformers():
        for name, shape in SHAPES.items():
            run = make_run(folder / name, rng, **shape)
            convert(run, folder / name / "hf", "hf", shard_bytes=100_000)
            if name in GGUF:
                convert(run, folder / name / "model.gguf", "gguf")
            configs[name] = load.open_source(run).cfg
    vocabulary = min(cfg.vocab_size or 0 for cfg in configs.values())
    torch.manual_seed(rng.randrange(2**31))
    tokens = torch.randint(vocabulary, (2, 64))
    targets = torch.randint(vocabulary, (2, 64))
    targets[torch.rand(2, 64) < 0.2] = IGNORED
    first = folder / next(iter(SHAPES))
    documents = json.loads((first / "web.json").read_text())
    fuzzed = fuzz(Tokenizer(first / "tokens/tokenizer.model"), 2000, rng)
    asked = {
        "seed": rng.randrange(2**31),
        "tokens": tokens.tolist(),
        "targets": targets.tolist(),
        "shapes": {name: their_config(cfg) for name, cfg in configs.items()},
        "gguf": GGUF,
        "tokenizer": f"{first.name}/hf",
        "texts": documents | {f"fuzz {i}": text for i, text in enumerate(fuzzed)},
    }
    files.write_json(folder / "asked.json", asked)
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    kept = os.pathsep.join(p for p in paths if Path(p).resolve() != check.ROOT)
    result = subprocess.run(
        [sys.executable, "-P", "-c", THEIRS, str(folder)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": kept, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return Place(folder, tokens, targets)


def compare(source: Source, place: Place, answer: str) -> None:
    """Our model with these weights against what transformers computed."""
    model = Transformer(source.cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.read(name))
    theirs = load_file(place.folder / answer)
    logits = model(place.tokens)
    scale = max(1.0, float(theirs["logits"].abs().max()))
    assert (logits - theirs["logits"]).abs().max() < LOGITS * scale
    losses, counts = model(place.tokens, place.targets)
    loss = losses.sum() / counts.sum()
    torch.testing.assert_close(loss, theirs["loss"], rtol=GRADIENTS, atol=0)
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = theirs[f"grad.{names.hf(name)}"]
        assert parameter.grad is not None
        found = names.halves(name, parameter.grad, source.cfg)
        assert expected.norm() > 0
        assert (found - expected).norm() < GRADIENTS * expected.norm(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_our_weights_in_their_model(place: Place, shape: str) -> None:
    compare(load.open_source(place.run(shape)), place, f"{shape}/exported.safetensors")


@pytest.mark.parametrize("shape", SHAPES)
def test_their_weights_in_our_model(place: Place, shape: str) -> None:
    source = load.open_source(place.folder / shape / "theirs")
    assert source.cfg.rope_scaling == SHAPES[shape].get("rope_scaling")
    compare(source, place, f"{shape}/theirs.safetensors")


@pytest.mark.parametrize("shape", GGUF)
def test_gguf_in_their_model(place: Place, shape: str) -> None:
    compare(load.open_source(place.run(shape)), place, f"{shape}/gguf.safetensors")


def test_ids_of_documents_are_those_in_the_windows(place: Place) -> None:
    """transformers' tokenizer on a document's text: BOS and the ids that were trained on."""
    first = place.folder / next(iter(SHAPES))
    ids = json.loads((place.folder / "ids.json").read_text())
    documents = [tuple([*found, 2]) for key, found in ids.items() if key.startswith("web/")]
    source = open_sources(first / "tokens", ["web"])["web"]
    length, found, document = 64, [], []
    for window in range(source.n_windows(length)):
        # a window's last token is the next one's first
        for token in source.read(window * length, length).tolist():
            document.append(token)
            if token == source.eos_id:
                found.append(tuple(document))
                document = []
    assert len(found) > 30
    assert set(found) <= set(documents)
    assert all(each[0] == 1 and each.count(1) == 1 for each in found)


def test_ids_and_texts_are_those_of_sentencepiece(place: Place) -> None:
    asked = json.loads((place.folder / "asked.json").read_text())
    ids = json.loads((place.folder / "ids.json").read_text())
    texts = json.loads((place.folder / "texts.json").read_text())
    first = place.folder / next(iter(SHAPES))
    tokenizer = Tokenizer(first / "tokens/tokenizer.model")
    for key, text in asked["texts"].items():
        assert ids[key] == [tokenizer.bos_id, *tokenizer.encode(text)], repr(text)
        assert texts[key] == tokenizer.decode(ids[key]), repr(text)


def test_the_command_asks_transformers(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.run("grouped")
    convert(run, place.folder / "asked", "hf", "--dtype", "bfloat16")
    assert "checked by transformers" in capsys.readouterr().out
    edit_json(place.folder / "asked/config.json", rms_norm_eps=1e-3)
    with pytest.raises(ValueError, match="logits differ"):
        source = load.open_source(run).cast(torch.bfloat16)
        check.hf(source, place.folder / "asked", source.open_tokenizer())
