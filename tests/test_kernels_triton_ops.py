"""The Triton kernels but attention against float64 truth, next to plain torch in the same dtype.

On a GPU they run there; elsewhere under Triton's interpreter, which must be on before triton is
imported: the first test runs this file again that way.
"""

import functools
import random

import pytest
import torch
from made_kernels import (
    DEVICE,
    INTERPRETED,
    assert_as_exact,
    begin_as_nan,
    in_shards,
    round_like_a_gpu,
    run_interpreted,
    values_and_gradients,
)
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kernels import attention, dispatch, ops, reference
from llama import optim
from llama.config import ModelConfig, OptimConfig
from llama.model import Transformer

pytest.importorskip("triton")
# the interpreter computes with numpy
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

on_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="runs under the interpreter, by the first test"
)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the other tests run by themselves")
def test_all_of_these_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def prepared(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh seeds and NaN in what is not written."""
    torch.manual_seed(rng.randrange(2**31))
    begin_as_nan(monkeypatch)
    if INTERPRETED:
        round_like_a_gpu(monkeypatch)


def drawn(*shape: int, dtype: torch.dtype, magnitude: float = 1.0, layout: str = "dense") -> Tensor:
    """Random numbers: dense, as part of something wider, or with the last axis apart."""
    if layout == "sliced":
        x = torch.randn(*shape[:-1], shape[-1] + 5)[..., 2:-3]
    elif layout == "transposed":
        x = torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    else:
        x = torch.randn(shape)
    return (x * magnitude).to(DEVICE, dtype)


def called(name: str, module: object, table: Tensor | None = None):
    function = getattr(module, name)
    if name.endswith("rms_norm"):
        return lambda *inputs: function(*inputs, 1e-5)
    return functools.partial(function, table=table) if name == "rope" else function


def compare(name: str, shape: tuple[int, ...], dtype: torch.dtype, magnitude: float, layout: str):
    x, y, grad, other = (drawn(*shape, dtype=dtype, layout=layout) for _ in range(4))
    x, y, table = x * magnitude, y * magnitude, None
    # a product with 1 keeps the layout; what it makes dense is laid out again
    x, y = (t if layout == "dense" else relaid(t, layout) for t in (x, y))
    gain = drawn(shape[-1], dtype=dtype)
    if name == "rope":
        speeds = reference.rope_frequencies(shape[-1], 100.0)
        table = reference.rope_table(shape[1] + 3, speeds).to(DEVICE)[3:]
    inputs = {"rms_norm": [x, gain], "add_rms_norm": [x, y, gain], "swiglu": [x, y], "rope": [x]}
    grads = [grad, other] if name == "add_rms_norm" else [grad]
    wide, wide_grads = [t.double() for t in inputs[name]], [t.double() for t in grads]
    truth = values_and_gradients(called(name, reference, table), wide, wide_grads)
    peer = values_and_gradients(called(name, reference, table), inputs[name], grads)
    result = values_and_gradients(called(name, ops, table), inputs[name], grads)
    assert_as_exact(result, truth, peer)


def relaid(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return torch.cat((x, x), dim=-1)[..., : x.shape[-1]]


@on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "sliced", "transposed"])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu", "rope"])
def test_as_exact_as_torch(name: str, layout: str, dtype: torch.dtype, rng: random.Random) -> None:
    rows = rng.choice([(1, 1, 1), (1, 2, 3), (2, 3, 1), (1, 5, 3)])
    width = rng.choice([6, 18, 64, 96] if name == "rope" else [17, 31, 96, 513, 1100])
    magnitude = rng.choice([1e-2, 1.0, 100.0])
    print(name, rows, width, magnitude)
    compare(name, (*rows, width), dtype, magnitude, layout)


REAL = {
    "rms_norm": [(2, 2048, 1, 4096), (3, 1000, 1, 2048), (1, 300, 1, 8192), (1, 77, 1, 5000)],
    "swiglu": [(2, 2048, 1, 5632), (1, 501, 1, 11008)],
    "rope": [(2, 2048, 16, 128), (3, 500, 32, 64), (1, 333, 5, 96)],
}
REAL["add_rms_norm"] = REAL["rms_norm"]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "sliced"])
@pytest.mark.parametrize(("name", "shape"), [(n, s) for n in REAL for s in REAL[n]])
def test_as_exact_as_torch_at_real_sizes(
    name: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    compare(name, shape, dtype, 1.0, layout)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_rows_that_lie_beyond_2_to_the_31() -> None:
    shape = (2**19 + 3, 1, 1, 4100)
    x, y = (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    gain = torch.randn(shape[-1], dtype=torch.bfloat16, device=DEVICE)
    table = torch.ones(1, shape[-1] // 2, dtype=torch.complex64, device=DEVICE)
    for name, inputs in {"rms_norm": [x, gain], "swiglu": [x, y], "rope": [x]}.items():
        with torch.no_grad():
            whole = called(name, ops, table)(*inputs)[-3:]
            alone = called(name, ops, table)(*(t[-3:] if t.dim() > 1 else t for t in inputs))
        assert torch.equal(whole, alone), name
        torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_gradients_have_the_same_bits_every_time() -> None:
    x = torch.randn(5000, 2048, device=DEVICE, requires_grad=True)
    gain = torch.randn(2048, device=DEVICE, requires_grad=True)
    grad = torch.randn(5000, 2048, device=DEVICE)
    runs = [torch.autograd.grad(ops.rms_norm(x, gain, 1e-5), (x, gain), grad) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@on_triton
def test_a_gain_that_is_part_of_something_wider() -> None:
    x, wide = drawn(3, 20, dtype=torch.float32), drawn(40, dtype=torch.float32)
    grads = [drawn(3, 20, dtype=torch.float32)]
    norm = functools.partial(ops.rms_norm, eps=1e-5)
    found = values_and_gradients(norm, [x, wide[::2]], grads)
    dense = values_and_gradients(norm, [x, wide[::2].contiguous()], grads)
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="memory that is never touched is never there")
def test_heads_that_lie_beyond_2_to_the_31() -> None:
    far = 2**30
    memory = torch.empty(3 * far + 8, dtype=torch.float16)
    x = memory.as_strided((1, 2, 4, 4), (0, 4, far, 1))
    x.copy_(torch.randn(x.shape))
    table = reference.rope_table(2, reference.rope_frequencies(4, 100.0))
    assert torch.equal(ops.rope(x, table), ops.rope(x.contiguous(), table))


@on_triton
def test_rope_in_place_and_back() -> None:
    from kernels import rope

    x = drawn(2, 3, 4, 8, dtype=torch.float32)
    table = reference.rope_table(3, reference.rope_frequencies(8, 100.0)).to(DEVICE)
    turned = rope.rope_(x.clone(), table)
    assert torch.equal(turned, rope.rope_forward(x, table))
    assert torch.equal(
        rope.rope_(turned.clone(), table, back=True), rope.rope_backward(turned, table)
    )


@on_triton
def test_swiglu_gives_its_product_again() -> None:
    from kernels import swiglu

    grad, gate, up = (drawn(3, 70, dtype=torch.float32) for _ in range(3))
    *gradients, product = swiglu.swiglu_backward_with_product(grad, gate, up)
    assert torch.equal(product, swiglu.swiglu_forward(gate, up))
    for a, b in zip(gradients, swiglu.swiglu_backward(grad, gate, up), strict=True):
        assert torch.equal(a, b)


# -- linear + cross-entropy ------------------------------------------------------------------------


def loss_inputs(N: int, C: int, V: int, dtype: torch.dtype, magnitude: float):
    x, weight = drawn(N, C, dtype=dtype, magnitude=magnitude), drawn(V, C, dtype=dtype)
    targets = torch.randint(0, V, (N,), device=DEVICE)
    targets[torch.rand(N, device=DEVICE) < 0.2] = reference.IGNORED
    return x, weight, targets


def compare_losses(x: Tensor, weight: Tensor, targets: Tensor, z_loss: float, result=None) -> None:
    def through(module):
        return lambda x, w: module.linear_cross_entropy(x, w, targets, z_loss) * 0.25

    grad = torch.ones(len(x), device=DEVICE)
    truth = values_and_gradients(through(reference), [x.double(), weight.double()], [grad])
    peer = values_and_gradients(through(reference), [x, weight], [grad])
    assert_as_exact(result or values_and_gradients(through(ops), [x, weight], [grad]), truth, peer)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, and several blocks of a row, at the sizes of the interpreter."""
    from kernels import cross_entropy

    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS_MULTIPLE", 8)
    monkeypatch.setattr(cross_entropy, "BLOCK", 32)


@on_triton
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "V", "magnitude", "z_loss"), [(1, 7, 0.1, 0.0), (19, 75, 1.0, 1e-2), (16, 64, 30.0, 0.0)]
)
def test_linear_cross_entropy(
    dtype: torch.dtype, N: int, V: int, magnitude: float, z_loss: float
) -> None:
    compare_losses(*loss_inputs(N, 24, V, dtype, magnitude), z_loss)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "C", "V"), [(4096 + 77, 2048, 32000), (300, 512, 128256)])
