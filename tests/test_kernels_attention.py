"""Backends of causal attention: equal to the reference, and clear about what they refuse."""

import random
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels import attention as kernel
from kernels import reference


@pytest.fixture(autouse=True)
def seeded(rng: random.Random) -> None:
    torch.manual_seed(rng.randrange(2**31))


def run(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, backend: str) -> list[Tensor]:
    """Output and gradients under a fixed, uneven weighting of the outputs."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = kernel.attention(q, k, v, doc_ids, backend)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), (q, k, v))]


@pytest.mark.parametrize("documents", ["none", "ids", "mask"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (17, 17, 4, 4), (127, 127, 8, 2), (5, 40, 4, 1)])
@pytest.mark.parametrize("D", [8, 32, 80])
def test_sdpa_equals_the_reference(documents: str, shape: tuple[int, ...], D: int) -> None:
    T, S, H, K = shape
    # as the model has it: a slice of something larger, not contiguous
    q = torch.randn(2, T, H, D + 3, dtype=torch.float64)[..., :D]
    k, v = torch.randn(2, 2, S + 5, K, D, dtype=torch.float64)[:, :, :S]
    doc_ids: Tensor | None = None
    if documents != "none":
        doc_ids = (torch.rand(2, S) < 0.1).cumsum(1)
    given = doc_ids
    if documents == "mask":
        assert doc_ids is not None
        given = kernel.document_mask(doc_ids, T, "sdpa", q.dtype)
    result = run(q, k, v, given, "sdpa")
    for ours, exact in zip(result, run(q, k, v, doc_ids, "reference"), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_grouped_heads_never_fall_to_the_formula_on_gpus(
    half: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sdpa has a kernel for, by chip, and the way around it where there is none."""
    q, mask = torch.empty(1, dtype=torch.bfloat16 if half else torch.float32), torch.ones(1)
    for chip, formula in {(8, 0): masked or not half, (9, 0): not half}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, chip=chip: chip)
        assert kernel._groups_by_formula(q, mask if masked else None) == formula
    q, k, v = torch.randn(2, 6, 8, 4), torch.randn(2, 2, 8, 4), torch.randn(2, 2, 8, 4)
    seen = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    seen[..., 3:, :3] = ~torch.tensor(masked)
    out = kernel._head_by_head(q, k, v, seen if masked else None, not masked)
    whole = (x.repeat_interleave(3, dim=1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, *whole, attn_mask=seen)
    assert (out - expected).abs().max() < 1e-6


def test_a_later_token_and_another_document_are_never_seen() -> None:
    q, k, v = torch.randn(3, 1, 20, 2, 16)
    doc_ids = (torch.arange(20) >= 12).long()[None]
    for backend in ("sdpa", "reference"):
        before = kernel.attention(q, k, v, doc_ids, backend)
        k2, v2 = k.clone(), v.clone()
        k2[:, 7], v2[:, 7] = 1e4, 1e4
        after = kernel.attention(q, k2, v2, doc_ids, backend)
        assert torch.equal(before[:, :7], after[:, :7])
        assert torch.equal(before[:, 12:], after[:, 12:])
        assert not torch.equal(before[:, 7:12], after[:, 7:12])


def test_outputs_over_parts_of_the_keys_join_by_their_log_sums() -> None:
    q, k, v = (torch.randn(2, 30, heads, 16) for heads in (4, 2, 2))
    doc_ids = (torch.rand(2, 30) < 0.2).cumsum(1)
    whole, lse = kernel.attention_with_lse(q, k, v, doc_ids)
    torch.testing.assert_close(whole, kernel.attention(q, k, v, doc_ids))
    # the last query over the first and the last half of the keys, to which it is the latest
    parts = [kernel.attention_with_lse(q[:, 29:], *(x[:, half] for x in (k, v)))
             for half in (slice(15), slice(15, 30))]  # fmt: skip
    total = torch.stack([part for _, part in parts]).logsumexp(0)
    joined = sum(out * (part - total).exp().mT.unsqueeze(-1) for out, part in parts)
    out, lse = kernel.attention_with_lse(q[:, 29:], k, v)
    torch.testing.assert_close((joined, total), (out, lse))
    with pytest.raises(ValueError, match="'sdpa' has no lse"):
        kernel.attention_with_lse(q, k, v, backend="sdpa")


def test_choose() -> None:
    assert kernel.choose("auto") == "sdpa"
    assert kernel.choose("reference") == "reference"
    with pytest.raises(ValueError, match="'flash'.*bfloat16.*128.*auto, triton, gluon, sdpa"):
        kernel.choose("flash", "cuda", torch.bfloat16, 128)


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.dispatch, "INTERPRETED", False)
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    kernel._why_not.cache_clear()
    for name in ("triton", "gluon"):
        with pytest.raises(ValueError, match=f"'{name}' cannot run on cpu.*needs a CUDA GPU"):
            kernel.choose(name, "cpu", torch.bfloat16, 128)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'triton' cannot run on cuda.*needs a CUDA GPU"):
            kernel.choose("triton", "cuda", torch.bfloat16, 128)
    with pytest.raises(ValueError, match="'xformers'.*xformers cannot be imported"):
        kernel.choose("xformers", "cuda", torch.bfloat16, 128)
    kernel._why_not.cache_clear()


