"""The Triton attention kernels against float64 truth, next to plain torch in the same dtype.

On a GPU with real sizes (marker gpu); elsewhere small ones under Triton's interpreter, which must
be on before triton is imported: the first test runs this file again that way. There tiles are so
small that few tokens meet every part of the kernels, and Hopper's way of moving tiles runs too.
"""

import math
import random

import numpy as np
import pytest
import torch
from made_kernels import (
    DEVICE,
    INTERPRETED,
    assert_as_exact,
    begin_as_nan,
    round_like_a_gpu,
    run_interpreted,
    values_and_gradients,
)
from torch import Tensor

from kernels import attention as public
from kernels import attention_op, reference

pytest.importorskip("triton")
from kernels import attention_launch as launch  # noqa: E402

# the interpreter computes with numpy
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs under the interpreter, by the first")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")


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
        complete(monkeypatch)


def complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's interpreter lacks: bfloat16 products, x y + z rounded once, TMA's additions."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot = builder.create_dot

    def wide(x: object) -> object:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def add(self: object, kind: object, desc: object, value: object, indices: list) -> None:
        pointers, mask = desc.materialize_pointers(indices)
        mask = handle(mask, tl.int1)
        total = self.create_masked_load(pointers, mask, None, None, None, False)
        self.create_masked_store(
            pointers, handle(total.data + value.data, value.dtype), mask, None, None
        )

    def fma(self: object, x: object, y: object, z: object) -> object:
        exact = x.data.astype(np.float64) * y.data + z.data
        return handle(exact.astype(x.data.dtype), x.dtype.scalar)

    monkeypatch.setattr(builder, "create_fma", fma)
    monkeypatch.setattr(builder, "create_dot", lambda s, a, b, *x: dot(s, wide(a), wide(b), *x))
    monkeypatch.setattr(builder, "create_descriptor_reduce", add, raising=False)


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention as a newcomer would write it, in the dtype of the inputs."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def document_ids(B: int, S: int, rng: random.Random) -> Tensor:
    """Arbitrary ids; documents of one token among them, and one that begins at the last."""
    begins = torch.rand(B, S) < rng.choice([0.03, 0.2, 0.9])
    begins[:, -1] = True
    names = torch.tensor(rng.sample(range(-(2**40), 2**40), S + 1))
    return names[begins.cumsum(1)].to(DEVICE)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, size: float = 1) -> list[Tensor]:
    """q, k and v as slices of something larger, and the gradient of the output."""
    B, T, S, H, K, D = shape
    q = torch.randn(B, T + 3, H + 1, D, device=DEVICE, dtype=dtype)[:, 3:, 1:] * size
    # head by head, as in the cache of a generation, whose end nobody has written
    k, v = torch.randn(2, B, K, S + 5, D, device=DEVICE, dtype=dtype)
    k[:, :, S:], v[:, :, S:] = torch.nan, torch.nan
    k, v = (x[:, :, :S].transpose(1, 2) for x in (k, v))
    return [q, k, v, torch.randn_like(q)]


def compare(
    shape: tuple[int, ...], dtype: torch.dtype, ids: Tensor | None, size: float = 1,
    deterministic: bool = True,
) -> None:  # fmt: skip
    """Output and gradients as near to the truth as plain torch's."""
    B, T, S, *_ = shape
    *tensors, grad = inputs(shape, dtype, size)
    docs = None if ids is None else attention_op.documents(ids)
    seen = reference.visible(T, torch.zeros(B, S, device=DEVICE) if ids is None else ids)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_op.attention(q, k, v, docs, True, False, deterministic)[0]

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v, seen)

    def backwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return theirs(q.flip(3), k.flip(3), v)

    truth = values_and_gradients(theirs, [x.double() for x in tensors], [grad])
    peers = (values_and_gradients(work, tensors, [grad]) for work in (theirs, backwards))
    assert_as_exact(values_and_gradients(ours, tensors, [grad]), truth, *peers)


# T, S, H, K, D; the kernels pad the last size
SHAPES = [(1, 1, 4, 4, 16), (17, 17, 4, 1, 32), (33, 70, 8, 2, 24), (1, 50, 8, 1, 16)]