def test_linear_cross_entropy_at_real_sizes(dtype: torch.dtype, N: int, C: int, V: int) -> None:
    x, weight, targets = loss_inputs(N, C, V, dtype, 1.0)
    compare_losses(x, weight * 0.02, targets, 1e-4)


@on_triton
def test_a_factor_that_bfloat16_does_not_hold_is_not_rounded_to_it() -> None:
    x, weight, targets = loss_inputs(64, 24, 75, torch.bfloat16, 1.0)
    grads = [torch.full((64,), factor, device=DEVICE) for factor in (0.37, 0.25)]
    losses = functools.partial(ops.linear_cross_entropy, targets=targets)
    found, exact = (values_and_gradients(losses, [x, weight], [grad]) for grad in grads)
    for a, b in zip(found[1:], exact[1:], strict=True):
        ratio = (a.double() * b).sum() / b.double().square().sum()
        assert float(ratio) == pytest.approx(0.37 / 0.25, rel=5e-4)


@on_triton
def test_rows_without_a_target_have_no_loss_and_no_gradient() -> None:
    x, weight, targets = loss_inputs(4, 8, 11, torch.float32, 1.0)
    targets.fill_(reference.IGNORED)
    found = values_and_gradients(
        lambda x, w: ops.linear_cross_entropy(x, w, targets, 0.1), [x, weight], [torch.ones(4)]
    )
    assert all(not tensor.any() for tensor in found)


