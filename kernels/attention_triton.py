"""Causal attention in Triton, forward and backward: softmax(q kᵀ / sqrt(D)) v, tile by tile.

(B, T, H, D) queries over (B, S, K, D) keys and values in, outputs or gradients of the same shapes
out, taken by strides. One pass over the keys with a running maximum (online softmax: Milakov and
Gimelshein 2018; Dao 2023, FlashAttention-2), in base 2:

    s = q kᵀ · scale   with scale = log2(e) / sqrt(D), root = 1 / sqrt(D)
    p = 2^(s - lse)    lse = log2 Σ 2^s of a row, saved for the backward pass
    o = p v            dv = pᵀ do     dp = do vᵀ
    ds = p (dp - δ)    δ = Σ o do     dq = ds k · root     dk = dsᵀ q · root

Where few keys have all the weight, dp - δ is a small difference that the rounding of o would drown.
So δ takes o as it was before it was rounded to half precision, of which a byte is kept (`_rest`);
in float32 it is Σ p dp, with the dp that it is taken from.
Blocks of keys that no query of a tile sees are never computed. What is left has three parts: the
edge where documents begin, blocks that all queries see, and the diagonal; only the middle goes
unmasked. On Hopper tiles move by TMA with descriptors made on the host, elsewhere by pointers.
This file imports without torch, so that kernels/check.py compiles it where only triton is.
"""

import math

import triton
import triton.language as tl

# -- tiles in memory -------------------------------------------------------------------------------


@triton.jit
def _head(x, strides, b, h, length, ROWS: tl.constexpr, D: tl.constexpr):
    """A descriptor for tiles (ROWS, D), and the row and column at which head h begins in it.

    The host's has a row for every stride of a token, so that a tile may reach past this head: what
    is there is never seen, as it comes after all queries. One made of a pointer spans this head.
    """
    start = tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[2]
    if isinstance(x, tl.tensor_descriptor):
        return x, (start // strides[1]).to(tl.int32), (start % strides[1]).to(tl.int32)
    else:
        return tl.make_tensor_descriptor(x + start, [length, D], [strides[1], 1], [ROWS, D]), 0, 0


@triton.jit
def _load(x, t):
    """Rows t, t + 1, ... of a head."""
    return x[0].load([x[1] + t, x[2]])


@triton.jit
def _row(x, row, length, t, M: tl.constexpr):
    """Elements t to t + M of one row of a matrix whose rows lie `length` apart."""
    if isinstance(x, tl.tensor_descriptor):
        return x.load([row, t]).reshape(M)
    else:
        return tl.load(x + tl.cast(row, tl.int64) * length + t + tl.arange(0, M))


@triton.jit
def _pointers(x, strides, b, h, t, tile):
    start = x + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[2]
    rows, columns = t + tl.arange(0, tile.shape[0]), tl.arange(0, tile.shape[1])
    return start + rows.to(tl.int64)[:, None] * strides[1] + columns[None, :]


@triton.jit
def _store(x, strides, b, h, t, tile, length):
    inside = t + tl.arange(0, tile.shape[0]) < length
    where = _pointers(x, strides, b, h, t, tile)
    tl.store(where, tile.to(x.dtype.element_ty), inside[:, None])


@triton.jit
def _add(x, strides, b, h, t, tile, length):
    """Add a tile to memory, in whatever order the programs come."""
    if isinstance(x, tl.tensor_descriptor):
        place = _head(x, strides, b, h, length, tile.shape[0], tile.shape[1])
        x.atomic_add([place[1] + t, place[2]], tile)
    else:
        inside = t + tl.arange(0, tile.shape[0]) < length
        tl.atomic_add(_pointers(x, strides, b, h, t, tile), tile, inside[:, None], sem="relaxed")


@triton.jit
def _rest(x, DTYPE: tl.constexpr):
    """The 8 bits of float32 x that come after those kept by DTYPE, as a signed difference."""
    SHIFT: tl.constexpr = 8 if DTYPE == tl.bfloat16 else 5
    kept = x.to(DTYPE).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True) - kept.to(tl.int32, bitcast=True)
    bits = (bits + (1 << (SHIFT - 1))) >> SHIFT
    return tl.minimum(tl.maximum(bits, -128), 127).to(tl.int8)


