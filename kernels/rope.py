"""RoPE in Triton (Su et al. 2021; paper §2.2): (B, T, H, D) and a table (T, D/2) in, turned out.

    (x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos) for the pairs (x0, x1), (x2, x3), ...

The table is that of `reference.rope_table`; the gradient is turned back. One program turns all
heads of a token. Signatures are those of eager.py; `rope_` works in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from kernels.launch import case, launch

if TYPE_CHECKING:
    from torch import Tensor

# Elements of one program, and of one thread of it.
BLOCK, ELEMENTS_PER_THREAD = 4096, 16


@triton.jit
def rope_kernel(
    x_ptr, table_ptr, out_ptr, x_batch, x_token, x_head, out_batch, out_token, out_head,
    T, H, D,
    BACK: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(H, HEADS)
    heads = (tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS)[:, None]).to(tl.int64)
    token = (tl.program_id(0) // groups % T).to(tl.int64)
    batch = (tl.program_id(0) // groups // T).to(tl.int64)
    columns = tl.arange(0, 2 * PAIRS)
    # (PAIRS, 2): cosine and sine lie side by side, as the features of a pair do
    angles = tl.load(table_ptr + token * D + columns, mask=columns < D, other=0.0)
    cos, sin = tl.split(tl.reshape(angles, (1, PAIRS, 2)))
    if BACK:
        sin = -sin
    inside = (heads < H) & (columns < D)[None, :]
    source = x_ptr + batch * x_batch + token * x_token + heads * x_head + columns[None, :]
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x0, x1 = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
    turned = tl.join(x0 * cos - x1 * sin, x0 * sin + x1 * cos)
    target = out_ptr + batch * out_batch + token * out_token + heads * out_head + columns[None, :]
    tl.store(target, tl.reshape(turned, (HEADS, 2 * PAIRS)), mask=inside)


# -- launchers -------------------------------------------------------------------------------------


def rope_forward(x: Tensor, table: Tensor) -> Tensor:
    """The turned (B, T, H, D)."""
    return _turn(x, table, x.new_empty(x.shape), back=False)


def rope_backward(grad: Tensor, table: Tensor) -> Tensor:
    """Gradient of x: turned back."""
    return _turn(grad, table, grad.new_empty(grad.shape), back=True)


def rope_(x: Tensor, table: Tensor, back: bool = False) -> Tensor:
    """Turn x where it lies, or back; for a block's hand-written passes, which own their tensors."""
    return _turn(x, table, x, back)


def _turn(x: Tensor, table: Tensor, out: Tensor, back: bool) -> Tensor:
    import torch

    B, T, H, D = x.shape
    if x.stride(3) != 1:
        assert out is not x, "in place the features of a head must lie side by side"
        x = x.contiguous()
    angles = torch.view_as_real(table.contiguous())  # (T, D/2, 2)
    layout = _layout(H, D)
    launch(
        rope_kernel, B * T * triton.cdiv(H, layout["HEADS"]), x, angles, out,
        *x.stride()[:3], *out.stride()[:3], T, H, D, BACK=back, **layout,
    )  # fmt: skip
    return out


def _layout(H: int, D: int) -> dict[str, int]:
    pairs = triton.next_power_of_2(D // 2)
    heads = min(triton.next_power_of_2(H), max(BLOCK // (2 * pairs), 1))
    warps = max(heads * 2 * pairs // (32 * ELEMENTS_PER_THREAD), 1)
    return {"HEADS": heads, "PAIRS": pairs, "num_warps": min(warps, 8)}


def gate(arch: int) -> Iterator[dict[str, Any]]:
    """The kernel with the types and sizes it is launched with, for check.py."""
    for D, dtype in ((64, "bf16"), (128, "bf16"), (128, "fp16"), (128, "fp32")):
        types = {"table_ptr": "*fp32:16", "T": "i32", "H": "i32"}
        yield case(rope_kernel, f"{D}", dtype, types, BACK=True, **_layout(32, D))
