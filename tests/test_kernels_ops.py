"""The operations that the model calls, against float64 truth: values and every gradient."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import eager, ops, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded(rng: random.Random) -> None:
    torch.manual_seed(rng.randrange(2**31))


def error(result: Tensor, truth: Tensor) -> float:
    """Largest error in units of the truth's largest magnitude."""
    return float((result.double() - truth).abs().max() / truth.abs().max())


def values_and_gradients(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope"])
def test_an_operation_is_as_exact_as_its_formula(name: str, dtype: torch.dtype) -> None:
    x, other = (torch.randn(2, 9, 4, 16).to(dtype) for _ in range(2))
    grad = torch.randn(2, 9, 4, 16).to(dtype)
    table = reference.rope_table(9, reference.rope_frequencies(16, 100.0))
    inputs = {"rms_norm": [x, other[0, 0, 0]], "swiglu": [x, other], "rope": [x]}[name]
    more = {"rms_norm": (1e-5,), "swiglu": (), "rope": (table,)}[name]

    def through(module):
        return lambda *tensors: getattr(module, name)(*tensors, *more)

    truth = values_and_gradients(through(reference), [x.double() for x in inputs], grad.double())
    peer = values_and_gradients(through(reference), inputs, grad)
    result = values_and_gradients(through(ops), inputs, grad)
    for ours, theirs, exact in zip(result, peer, truth, strict=True):
        assert ours.dtype == dtype
        assert error(ours, exact) <= 2 * error(theirs, exact) + 4 * torch.finfo(dtype).eps


@pytest.fixture(params=[(2**20, 128), (7, 128), (1, 3)])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss in one chunk, in several, and in several with a shorter last one."""
    elements, rows = request.param
    monkeypatch.setattr(eager, "CPU_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(eager, "LEAST_CHUNK_ROWS", rows)


def losses_and_gradients(x: Tensor, weight: Tensor, targets: Tensor, plain: bool) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    if plain:
        losses = F.cross_entropy(x @ weight.t(), targets, reduction="none")
    else:
        losses = ops.linear_cross_entropy(x, weight, targets)
    (losses.sum() * 0.37).backward()
    assert x.grad is not None and weight.grad is not None
    return [losses.detach(), x.grad, weight.grad]


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 130, 256])
@pytest.mark.parametrize("magnitude", [1.0, 300.0])
def test_linear_cross_entropy(dtype: torch.dtype, N: int, magnitude: float) -> None:
    x = (magnitude * torch.randn(N, 24)).to(dtype)
    weight = torch.randn(50, 24).to(dtype)
    targets = torch.randint(0, 50, (N,))
    targets[torch.rand(N) < 0.2] = -100
    truth = losses_and_gradients(x.double(), weight.double(), targets, plain=True)
    result = losses_and_gradients(x, weight, targets, plain=False)
    # what plain torch loses in this dtype bounds what may be lost here
    peer = losses_and_gradients(x, weight, targets, plain=True)
    assert result[0].dtype == torch.promote_types(dtype, torch.float32)
    for ours, theirs, exact in zip(result, peer, truth, strict=True):
        if exact.abs().max() == 0:
            assert (ours == 0).all()
            continue
        # logits are some thousands: twelve of sixteen digits are left
        limit = 1e-11 if dtype == torch.float64 else 2 * error(theirs, exact)
        assert error(ours, exact) <= limit + 4 * torch.finfo(dtype).eps
    with torch.no_grad():
        assert torch.equal(ops.linear_cross_entropy(x, weight, targets), result[0])


def test_rows_without_a_target_have_no_loss_and_no_gradient() -> None:
    x, weight = torch.randn(4, 8), torch.randn(11, 8)
    losses, grad_x, grad_weight = losses_and_gradients(
        x, weight, torch.full((4,), -100), plain=False
    )
    assert not losses.any() and not grad_x.any() and not grad_weight.any()


def test_losses_must_enter_with_one_factor() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8)
    losses = ops.linear_cross_entropy(x, weight, torch.arange(4))
    with pytest.raises(RuntimeError, match="unequal factors"):
        (losses * torch.arange(4)).sum().backward()
