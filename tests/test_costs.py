"""Parameters, FLOPs and bytes against values computed by hand."""

import math

import pytest

from llama import costs
from llama.config import ModelConfig
from llama.costs import Layout

# dim 2048, 24 layers, F = 5632 (2/3 of 8192 is 5461, up to the next 256)
LLAMA_1B = ModelConfig(dim=2048, n_layers=24, n_heads=16, vocab_size=32000)
LLAMA_7B = ModelConfig(dim=4096, n_layers=32, n_heads=32, vocab_size=32000)


def test_parameters_by_hand() -> None:
    block = 4 * 2048 * 2048 + 3 * 2048 * 5632
    head = 32000 * 2048
    assert costs.matmul_parameters(LLAMA_1B) == 24 * block + head == 1_298_661_376
    assert costs.parameters(LLAMA_1B) == 24 * block + 2 * head + 49 * 2048 == 1_364_297_728


def test_grouped_heads_and_a_width_of_its_own() -> None:
    cfg = ModelConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, ffn_dim=100, vocab_size=10)
    # wq and wo are 64 x 64, wk and wv 64 x 16
    assert costs.matmul_parameters(cfg) == 2 * (2 * 4096 + 2 * 1024 + 3 * 6400) + 640
    assert costs.parameters(cfg) == costs.matmul_parameters(cfg) + 640 + 5 * 64


@pytest.mark.parametrize(
    ("cfg", "seq_len", "causal", "palm"),
    [
        (LLAMA_1B, 2048, 8_395_948_032, 8_999_927_808),
        (LLAMA_1B, 4096, 8_999_927_808, 10_207_887_360),
        (LLAMA_7B, 2048, 41_253_076_992, 42_863_689_728),
    ],
)
def test_flops_per_token(cfg: ModelConfig, seq_len: int, causal: int, palm: int) -> None:
    assert costs.flops_per_token(cfg, seq_len) == (causal, palm)


def test_flops_of_7b_by_hand() -> None:
    matmul = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    attention = 32 * 2048 * 4096
    assert costs.flops_per_token(LLAMA_7B, 2048) == (
        6 * matmul + 6 * attention,
        6 * matmul + 12 * attention,
    )


def test_checkpoint_holds_weights_and_two_moments() -> None:
    assert costs.checkpoint_bytes(LLAMA_7B) == 12 * 6_738_415_616


def test_activations_by_hand() -> None:
    cfg = ModelConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, ffn_dim=100, vocab_size=10)
    # 64 each: inputs and outputs of two norms, q, attention's output; 16 of k and of v; 3 F; and a
    # float32 a head and a norm
    assert costs.kept_by_block(cfg, Layout(1), "none") == 2 * (6 * 64 + 2 * 16 + 300) + 4 * 10
    assert costs.kept_by_block(cfg, Layout(1, element_bytes=4), "full") == 4 * 64


@pytest.mark.parametrize(("mode", "d", "f"), [("none", 16, 6), ("manual", 12, 4)])
def test_activations_of_7b_are_those_of_the_text_books(mode: str, d: int, f: int) -> None:
    sums = 4 * (32 + 2 * (mode == "none"))
    assert costs.kept_by_block(LLAMA_7B, Layout(1), mode) == d * 4096 + f * 11008 + sums


def test_a_tensor_group_divides_all_matrices_and_no_gain() -> None:
    whole, part = costs.shapes(LLAMA_7B), costs.shapes(LLAMA_7B, 8)
    for name, all_of_it in (whole[0] | whole[1]).items():
        eighth = (part[0] | part[1])[name]
        assert math.prod(all_of_it) == math.prod(eighth) * (1 if all_of_it[1] == 1 else 8)


def test_shares_of_a_weight_are_whole_rows() -> None:
    # 13B over 2,048 processes: 5,120 rows are 3 for the first of them, not 2.5
    cfg = ModelConfig(dim=5120, n_layers=40, n_heads=40, vocab_size=32000)
    share = costs.memory(cfg, costs.Layout(2048, shard=2048))["update"]["parameters"] / 4
    block = 4 * 3 * 5120 + 2 * 7 * 5120 + 3 * 13824 + 2 * 3
    assert share == 40 * block + 2 * 16 * 5120 + 3


def test_chips() -> None:
    assert costs.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert costs.peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert costs.peak_flops("NVIDIA H200") == 989.4e12
    # another board, another clock: not guessed
    assert costs.peak_flops("NVIDIA H100 PCIe") is None
    assert costs.peak_flops("NVIDIA GeForce RTX 4090") is None