@triton.jit
def _with_rest(kept, rest):
    """x in float32 again, to 2^-17 of bfloat16 and 2^-20 of float16."""
    SHIFT: tl.constexpr = 8 if kept.dtype == tl.bfloat16 else 5
    bits = kept.to(tl.float32).to(tl.int32, bitcast=True) + (rest.to(tl.int32) << SHIFT)
    return bits.to(tl.float32, bitcast=True)


# -- which keys a query sees -----------------------------------------------------------------------


@triton.jit
def _keys_of(docs, first, S, DOCS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Where edge, middle and diagonal of the M queries from position `first` begin; the end."""
    last = tl.minimum(first + M, S) - 1
    edge = 0
    middle = 0
    diagonal = (first + 1) // N * N
    if DOCS:
        edge = tl.load(docs + first) // N * N
        middle = tl.minimum(tl.cdiv(tl.load(docs + last), N) * N, diagonal)
    return edge, middle, diagonal, last + 1


@triton.jit
def _queries_of(ends, n, T, S, DOCS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Where diagonal, middle and edge of the queries that see keys n, ..., n + N - 1 begin; end."""
    before = S - T
    end = T
    diagonal = tl.maximum(n - before, 0) // M * M
    if DOCS:
        end = tl.maximum(tl.load(ends + tl.minimum(n + N, S) - 1) + 1 - before, 0)
    middle = tl.minimum(tl.cdiv(tl.maximum(n + N - 1 - before, 0), M) * M, end)
    edge = end
    if DOCS:
        edge = tl.maximum((tl.load(ends + n) + 1 - before) // M * M, middle)
    return diagonal, middle, edge, end


@triton.jit
def _seen(n, rows, starts, DOCS: tl.constexpr, N: tl.constexpr):
    """Which of the keys n, ..., n + N - 1 each query sees."""
    keys = n + tl.arange(0, N)
    seen = keys[None, :] <= rows[:, None]
    if DOCS:
        seen &= keys[None, :] >= starts[:, None]
    return seen


# -- forward ---------------------------------------------------------------------------------------


@triton.jit
def _forward_blocks(
    acc, top, total, q, k, v, begin, end, rows, starts, scale,
    MASK: tl.constexpr, DOCS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    for n in tl.range(begin, end, N):
        s = tl.dot(q, _load(k, n).T, input_precision="ieee")
        if MASK:
            s = tl.where(_seen(n, rows, starts, DOCS, N), s, -math.inf)
        higher = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(tl.fma(s, scale, -higher[:, None]))
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v_tile = _load(v, n)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return acc, top, total


@triton.jit
def _forward(
    q, k, v, out, rest, strides, lse, docs, TP, T, S, H, group, scale,
    DOCS: tl.constexpr, REST: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    kv = h // group
    # the longest rows first, so that short ones fill the gaps at the end
    t = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    k = _head(k, strides[1], b, kv, S, N, D)
    v = _head(v, strides[2], b, kv, S, N, D)
    docs += tl.cast(b, tl.int64) * S
    parts = _keys_of(docs, t + S - T, S, DOCS, M, N)
    rows = t + S - T + tl.arange(0, M)
    starts = tl.zeros_like(rows)
    if DOCS:
        starts = tl.load(docs + rows, rows < S, other=0)
    q = _load(_head(q, strides[0], b, h, T, M, D), t)
    acc = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    # finite, as -inf - -inf of a row that sees nothing yet would be NaN
    top = total - 1e30
    for part in tl.static_range(0 if DOCS else 1, 3):
        acc, top, total = _forward_blocks(
            acc, top, total, q, k, v, parts[part], parts[part + 1], rows, starts, scale,
            part != 1, DOCS, N,
        )  # fmt: skip
    o = acc / total[:, None]
    _store(out, strides[3], b, h, t, o, T)
    if REST:
        _store(rest, strides[4], b, h, t, _rest(o, out.dtype.element_ty), T)
    rows = t + tl.arange(0, M)
    wide: tl.constexpr = lse.dtype.element_ty
    sums = top.to(wide) + tl.log2(total.to(wide))
    tl.store(lse + tl.program_id(0).to(tl.int64) * TP + rows, sums, rows < T)


# -- backward --------------------------------------------------------------------------------------


@triton.jit
def _weights(s, scale, lse):
    """2^(s scale - lse); beside float32 inputs lse is float64, as its rounding is in every p."""
    high = lse.to(tl.float32)
    exponents = tl.fma(s, scale, -high)
    if lse.dtype == tl.float64:
        rest = (lse - high.to(tl.float64)).to(tl.float32)
        # of rows past the last query, inf - inf
        exponents -= tl.where(high < math.inf, rest, 0.0)
    return tl.exp2(exponents)


@triton.jit
def _delta(
    out, rest, grad, strides, delta, TP, T, H,
    REST: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    t = tl.program_id(1) * M
    o = _load(_head(out, strides[0], b, h, T, M, D), t)
    do = _load(_head(grad, strides[2], b, h, T, M, D), t).to(tl.float32)
    rows = t + tl.arange(0, M)
    if REST:
        o = _with_rest(o, tl.load(_pointers(rest, strides[1], b, h, t, o), (rows < T)[:, None]))
    tl.store(delta + tl.program_id(0).to(tl.int64) * TP + rows, tl.sum(o * do, 1), rows < T)


@triton.jit
def _delta_blocks(
    delta, q, do, k, v, begin, end, rows, starts, lse, scale,
    MASK: tl.constexpr, DOCS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    for n in tl.range(begin, end, N):
        p = _weights(tl.dot(q, _load(k, n).T, input_precision="ieee"), scale, lse[:, None])
        share = p * tl.dot(do, _load(v, n).T, input_precision="ieee")
        if MASK:
            share = tl.where(_seen(n, rows, starts, DOCS, N), share, 0.0)
        delta += tl.sum(share, 1)
    return delta


@triton.jit
def _dq_blocks(
    dq, q, do, k, v, begin, end, rows, starts, lse, delta, scale,
    MASK: tl.constexpr, DOCS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    for n in tl.range(begin, end, N):
        k_tile = _load(k, n)
        s = tl.dot(q, k_tile.T, input_precision="ieee")
        p = _weights(s, scale, lse[:, None])
        dp = tl.dot(do, _load(v, n).T, input_precision="ieee")
        ds = p * (dp - delta[:, None])
        if MASK:
            seen = _seen(n, rows, starts, DOCS, N)
            # a query that sees one key alone has no gradient, whatever dp and δ are rounded to
            ds = tl.where(seen & (rows > starts)[:, None], ds, 0.0)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit
def _dq(
    q, k, v, grad, dq, strides, lse, delta, docs, TP, T, S, H, group, scale, root,
    DOCS: tl.constexpr, EXACT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    kv = h // group
    t = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    k = _head(k, strides[1], b, kv, S, N, D)
    v = _head(v, strides[2], b, kv, S, N, D)
    docs += tl.cast(b, tl.int64) * S
    parts = _keys_of(docs, t + S - T, S, DOCS, M, N)
    rows = t + S - T + tl.arange(0, M)
    starts = tl.zeros_like(rows)
    if DOCS:
        starts = tl.load(docs + rows, rows < S, other=0)
    q = _load(_head(q, strides[0], b, h, T, M, D), t)
    do = _load(_head(grad, strides[3], b, h, T, M, D), t)
    of_head = tl.program_id(0).to(tl.int64) * TP + t + tl.arange(0, M)
    lse = tl.load(lse + of_head, rows < S, other=math.inf)
    if EXACT:
        d = tl.zeros([M], tl.float32)
        for part in tl.static_range(0 if DOCS else 1, 3):
            d = _delta_blocks(
                d, q, do, k, v, parts[part], parts[part + 1], rows, starts, lse, scale,
                part != 1, DOCS, N,
            )  # fmt: skip
        tl.store(delta + of_head, d, rows < S)
    else:
        d = tl.load(delta + of_head, rows < S, other=0.0)
    acc = tl.zeros([M, D], tl.float32)
    for part in tl.static_range(0 if DOCS else 1, 3):
        acc = _dq_blocks(
            acc, q, do, k, v, parts[part], parts[part + 1], rows, starts, lse, d, scale,
            part != 1, DOCS, N,
        )  # fmt: skip
    _store(dq, strides[4], b, h, t, acc * root, T)


@triton.jit
def _dkdv_blocks(
    dk, dv, q, do, k, v, dq, dq_strides, b, h, begin, end, keys, last, alone, lse, delta,
    row, TP, T, S, scale, root,
    MASK: tl.constexpr, DOCS: tl.constexpr, FUSED: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Queries `begin` to `end` of one head; everything transposed: pᵀ is (N, M)."""
    for t in tl.range(begin, end, M, disable_licm=True):
        q_tile = _load(q, t)
        s = tl.dot(k, q_tile.T, input_precision="ieee")
        do_tile = _load(do, t)
        dp = tl.dot(v, do_tile.T, input_precision="ieee")
        p = _weights(s, scale, _row(lse, row, TP, t, M)[None, :])
        if MASK:
            rows = t + S - T + tl.arange(0, M)
            seen = keys[:, None] <= rows[None, :]
            if DOCS:
                seen &= last[:, None] >= rows[None, :]
            p = tl.where(seen, p, 0.0)
        ds = p * (dp - _row(delta, row, TP, t, M)[None, :])
        if MASK:
            ds = tl.where(alone[:, None] == rows[None, :], 0.0, ds)
        ds = ds.to(q_tile.dtype)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
        dk = tl.dot(ds, q_tile, dk, input_precision="ieee")
        if FUSED:
            share = tl.dot(ds.T, k, input_precision="ieee") * root
            _add(dq, dq_strides, b, h, t, share, T)
    return dk, dv


@triton.jit
def _dkdv(
    q, k, v, grad, dk, dv, dq, strides, lse, delta, docs, ends, TP, T, S, K, group, scale, root,
    DOCS: tl.constexpr, FUSED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    b, kv = tl.program_id(0) // K, tl.program_id(0) % K
    # the first keys are seen by the most queries
    n = tl.program_id(1) * N
    ends += tl.cast(b, tl.int64) * S
    parts = _queries_of(ends, n, T, S, DOCS, M, N)
    keys = n + tl.arange(0, N)
    last = keys
    starts = tl.zeros_like(keys)
    if DOCS:
        last = tl.load(ends + keys, keys < S, other=0)
        starts = tl.load(docs + tl.cast(b, tl.int64) * S + keys, keys < S, other=0)
    # the one query that sees this key alone, as in _dq_blocks
    alone = tl.where(keys == starts, keys, -1)
    k = _load(_head(k, strides[1], b, kv, S, N, D), n)
    v = _load(_head(v, strides[2], b, kv, S, N, D), n)
    to_k = tl.zeros([N, D], tl.float32)
    to_v = tl.zeros([N, D], tl.float32)
    for h in range(kv * group, kv * group + group):
        q_of = _head(q, strides[0], b, h, T, M, D)
        do_of = _head(grad, strides[3], b, h, T, M, D)
        for part in tl.static_range(3 if DOCS else 2):
            to_k, to_v = _dkdv_blocks(
                to_k, to_v, q_of, do_of, k, v, dq, strides[6], b, h, parts[part], parts[part + 1],
                keys, last, alone, lse, delta, b * K * group + h,
                TP, T, S, scale, root, part != 1, DOCS, FUSED, M,
            )  # fmt: skip
    _store(dk, strides[4], b, kv, n, to_k * root, S)
    _store(dv, strides[5], b, kv, n, to_v, S)
