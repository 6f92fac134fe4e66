"""The table of names, and the order of rows that goes with it."""

import random

import pytest
import torch
from made_convert import SHAPES

from llama.config import ModelConfig
from llama.convert import names
from llama.model import Transformer


def test_every_parameter_has_a_name_of_its_own_in_each_format() -> None:
    cfg = ModelConfig(dim=32, n_layers=11, n_heads=2, vocab_size=10)
    with torch.device("meta"):
        ours = [name for name, _ in Transformer(cfg).named_parameters()]
    assert list(names.shapes(cfg)) == ours and len(ours) == 11 * 9 + 3
    for translate in (names.hf, names.gguf):
        assert len({translate(name) for name in ours}) == len(ours)
    assert names.hf("layers.10.attention.wq.weight") == "model.layers.10.self_attn.q_proj.weight"
    assert names.gguf("output.weight") == "output.weight"


def test_names_of_gguf_are_those_of_its_package() -> None:
    gguf = pytest.importorskip("gguf")
    cfg = ModelConfig(dim=32, n_layers=3, n_heads=2, vocab_size=10)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, cfg.n_layers)
    for name in names.shapes(cfg):
        # it knows the names of Meta's code, which are ours, as well as Hugging Face's
        for theirs in (name, names.hf(name)):
            assert known.get_name(theirs, try_suffixes=(".weight",)) == names.gguf(name)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_of_rotary_weights_move_and_come_back(
    shape: dict[str, object], rng: random.Random
) -> None:
    cfg = ModelConfig(**shape, vocab_size=10)  # type: ignore[arg-type]
    torch.manual_seed(rng.randrange(2**31))
    D = cfg.head_dim
    for name, size in names.shapes(cfg).items():
        weight = torch.randn(size)
        moved = names.halves(name, weight, cfg)
        assert torch.equal(names.neighbours(name, moved, cfg), weight)
        if not name.endswith(("wq.weight", "wk.weight")):
            assert torch.equal(moved, weight)
            continue
        for row in range(size[0]):
            head, feature = divmod(row, D)
            pair, second = divmod(feature, 2)
            assert torch.equal(moved[head * D + pair + second * (D // 2)], weight[row])
