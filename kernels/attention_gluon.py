"""The forward pass of causal attention for Hopper in Gluon, with the schedule written out.

The same function as attention_triton.py's, and the formulas there: (B, T, H, D) in bfloat16 or
float16, D of 64 or 128. A program computes 128 queries with three groups of warps, as in
FlashAttention-3 (Shah et al. 2024): one loads tiles by TMA into a ring in shared memory, two have
64 queries each and take turns at the tensor cores. Within each, the product p v of a block runs
while the softmax of the next is computed. The backward pass is Triton's.

Gluon ships inside triton and changes with it: this is written for triton 3.6.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import attention_launch as launch
from kernels.launch import compilation

if TYPE_CHECKING:
    from torch import Tensor

# queries of one consumer, keys of a block, blocks in the ring; what registers allow (255 each)
M: gl.constexpr = gl.constexpr(64)
N: gl.constexpr = gl.constexpr(128)
STAGES: gl.constexpr = gl.constexpr(2)
# how tiles of 2-byte elements lie in shared memory
TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)


@gluon.jit
def _corner(strides, b, h):
    """Row and column of a host's descriptor at which head h begins, as in attention_triton.py."""
    start = b.to(gl.int64) * strides[0] + h.to(gl.int64) * strides[2]
    return (start // strides[1]).to(gl.int32), (start % strides[1]).to(gl.int32)


@gluon.jit
def _produce(q, k, v, q_at, k_at, v_at, tiles, barriers, blocks, end_block):
    """Load both tiles of queries, then `blocks` blocks of keys and values, from the last down."""
    q_tiles, k_tiles, v_tiles = tiles
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    for c in gl.static_range(2):
        mbarrier.expect(q_ready.index(c), q.block_type.nbytes)
        tma.async_copy_global_to_shared(
            q, [q_at[0] + c * M, q_at[1]], q_ready.index(c), q_tiles.index(c)
        )
    for i in range(blocks):
        stage, phase = i % STAGES, (i // STAGES) & 1
        row = (end_block - 1 - i) * N
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_ready.index(stage), k.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k, [k_at[0] + row, k_at[1]], k_ready.index(stage), k_tiles.index(stage)
        )
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_ready.index(stage), v.block_type.nbytes)
        tma.async_copy_global_to_shared(
            v, [v_at[0] + row, v_at[1]], v_ready.index(stage), v_tiles.index(stage)
        )