@interpreted
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small(
    arch: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tile(*_: object) -> launch.Tile:
        return launch.Tile(*rng.choice([(16, 16), (16, 32), (32, 16)]), 4, 1)

    monkeypatch.setattr(launch, "tile", tile)
    monkeypatch.setattr(launch, "arch_of", lambda x: arch)
    # few queries have too few numbers for the norms of errors to be compared, in documents of one
    # token none at all
    B = rng.choice([1, 2]) if shape[0] > 17 else 8
    ids = rng.choice([None, document_ids(B, shape[1], rng)])
    size, deterministic = rng.choice([1, 8]), rng.choice([True, False])
    print(f"B {B}, documents {ids is not None}, size {size}, deterministic {deterministic}")
    compare((B, *shape), dtype, ids, size, deterministic)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 17, 127, 1000, 2048])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 256])
def test_real(dtype: torch.dtype, T: int, group: int, D: int, rng: random.Random) -> None:
    S = T + rng.choice([0, 0, 5, 700])
    ids = rng.choice([None, document_ids(2, S, rng)])
    size, deterministic = rng.choice([1, 8]), rng.choice([True, False])
    print(f"S {S}, documents {ids is not None}, size {size}, deterministic {deterministic}")
    compare((2, T, S, 8, 8 // group, D), dtype, ids, size, deterministic)


@pytest.mark.gpu
@on_gpu
def test_offsets_beyond_2_to_the_31() -> None:
    """Only one head of a packed tensor of 2^32 elements is looked at: the last, in the far half."""
    T, D = 2**17, 64
    packed = torch.empty(1, T, 2**15, dtype=torch.bfloat16, device=DEVICE)
    q, k, v = (packed[..., i * D : (i + 1) * D].unflatten(-1, (1, D)) for i in (-3, -2, -1))
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape, device=DEVICE))
    last = slice(T - 256, T)
    ids = (torch.arange(T, device=DEVICE) >= T - 512).long()[None]
    out = launch.forward(q, k, v, attention_op.documents(ids))[0]
    alone = [x[:, -512:].contiguous() for x in (q, k, v)]
    assert torch.equal(out[:, last], launch.forward(*alone)[0][:, -256:])