@on_triton
def test_a_target_outside_of_the_vocabulary_is_not_overlooked() -> None:
    x, weight, targets = loss_inputs(3, 8, 11, torch.float32, 1.0)
    targets[:] = torch.tensor([0, 11, -100])
    losses = ops.linear_cross_entropy(x, weight, targets)
    assert losses.isnan().tolist() == [False, True, False]


@on_triton
@pytest.mark.usefixtures("small_chunks")
def test_a_vocabulary_divided_over_processes() -> None:
    x, weight, targets = loss_inputs(19, 24, 75, torch.float32, 1.0)

    def work(rows: Tensor, shard: reference.VocabularyShard) -> list[Tensor]:
        return values_and_gradients(
            lambda x, w: ops.linear_cross_entropy(x, w, targets, 1e-2, shard) * 0.25,
            [x, rows],
            [torch.ones(19, device=DEVICE)],
        )

    losses, of_x, of_weight = zip(*in_shards(weight, 3, work), strict=True)
    assert all(torch.equal(part, losses[0]) for part in losses)
    whole = [losses[0], sum(of_x), torch.cat(of_weight)]
    compare_losses(x, weight, targets, 1e-2, whole)


# -- as operators of torch -------------------------------------------------------------------------


@on_triton
def test_operators_describe_their_outputs() -> None:
    x, y, gain = (drawn(*s, dtype=torch.bfloat16) for s in ((2, 3, 2, 8), (2, 3, 2, 8), (8,)))
    table = reference.rope_table(3, reference.rope_frequencies(8, 100.0)).to(DEVICE)
    scale, targets = torch.rand(2, 3, 2, 1, device=DEVICE), torch.zeros(6, dtype=torch.long)
    arguments = {
        "rms_norm_forward": (x.transpose(1, 2), gain, 1e-5),
        "rms_norm_backward": (y, x, gain, scale),
        "add_rms_norm_forward": (x, y, gain, 1e-5),
        "add_rms_norm_backward": (x, y, x, gain, scale),
        "swiglu_forward": (x, y),
        "swiglu_backward": (x, y, x),
        "swiglu_backward_with_product": (x, y, x),
        "rope_forward": (x.transpose(2, 3).contiguous().transpose(2, 3), table),
        "rope_backward": (x, table),
        "linear_cross_entropy_forward": (*x.view(2, 6, 8), targets.to(DEVICE), True, 0.0),
    }
    tests = ("test_schema", "test_faketensor")
    for name, args in arguments.items():
        torch.library.opcheck(getattr(torch.ops.llama, name), args, test_utils=tests)
    assert arguments.keys() == dispatch._CUSTOM_OPS.keys()


