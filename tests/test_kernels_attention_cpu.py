"""Causal attention in blocks on a CPU: equal to the reference at every edge of its blocks."""

import random

import pytest
import torch
from torch import Tensor

from kernels import attention as kernel
from kernels import attention_cpu

# What sums in another order may differ by, in units of the largest magnitude; in bfloat16 the
# kernel rounds the attention weights as well.
ROUNDING = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 0.02}


@pytest.fixture(autouse=True)
def seeded(rng: random.Random) -> None:
    torch.manual_seed(rng.randrange(2**31))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """T of every call that is made in blocks."""
    seen = []

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q.shape[2])
        return blocks(q, k, v)

    blocks = attention_cpu.causal_attention
    monkeypatch.setattr(attention_cpu, "causal_attention", spy)
    return seen


def inputs(T: int, H: int, K: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v, and the gradient of the output."""
    return [torch.randn(2, T, heads, D).to(dtype) for heads in (H, K, K, H)]


def run(tensors: list[Tensor], backend: str, wanted: str = "qkv") -> list[Tensor]:
    *tensors, grad = tensors
    leaves = {
        name: x.detach().requires_grad_(name in wanted)
        for name, x in zip("qkv", tensors, strict=True)
    }
    out = kernel.attention(*leaves.values(), backend=backend)
    return [out.detach(), *torch.autograd.grad(out, [leaves[n] for n in wanted], grad)]


def error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("T", [256, 257, 383, 384, 385, 511, 576, 767])
def test_blocks_are_as_exact_as_the_formula(
    T: int, heads: tuple[int, int], dtype: torch.dtype, calls: list[int]
) -> None:
    tensors = inputs(T, *heads, 24, dtype)
    truth = run([x.double() for x in tensors], "reference")
    result = run(tensors, "sdpa")
    assert calls == [T]
    for ours, peer, exact in zip(result, run(tensors, "reference"), truth, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert error(ours, exact) <= 2 * error(peer, exact) + ROUNDING[dtype]


@pytest.mark.parametrize("T", [255, 768])
def test_other_lengths_are_left_to_torch(T: int, calls: list[int]) -> None:
    run(inputs(T, 2, 2, 8, torch.float32), "sdpa")
    assert not calls


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv"])
def test_gradients_of_some_inputs_only(wanted: str, calls: list[int]) -> None:
    tensors = inputs(400, 4, 2, 16, torch.float64)
    results = zip(run(tensors, "sdpa", wanted), run(tensors, "reference", wanted), strict=True)
    for ours, exact in results:
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    assert calls == [400]


@pytest.mark.parametrize("which", ["inputs", "gradient", "constant gradient"])
def test_tensors_that_are_not_contiguous(which: str) -> None:
    tensors = inputs(300, 2, 2, 16, torch.float64)
    if which == "constant gradient":
        # as the backward pass of a sum makes it: one number, seen at every place
        tensors[3] = torch.ones((), dtype=torch.float64).expand(tensors[3].shape)
    for i in range(3) if which == "inputs" else [3] if which == "gradient" else []:
        tensors[i] = torch.stack((tensors[i], torch.randn_like(tensors[i])), dim=-1)[..., 0]
        assert tensors[i].stride(-1) == 2
    for ours, exact in zip(run(tensors, "sdpa"), run(tensors, "reference"), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
