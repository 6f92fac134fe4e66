"""The operations that the model calls, on a CPU without Triton, against float64 truth: values and
every gradient; and what they refuse.
"""

import functools
import random

import pytest
import torch
from made_kernels import assert_as_exact, in_shards, values_and_gradients
from torch import Tensor

from kernels import dispatch, eager, ops, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def prepared(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(rng.randrange(2**31))
    monkeypatch.setattr(dispatch, "INTERPRETED", False)


def error(result: Tensor, truth: Tensor) -> float:
    """Largest error in units of the truth's largest magnitude."""
    return float((result.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu", "rope"])
def test_an_operation_is_as_exact_as_its_formula(name: str, dtype: torch.dtype) -> None:
    x, y, *grads = (torch.randn(2, 9, 4, 16).to(dtype) for _ in range(4))
    gain = torch.randn(16).to(dtype)
    table = reference.rope_table(9, reference.rope_frequencies(16, 100.0))
    inputs, more = {
        "rms_norm": ([x, gain], (1e-5,)),
        "add_rms_norm": ([x, y, gain], (1e-5,)),
        "swiglu": ([x, y], ()),
        "rope": ([x], (table,)),
    }[name]
    grads = grads[: 2 if name == "add_rms_norm" else 1]

    def through(module):
        return lambda *tensors: getattr(module, name)(*tensors, *more)

    wide = [x.double() for x in inputs], [g.double() for g in grads]
    truth = values_and_gradients(through(reference), *wide)
    peer = values_and_gradients(through(reference), inputs, grads)
    result = values_and_gradients(through(ops), inputs, grads)
    # in float64 the truth rounds as often as the result, 72 times in the gradient of a gain
    roundings = 72 if dtype == torch.float64 else 4
    for ours, theirs, exact in zip(result, peer, truth, strict=True):
        assert ours.dtype == dtype
        assert error(ours, exact) <= 2 * error(theirs, exact) + roundings * torch.finfo(dtype).eps


def test_swiglu_gives_its_product_again() -> None:
    grad, gate, up = (torch.randn(3, 70) for _ in range(3))
    *gradients, product = eager.swiglu_backward_with_product(grad, gate, up)
    assert torch.equal(product, eager.swiglu_forward(gate, up))
    for a, b in zip(gradients, eager.swiglu_backward(grad, gate, up), strict=True):
        assert torch.equal(a, b)


# -- linear + cross-entropy ------------------------------------------------------------------------


@pytest.fixture(params=[(2**20, 128), (7, 128), (1, 3)])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss in one chunk, in several, and in several with a shorter last one."""
    elements, rows = request.param
    monkeypatch.setattr(eager, "CPU_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(eager, "LEAST_CHUNK_ROWS", rows)


def loss_inputs(N: int, dtype: torch.dtype, magnitude: float) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = magnitude * torch.randn(N, 24), torch.randn(50, 24)
    targets = torch.randint(0, 50, (N,))
    targets[torch.rand(N) < 0.2] = reference.IGNORED
    return x.to(dtype), weight.to(dtype), targets


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 130, 256])
@pytest.mark.parametrize(("magnitude", "z_loss"), [(1.0, 0.0), (1.0, 0.01), (300.0, 0.0)])
def test_linear_cross_entropy(dtype: torch.dtype, N: int, magnitude: float, z_loss: float) -> None:
    x, weight, targets = loss_inputs(N, dtype, magnitude)

    def found(module: object, x: Tensor, weight: Tensor) -> list[Tensor]:
        return values_and_gradients(
            lambda x, w: module.linear_cross_entropy(x, w, targets, z_loss),
            [x, weight],
            [torch.full((N,), 0.37)],
        )

    truth = found(reference, x.double(), weight.double())
    result = found(ops, x, weight)
    # what plain torch loses in this dtype bounds what may be lost here
    peer = found(reference, x, weight)
    assert result[0].dtype == torch.promote_types(dtype, torch.float32)
    for ours, theirs, exact in zip(result, peer, truth, strict=True):
        if exact.abs().max() == 0:
            assert (ours == 0).all()
            continue
        # logits are some thousands: twelve of sixteen digits are left
        limit = 1e-11 if dtype == torch.float64 else 2 * error(theirs, exact)
        assert error(ours, exact) <= limit + 4 * torch.finfo(dtype).eps
    with torch.no_grad():
        assert torch.equal(ops.linear_cross_entropy(x, weight, targets, z_loss), result[0])


def test_the_reference_is_the_cross_entropy_of_torch() -> None:
    x, weight, targets = loss_inputs(40, torch.float64, 1.0)
    z = x @ weight.t()
    plain = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    torch.testing.assert_close(reference.linear_cross_entropy(x, weight, targets), plain)
    penalty = 0.1 * z.exp().sum(1).log().square() * (targets != reference.IGNORED)
    with_penalty = reference.linear_cross_entropy(x, weight, targets, z_loss=0.1)
    torch.testing.assert_close(with_penalty, plain + penalty)


def test_rows_without_a_target_have_no_loss_and_no_gradient() -> None:
    x, weight, targets = loss_inputs(4, torch.float32, 1.0)
    targets.fill_(reference.IGNORED)
    grad = [torch.ones(4)]
    losses = functools.partial(ops.linear_cross_entropy, targets=targets, z_loss=0.1)
    assert all(not tensor.any() for tensor in values_and_gradients(losses, [x, weight], grad))


def test_losses_must_enter_with_one_factor() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8)
    losses = ops.linear_cross_entropy(x, weight, torch.arange(4))
    with pytest.raises(RuntimeError, match="unequal factors"):
        (losses * torch.arange(4)).sum().backward()


@pytest.mark.usefixtures("chunks")
def test_a_vocabulary_divided_over_processes() -> None:
    x, weight, targets = loss_inputs(40, torch.float32, 1.0)
    grad = [torch.full((40,), 0.25)]

    def work(rows: Tensor, shard: reference.VocabularyShard) -> list[Tensor]:
        return values_and_gradients(
            lambda x, w: ops.linear_cross_entropy(x, w, targets, 1e-2, shard), [x, rows], grad
        )

    losses, of_x, of_weight = zip(*in_shards(weight, 3, work), strict=True)
    assert all(torch.equal(part, losses[0]) for part in losses)
    result = [losses[0], sum(of_x), torch.cat(of_weight)]
    whole = functools.partial(reference.linear_cross_entropy, targets=targets, z_loss=1e-2)
    truth = values_and_gradients(whole, [x.double(), weight.double()], grad)
    assert_as_exact(result, truth, values_and_gradients(whole, [x, weight], grad))


# -- bad input -------------------------------------------------------------------------------------

X, TABLE = torch.zeros(2, 3, 4, 8), torch.zeros(3, 4, dtype=torch.complex64)
IDS = torch.zeros(6, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.rms_norm(X, torch.zeros(7), 1e-5), r"weight is \(7,\)"),
        (lambda: ops.rms_norm(X, torch.zeros(8, device="meta"), 1e-5), "weight is .* on meta"),
        (lambda: ops.rms_norm(X.long(), torch.zeros(8), 1e-5), "x is .* torch.int64"),
        (lambda: ops.rms_norm(X, torch.zeros(8).long(), 1e-5), "weight is .* torch.int64"),
        (lambda: ops.rms_norm(X[0, 0, 0, 0], torch.zeros(8), 1e-5), r"x is \(\).*\(\.\.\., C\)"),
        (lambda: ops.add_rms_norm(X.long(), X.long(), torch.zeros(8), 1e-5), "x is .* torch.int64"),
        (lambda: ops.swiglu(X.long(), X.long()), "gate is .* torch.int64"),
        (lambda: ops.rope(X.long(), TABLE), "x is .* torch.int64"),
        (lambda: ops.linear_cross_entropy(X[0], X[0, 0], IDS[:4]), r"x is \(3, 4, 8\).*\(N, C\)"),
        (lambda: ops.linear_cross_entropy(X[0, 0], X[0, 0, 0], IDS[:4]), r"weight is \(8,\)"),
        (lambda: ops.linear_cross_entropy(X[0, 0], X[0, 0, :0], IDS[:4]), r"weight is \(0, 8\)"),
        (lambda: ops.add_rms_norm(X, X[:1], torch.zeros(8), 1e-5), r"residual is \(1, 3, 4, 8\)"),
        (lambda: ops.swiglu(X, X.double()), "up is .* torch.float64 on cpu, expected .*float32"),
        (lambda: ops.rope(X[0], TABLE), r"x is \(3, 4, 8\)"),
        (lambda: ops.rope(X[..., :7], TABLE), r"x is \(2, 3, 4, 7\).* even D"),
        (lambda: ops.rope(X, TABLE[:2]), r"table is \(2, 4\)"),
        (lambda: ops.rope(X, TABLE.real), "table is .* torch.float32"),
        (lambda: ops.linear_cross_entropy(X[0, 0], X[0, 0, :, :7], IDS), r"weight is \(4, 7\)"),
        (lambda: ops.linear_cross_entropy(X[0, 0], X[0, 0], IDS), r"targets is \(6,\)"),
        (lambda: ops.linear_cross_entropy(X[0, 0], X[0, 0], IDS[:4].int()), "targets .*int32"),
    ],
)
def test_bad_input_is_refused(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
