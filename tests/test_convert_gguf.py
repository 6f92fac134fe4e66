"""GGUF files, read by the package gguf."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_convert import SHAPES, convert, make_run, without_transformers

from llama.cli import UserError
from llama.convert import gguf, load, names
from tokenizer.tokenizer import Tokenizer

library = pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with without_transformers():
        yield


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_settings_and_pieces(
    shape: str, dtype: str, tmp_path: Path, rng: random.Random
) -> None:
    run = make_run(tmp_path, rng, **SHAPES[shape])
    convert(run, tmp_path / "model.gguf", "gguf", "--dtype", dtype, "--license", "mit")
    reader, source = library.GGUFReader(tmp_path / "model.gguf"), load.open_source(run)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert set(stored) - {"rope_freqs.weight"} == {names.gguf(name) for name in source.shapes}
    for name in source.shapes:
        tensor = stored[names.gguf(name)]
        weight = source.read(name)
        kind = "F32" if weight.dim() == 1 else gguf.TENSOR_TYPES[getattr(torch, dtype)]
        assert tensor.tensor_type.name == kind
        found = torch.from_numpy(library.dequantize(tensor.data, tensor.tensor_type).copy())
        expected = weight if weight.dim() == 1 else weight.to(getattr(torch, dtype)).float()
        assert torch.equal(found.view(weight.shape), expected), name

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    cfg = source.cfg
    assert value("general.architecture") == "llama" and value("general.license") == "mit"
    assert value("llama.attention.head_count_kv") == cfg.kv_heads
    assert value("llama.attention.layer_norm_rms_epsilon") == np.float32(cfg.norm_eps)
    assert value("llama.context_length") == 64
    assert value("llama.rope.freq_base") == cfg.rope_theta
    assert ("llama.rope.scaling.factor" in reader.fields) == (shape == "linear")
    if shape == "llama3":
        factors = stored["rope_freqs.weight"].data
        assert factors[0] == 1 and factors[-1] == 8 and len(factors) == cfg.head_dim // 2
        assert np.all(np.diff(factors) >= 0)
    tokenizer = Tokenizer(tmp_path / "tokens/tokenizer.model")
    assert len(value("tokenizer.ggml.tokens")) == tokenizer.vocab_size
    kinds = value("tokenizer.ggml.token_type")
    assert kinds[:4] == [2, 3, 3, 6] and kinds[-1] == 1
    scores = value("tokenizer.ggml.scores")
    assert scores[259] == 0 and scores[260] == -1
    assert value("tokenizer.ggml.bos_token_id") == 1 and value("tokenizer.ggml.add_bos_token")
    assert not value("tokenizer.ggml.add_eos_token") and value("tokenizer.ggml.add_space_prefix")


def test_without_the_package_one_sentence_says_how_to_get_it(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, rng, **SHAPES["plain"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'llama-pretraining\[convert\]'"):
        convert(run, tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()