@interpreted
@pytest.mark.parametrize("arch", [80, 90])
def test_strides_that_pass_2_to_the_32(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens, far apart: memory that is never touched is never there."""
    monkeypatch.setattr(launch, "arch_of", lambda x: arch)
    T, H, D, far = 70, 2, 32, 2**26
    memory = torch.empty(T * far, dtype=torch.float16)
    close = [torch.randn(1, T, H, D, dtype=torch.float16) for _ in range(4)]
    apart = [memory.as_strided((1, T, H, D), (T * far, far, D, 1), 4 * i * D) for i in range(4)]
    for here, there in zip(close, apart, strict=True):
        there.copy_(here)

    def work(*qkv: Tensor) -> Tensor:
        return attention_op.attention(*qkv, None, True, False, True)[0]

    *inputs, grad = apart
    found = values_and_gradients(work, inputs, [grad])
    for ours, expected in zip(found, values_and_gradients(work, close[:3], close[3:]), strict=True):
        assert torch.equal(ours, expected)


@interpreted
@pytest.mark.parametrize("arch", [80, 90])
def test_gradients_that_are_one_number(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a sum: expanded, with strides of 0."""
    monkeypatch.setattr(launch, "arch_of", lambda x: arch)
    tensors = [torch.randn(2, 5, 2, 64) for _ in range(3)]

    def work(*qkv: Tensor) -> Tensor:
        return public.attention(*qkv, backend="triton")

    ones = torch.ones(())
    found = values_and_gradients(work, tensors, [ones.expand(2, 5, 2, 64)])
    dense = values_and_gradients(work, tensors, [torch.ones(2, 5, 2, 64)])
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


@interpreted
def test_packed_projections_are_taken_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy where a tile that reaches past the last token finds the tensor's own elements."""
    monkeypatch.setattr(launch, "arch_of", lambda x: 90)
    packed = torch.randn(2, 20, 4 * 32)
    q, k = packed[..., :64].unflatten(2, (2, 32)), packed[..., 64:96].unflatten(2, (1, 32))
    run = launch.Run(q.half(), k.half(), None)
    packed = packed.half()
    q, k = packed[..., :64].unflatten(2, (2, 32)), packed[..., 64:96].unflatten(2, (1, 32))
    assert run.movable(q) is q and run.movable(k) is k
    heads = torch.randn(2, 2, 20, 32).half().transpose(1, 2)
    assert run.movable(heads) is heads
    cached = torch.randn(2, 2, 24, 32).half()[:, :, :20].transpose(1, 2)
    assert run.movable(cached) is not cached and torch.equal(run.movable(cached), cached)


@interpreted
def test_a_chip_that_wants_memory_for_descriptors_gets_it() -> None:
    from triton.runtime import _allocation

    q, k, v = (torch.randn(1, 3, 1, 16) for _ in range(3))
    launch.forward(q, k, v)
    assert _allocation._allocator.get()(384, 128, None).numel() == 384


@pytest.mark.gpu
@on_gpu
def test_the_same_bits_twice() -> None:
    *tensors, grad = inputs((2, 1000, 1000, 8, 2, 128), torch.bfloat16)
    assert_same_bits(tensors, grad)


@interpreted
def test_the_same_bits_twice_small() -> None:
    *tensors, grad = inputs((1, 40, 40, 2, 1, 16), torch.float32)
    assert_same_bits(tensors, grad)


def assert_same_bits(tensors: list[Tensor], grad: Tensor) -> None:
    def work(*qkv: Tensor) -> Tensor:
        return public.attention(*qkv, backend="triton")

    first, second = (values_and_gradients(work, tensors, [grad]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
def test_documents_are_where_they_begin_and_end() -> None:
    ids = torch.tensor([[7, 7, -1, 7, 7, 7], [0, 1, 2, 2, 2, 2]])
    first, last = attention_op.documents(ids)
    assert first.tolist() == [[0, 0, 2, 3, 3, 3], [0, 1, 2, 2, 2, 2]]
    assert last.tolist() == [[1, 1, 2, 5, 5, 5], [0, 1, 5, 5, 5, 5]]


@interpreted
def test_what_is_outside_a_document_is_not_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks are skipped: NaN there stays there."""
    q, k, v = (torch.randn(1, 64, 1, 16) for _ in range(3))
    k[:, :32], v[:, :32] = torch.nan, torch.nan
    monkeypatch.setattr(launch, "tile", lambda *_: launch.Tile(16, 16, 4, 1))
    ids = (torch.arange(64) >= 32).long()[None]
    out = public.attention(q, k, v, ids, "triton")
    assert out[:, :32].isnan().all() and not out[:, 32:].isnan().any()


@interpreted
def test_the_log_sums_are_those_of_the_reference() -> None:
    q, k, v = (torch.randn(2, 20, 2, 16) for _ in range(3))
    for ids in (None, document_ids(2, 20, random.Random())):
        ours = public.attention_with_lse(q, k, v, ids, "triton")
        torch.testing.assert_close(ours, public.attention_with_lse(q, k, v, ids, "reference"))
    # a gradient of theirs would be lost without a word
    out, lse = public.attention_with_lse(q.requires_grad_(), k, v, backend="triton")
    assert out.requires_grad and not lse.requires_grad


@interpreted
def test_the_operator_is_what_torch_wants_of_one() -> None:
    q, k, v = (torch.randn(1, 20, 2, 16, requires_grad=True) for _ in range(3))
    docs = attention_op.documents(torch.zeros(1, 20, dtype=torch.long))
    for given in (None, docs):
        torch.library.opcheck(
            torch.ops.llama.attention,
            (q, k, v, given, True, False, True),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@interpreted
def test_the_interpreter_is_chosen_by_name() -> None:
    assert public.choose("triton", "cpu", torch.float32, 80) == "triton"
    fused = public.choose("triton", "cpu", torch.float32, 80, deterministic=False)
    assert fused == "triton (backward not deterministic)"
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in range(3))
    torch.testing.assert_close(
        public.attention(q, k, v, backend=fused), reference.attention(q, k, v)
    )
    with pytest.raises(ValueError, match="'triton'.*bfloat16"):
        public.choose("triton", "cpu", torch.bfloat16, 80)
    with pytest.raises(ValueError, match="'triton'.*head size 512.*up to 256"):
        public.choose("triton", "cpu", torch.float32, 512)
    with pytest.raises(ValueError, match="'gluon'.*Hopper"):
        public.choose("gluon", "cpu", torch.float32, 64)