@gluon.jit
def _softmax(s, top, total, rows, starts, first_key, scale, MASK: gl.constexpr, DOCS: gl.constexpr):
    """Weights of a block, and the running maximum and sum with it; what to shrink the rest by."""
    if MASK:
        layout: gl.constexpr = s.type.layout
        keys = first_key + gl.arange(0, N, gl.SliceLayout(0, layout))
        seen = keys[None, :] <= rows[:, None]
        if DOCS:
            seen = seen & (keys[None, :] >= starts[:, None])
        s = gl.where(seen, s, float("-inf"))
    higher = gl.maximum(top, gl.max(s, 1) * scale)
    p = gl.exp2(gl.fma(s, scale, -higher[:, None]))
    shrink = gl.exp2(top - higher)
    return p, higher, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _blocks(begin, end, state, given, MASK: gl.constexpr, DOCS: gl.constexpr):
    """Blocks end - 1 down to begin: scores of each beside the product of the one before."""
    i, acc, p, top, total = state
    end_block, q, tiles, barriers, rows, starts, scale = given
    _, k_tiles, v_tiles = tiles
    _, k_ready, k_free, v_ready, v_free = barriers
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    for _ in range(begin, end):
        before = i - 1
        stage, phase = i % STAGES, (i // STAGES) & 1
        old, old_phase = before % STAGES, (before // STAGES) & 1
        mbarrier.wait(k_ready.index(stage), phase)
        s = hopper.warpgroup_mma(
            q, k_tiles.index(stage).permute((1, 0)), gl.zeros([M, N], gl.float32, s_layout),
            use_acc=False, is_async=True,
        )  # fmt: skip
        mbarrier.wait(v_ready.index(old), old_phase)
        product = hopper.warpgroup_mma(p, v_tiles.index(old), acc, is_async=True)
        s = hopper.warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_free.index(stage), count=1)
        weights, top, total, shrink = _softmax(
            s, top, total, rows, starts, (end_block - 1 - i) * N, scale, MASK, DOCS
        )
        # p is read until then
        acc, p = hopper.warpgroup_mma_wait(0, deps=[product, p])
        mbarrier.arrive(v_free.index(old), count=1)
        acc_layout: gl.constexpr = acc.type.layout
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
        p = gl.convert_layout(weights.to(q.dtype), p.type.layout)
        i += 1
    return i, acc, p, top, total


@gluon.jit
def _write(x, strides, b, h, m, T, tile, D: gl.constexpr):
    """64 rows of a head, from m on, in a layout that writes whole lines of memory."""
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    start = x + b.to(gl.int64) * strides[0] + h.to(gl.int64) * strides[2]
    rows = m + gl.arange(0, M, gl.SliceLayout(1, flat))
    columns = gl.arange(0, D, gl.SliceLayout(0, flat))
    where = start + rows.to(gl.int64)[:, None] * strides[1] + columns[None, :]
    gl.store(where, gl.convert_layout(tile, flat), (rows < T)[:, None])


@gluon.jit
def _rest(x, DTYPE: gl.constexpr):
    """As in attention_triton.py."""
    SHIFT: gl.constexpr = 8 if DTYPE == gl.bfloat16 else 5
    kept = x.to(DTYPE).to(gl.float32)
    bits = x.to(gl.int32, bitcast=True) - kept.to(gl.int32, bitcast=True)
    bits = (bits + (1 << (SHIFT - 1))) >> SHIFT
    return gl.minimum(gl.maximum(bits, -128), 127).to(gl.int8)


@gluon.jit
def _consume(
    c: gl.constexpr, memory, tiles, barriers, where, scale,
    DOCS: gl.constexpr, REST: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Attention of the 64 queries m + 64 c, ..."""
    out, rest, lse, docs, strides = memory
    b, h, m, begin_block, end_block, TP, T, S, H = where
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    m += c * M
    first = m + S - T
    rows = first + gl.arange(0, M, row_layout)
    starts = gl.zeros_like(rows)
    diagonal = (first + 1) // N
    middle = begin_block
    if DOCS:
        starts = gl.load(docs + b * S + rows, rows < S, other=0)
        last = gl.load(docs + b * S + gl.minimum(first + M, S) - 1, first < S, other=0)
        middle = gl.minimum((last + N - 1) // N, gl.minimum(diagonal, end_block - 1))
        # a consumer past the last query must take the blocks all the same
        middle = gl.maximum(middle, begin_block)
    q = tiles[0].index(c)
    mbarrier.wait(q_ready.index(c), 0)
    mbarrier.wait(k_ready.index(0), 0)
    s = hopper.warpgroup_mma(
        q, tiles[1].index(0).permute((1, 0)), gl.zeros([M, N], gl.float32, s_layout), use_acc=False
    )
    mbarrier.arrive(k_free.index(0), count=1)
    total = gl.zeros([M], gl.float32, row_layout)
    # the last block is on the diagonal of one consumer at least
    weights, top, total, _ = _softmax(
        s, total - 1e30, total, rows, starts, (end_block - 1) * N, scale, True, DOCS
    )
    p = gl.convert_layout(weights.to(q.dtype), p_layout)
    acc = gl.zeros([M, D], gl.float32, acc_layout)
    above = gl.maximum(gl.minimum(diagonal, end_block - 1), middle)
    given = (end_block, q, tiles, barriers, rows, starts, scale)
    state = (1, acc, p, top, total)
    state = _blocks(above, end_block - 1, state, given, True, DOCS)
    state = _blocks(middle, above, state, given, False, DOCS)
    if DOCS:
        state = _blocks(begin_block, middle, state, given, True, DOCS)
    i, acc, p, top, total = state
    before = i - 1
    mbarrier.wait(v_ready.index(before % STAGES), (before // STAGES) & 1)
    acc = hopper.warpgroup_mma(p, tiles[2].index(before % STAGES), acc)
    gl.store(lse + (b * H + h).to(gl.int64) * TP + rows - (S - T), top + gl.log2(total), rows < S)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, acc_layout))[:, None]
    half: gl.constexpr = out.dtype.element_ty
    _write(out, strides[3], b, h, m, T, acc.to(half), D)
    if REST:
        _write(rest, strides[3], b, h, m, T, _rest(acc, half), D)


@gluon.jit
def _forward(
    q, k, v, out, rest, strides, lse, docs, TP, T, S, H, group, scale,
    DOCS: gl.constexpr, REST: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    b, h = gl.program_id(0) // H, gl.program_id(0) % H
    # the longest rows first
    m = (gl.num_programs(1) - 1 - gl.program_id(1)) * 2 * M
    end_block = (gl.minimum(m + S - T + 2 * M, S) + N - 1) // N
    begin_block = 0
    if DOCS:
        begin_block = gl.load(docs + b * S + m + S - T) // N
    tiles = (
        gl.allocate_shared_memory(q.dtype, [2, M, D], q.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES, N, D], k.layout),
        gl.allocate_shared_memory(v.dtype, [STAGES, N, D], v.layout),
    )
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(2):
        mbarrier.init(q_ready.index(c), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        # freed by both consumers
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    barriers = (q_ready, k_ready, k_free, v_ready, v_free)
    q_at = _corner(strides[0], b, h)
    q_at = (q_at[0] + m, q_at[1])
    k_at = _corner(strides[1], b, h // group)
    v_at = _corner(strides[2], b, h // group)
    where = (b, h, m, begin_block, end_block, TP, T, S, H)
    blocks = end_block - begin_block
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    memory = (out, rest, lse, docs, strides)
    gl.warp_specialize(
        [
            (_consume, (first, memory, tiles, barriers, where, scale, DOCS, REST, D)),
            (_consume, (second, memory, tiles, barriers, where, scale, DOCS, REST, D)),
            (_produce, (q, k, v, q_at, k_at, v_at, tiles, barriers, blocks, end_block)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None = None, keep: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention_launch.forward`; on Hopper, D of 64 or 128, in half precision."""
    run = launch.Run(q, k, docs)
    q, k, v = run.movable(q), run.movable(k), run.movable(v)
    out, lse = q.new_empty(q.shape), run.statistics(q, math.inf)
    rest = run.rest(out, keep)
    plain = run.tiles((M.value, N.value), q, k, v)
    tiles = [TensorDescriptor(x.base, x.shape, x.strides, x.block_shape, TILE) for x in plain]
    run.start(
        _forward, (run.B * run.H, triton.cdiv(run.T, 2 * M.value)), *tiles, out, rest,
        launch.strides_of(q, k, v, out), lse, run.borders(lse)[0], lse.shape[2],
        run.T, run.S, run.H, run.group, run.scale, DOCS=docs is not None, REST=keep, D=run.D,
        num_warps=4,
    )  # fmt: skip
    return out, rest, lse


def gate(arch: int) -> Iterator[dict[str, Any]]:
    """For kernels/check.py: nothing but for Hopper under the Triton this is written for."""
    if arch != 90 or not triton.__version__.startswith("3.6."):
        return
    from triton.experimental.gluon._runtime import GluonASTSource

    for D in (64, 128):
        heights = {"q": M.value, "k": N.value, "v": N.value}
        types: dict[str, Any] = {
            x: f"tensordesc<bf16[{n}, {D}],{TILE!r}>" for x, n in heights.items()
        }
        types |= {"out": "*bf16:16", "rest": "*i8:16", "lse": "*fp32:16", "docs": "*i32:16"}
        types["scale"] = "fp32"
        types |= dict.fromkeys(("TP", "T", "S", "H"), "i32:16") | {"group": "i32"}
        types["strides"] = (("i32:16",) * 3,) * 4
        for docs in (False, True):
            name = f"gluon forward bf16 D {D}{' documents' * docs}"
            constants = {"DOCS": docs, "REST": True, "D": D}
            own = {"products": True, "source": GluonASTSource}
            yield compilation(_forward, name, types, constants, 4, 1, **own)