def test_importing_imports_no_triton() -> None:
    check = "import sys, torch; from kernels import attention; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("q", "k", "v", "doc_ids", "words"),
    [
        (ones(2, 3, 4), ones(2, 3, 4, 8), ones(2, 3, 4, 8), None, r"q has shape \(2, 3, 4\)"),
        (ones(2, 3, 4, 8), ones(2, 3, 4, 8), ones(2, 4, 4, 8), None, "shapes disagree.*v"),
        (ones(2, 3, 4, 8), ones(1, 3, 4, 8), ones(1, 3, 4, 8), None, "shapes disagree.*k"),
        (ones(2, 3, 4, 8), ones(2, 3, 3, 8), ones(2, 3, 3, 8), None, "4 heads.*3 key/value"),
        (ones(2, 4, 4, 8), ones(2, 3, 4, 8), ones(2, 3, 4, 8), None, "4 tokens.*3 of k"),
        (
            ones(2, 3, 4, 8),
            ones(2, 3, 4, 8),
            ones(2, 3, 4, 8, dtype=torch.float64),
            None,
            "v is torch.float64",
        ),
        (
            ones(2, 3, 4, 8, dtype=torch.int64),
            ones(2, 3, 4, 8, dtype=torch.int64),
            ones(2, 3, 4, 8, dtype=torch.int64),
            None,
            "q is torch.int64",
        ),
        (
            ones(2, 3, 4, 8),
            ones(2, 3, 4, 8).to("meta"),
            ones(2, 3, 4, 8),
            None,
            "k is on meta, q on cpu",
        ),
        (ones(2, 3, 4, 8), ones(2, 3, 4, 8), ones(2, 3, 4, 8), ones(2, 4).long(), "doc_ids"),
        (ones(2, 3, 4, 8), ones(2, 3, 4, 8), ones(2, 3, 4, 8), ones(2, 3), "doc_ids.*float32"),
        (ones(2, 3, 4, 8), ones(2, 3, 0, 8), ones(2, 3, 0, 8), None, "multiple of the 0 key/value"),
        (*[ones(2, 3, 4, 8)] * 3, ones(2, 3).long().to("meta"), "doc_ids is .* on meta.* on cpu"),
        (*[ones(2, 3, 4, 8)] * 3, ones(2, 1, 3, 3).long(), "doc_ids is .*int64.* torch.float"),
    ],
)
def test_bad_arguments_are_named(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        kernel.attention(q, k, v, doc_ids)


def test_the_mask_is_that_of_the_ids() -> None:
    doc_ids = torch.tensor([[0, 0, 1, 1, 1, 2]])
    mask = reference.visible(3, doc_ids)
    assert mask.shape == (1, 1, 3, 6)
    truth = [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]
    assert mask[0, 0].int().tolist() == truth
