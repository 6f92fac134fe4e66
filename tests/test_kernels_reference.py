"""The plain operations against their formulas in float64, gradients by finite differences."""

import math
import random

import pytest
import torch
from torch import Tensor

from kernels import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded(rng: random.Random) -> None:
    torch.manual_seed(rng.randrange(2**31))


def error(result: Tensor, truth: Tensor) -> float:
    """Largest error in units of the truth's largest magnitude."""
    return float((result.double() - truth).abs().max() / truth.abs().max())


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def test_rms_norm_and_its_gradients_are_those_of_the_formula() -> None:
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        reference.rms_norm(x, weight, 1e-5), plain_norm(x, weight, 1e-5), rtol=1e-12, atol=1e-12
    )
    assert torch.autograd.gradcheck(lambda x, w: reference.rms_norm(x, w, 1e-2), (x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_computes_in_float32_at_least(dtype: torch.dtype) -> None:
    x = (100 * torch.randn(4, 512)).to(dtype)
    weight = torch.randn(512).to(dtype)
    out = reference.rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    # bfloat16: the rounding of the result alone. Wider types round at every operation, and the
    # float64 truth does too: root, reciprocal, two products and the sum of squares, on both sides.
    roundings = 2 if dtype == torch.bfloat16 else 10
    truth = plain_norm(x.double(), weight.double(), 1e-5)
    assert error(out, truth) <= roundings * torch.finfo(dtype).eps


def test_swiglu_is_silu_times_up() -> None:
    gate, up = torch.randn(2, 3, 7, dtype=torch.float64)
    truth = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(reference.swiglu(gate, up), truth)


def turned(x: Tensor, frequencies: Tensor, first: int = 0) -> Tensor:
    """RoPE by two-by-two matrices, one number at a time."""
    out = torch.empty_like(x)
    for t in range(x.shape[1]):
        for i, frequency in enumerate(frequencies.tolist()):
            angle = torch.tensor((first + t) * frequency, dtype=x.dtype)
            x0, x1 = x[:, t, :, 2 * i], x[:, t, :, 2 * i + 1]
            out[:, t, :, 2 * i] = x0 * angle.cos() - x1 * angle.sin()
            out[:, t, :, 2 * i + 1] = x0 * angle.sin() + x1 * angle.cos()
    return out


def test_rope_turns_neighbouring_pairs() -> None:
    frequencies = reference.rope_frequencies(8, 10000.0)
    torch.testing.assert_close(
        frequencies, 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float32) / 8)
    )
    table = reference.rope_table(12, frequencies)
    x = torch.randn(2, 9, 3, 8, dtype=torch.float64)
    out = reference.rope(x, table[3:])
    torch.testing.assert_close(out, turned(x, frequencies, 3), rtol=1e-5, atol=1e-5)
    assert reference.rope(x.bfloat16(), table[3:]).dtype == torch.bfloat16


def test_rope_makes_scores_depend_on_distance_only() -> None:
    table = reference.rope_table(600, reference.rope_frequencies(32, 10000.0))
    q, k = torch.randn(2, 1, 1, 4, 32).expand(2, 1, 5, 4, 32)
    scores = [
        (reference.rope(q, table[s : s + 5]) * reference.rope(k, table[s + 7 : s + 12])).sum(-1)
        for s in (0, 3, 570)
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[0], scores[2], rtol=1e-4, atol=1e-3)


LLAMA3: dict[str, str | float] = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_frequency(frequency: float) -> float:
    """Llama 3.1 as its authors write it, in wavelengths."""
    wavelength = 2 * math.pi / frequency
    if wavelength < 8192 / 4:
        return frequency
    if wavelength > 8192:
        return frequency / 8
    smooth = (8192 / wavelength - 1) / (4 - 1)
    return (1 - smooth) * frequency / 8 + smooth * frequency


def test_rope_scaling() -> None:
    plain = reference.rope_frequencies(128, 500000.0)
    linear = reference.rope_frequencies(128, 500000.0, {"type": "linear", "factor": 4.0})
    torch.testing.assert_close(linear, plain / 4)
    llama3 = reference.rope_frequencies(128, 500000.0, LLAMA3)
    truth = torch.tensor([llama3_frequency(f) for f in plain.tolist()])
    torch.testing.assert_close(llama3, truth)
    # all three ranges were reached
    ratio = plain / llama3
    assert (ratio == 1).any() and (ratio == 8).any() and ((ratio > 1.01) & (ratio < 7.9)).any()


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"type": "yarn", "factor": 2.0}, "'yarn'"),
        ({"factor": 2.0}, "None"),
        ({"type": "linear"}, "factor"),
        ({"type": "linear", "factor": 0.0}, "factor is 0.0"),
        ({"type": "linear", "factor": "two"}, "factor is 'two'"),
        ({**LLAMA3, "low_freq_factor": -1.0}, "low_freq_factor is -1.0"),
    ],
)
def test_bad_rope_scaling_is_refused(scaling: dict[str, str | float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reference.rope_frequencies(8, 10000.0, scaling)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None) -> Tensor:
    """One query and one head at a time, in float64."""
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty(B, T, H, D, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            p = S - T + t
            seen = [s for s in range(p + 1) if doc_ids is None or doc_ids[b, s] == doc_ids[b, p]]
            for h in range(H):
                kv = h // (H // K)
                weights = torch.softmax(k[b, seen, kv] @ q[b, t, h] / math.sqrt(D), 0)
                out[b, t, h] = weights @ v[b, seen, kv]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("T", "S", "H", "K"), [(9, 9, 4, 4), (1, 6, 4, 2), (5, 8, 6, 1)])
def test_attention(dtype: torch.dtype, documents: bool, T: int, S: int, H: int, K: int) -> None:
    q = torch.randn(2, T, H, 8).to(dtype)
    k, v = torch.randn(2, 2, S, K, 8).to(dtype)
    doc_ids = torch.randint(0, 2, (2, S)).cumsum(1) if documents else None
    out = reference.attention(q, k, v, doc_ids)
    assert out.dtype == dtype
    # bfloat16: the rounding of the result alone. Wider types round scores of up to 8 or so at each
    # of 8 products, and their absolute error becomes a weight's relative one: 4 eps in 9,000 cases.
    roundings = 2 if dtype == torch.bfloat16 else 16
    assert error(out, plain_attention(q, k, v, doc_ids)) <= roundings * torch.finfo(dtype).eps