def block(x: Tensor, y: Tensor, gain: Tensor) -> Tensor:
    normed, total = ops.add_rms_norm(x, y, gain, 1e-5)
    return ops.rms_norm(ops.swiglu(normed, total), gain, 1e-5)


@on_triton
def test_compiled_as_one_graph_with_the_norms_as_operators() -> None:
    graphs: list[str] = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    inputs = [drawn(3, 16, dtype=torch.float32) for _ in range(2)] + [torch.ones(16, device=DEVICE)]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    grad = [torch.ones(3, 16, device=DEVICE)]
    plain = values_and_gradients(block, inputs, grad)
    for a, b in zip(values_and_gradients(compiled, inputs, grad), plain, strict=True):
        torch.testing.assert_close(a, b)
    torch.compile(block, backend=backend, fullgraph=True)(*inputs)
    (code,) = graphs
    assert "llama.rms_norm_forward" in code and "llama.add_rms_norm_forward" in code
    assert "llama.swiglu" not in code and "silu" in code


@on_triton
def test_selective_recompute_sees_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import rmsnorm

    calls = []
    launcher = rmsnorm.rms_norm_forward
    monkeypatch.setattr(
        rmsnorm, "rms_norm_forward", lambda *args: (calls.append(1), launcher(*args))[1]
    )
    kept = torch.ops.llama.rms_norm_forward.default

    def policy(context, op, *args, **kwargs):
        keep = op == kept
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    inputs = [drawn(3, 16, dtype=torch.float32) for _ in range(2)] + [torch.ones(16, device=DEVICE)]
    context = functools.partial(create_selective_checkpoint_contexts, policy)
    grad = [torch.ones(3, 16, device=DEVICE)]
    found = values_and_gradients(
        lambda *args: checkpoint(block, *args, use_reentrant=False, context_fn=context),
        inputs,
        grad,
    )
    assert len(calls) == 1
    for a, b in zip(found, values_and_gradients(block, inputs, grad), strict=True):
        assert torch.equal(a, b)


# -- a run -----------------------------------------------------------------------------------------


def training_losses(backend: str) -> list[float]:
    cfg = ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=48, vocab_size=40)
    model = Transformer(cfg, attention=backend).to(DEVICE)
    model.init_weights(0)
    tokens = torch.randint(40, (1, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    optimizer, losses = optim.build(model, OptimConfig()), []
    for _ in range(10):
        sums, counts = model(tokens[:, :-1], tokens[:, 1:])
        loss = sums.sum() / counts.sum()
        loss.backward()
        optim.step(optimizer, 1e-2, 1.0)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@on_triton
def test_a_run_follows_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = "triton" if "triton" in attention.BACKENDS else "reference"
    ours = training_losses(backend)
    for name in ("rms_norm", "add_rms_norm", "swiglu", "rope", "linear_cross_entropy"):
        monkeypatch.setattr(ops, name, getattr(reference, name))
    theirs = training_losses("reference")
    assert theirs[-1] < theirs[0] - 1
    assert ours == pytest.approx(theirs, rel=1e-5)
