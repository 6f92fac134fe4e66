"""Launches the attention kernels of attention_triton.py: plain functions, tensors in, tensors out.

(B, T, H, D) queries and (B, S, K, D) keys and values, by their strides; documents as the (2, B, S)
positions of `attention.documents`. Tiles come from tiles.json, measured beforehand and checked in:
nothing is tuned inside a run, so that every process of it runs the same kernels. The file imports
without torch, for kernels/check.py.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import attention_triton as kernels
from kernels.launch import STATISTICS_ROWS, compilation, empty32

if TYPE_CHECKING:
    from torch import Tensor


class Tile(NamedTuple):
    """M queries by N keys, and how the kernel is compiled."""

    M: int
    N: int
    warps: int
    stages: int


DELTA = Tile(64, 0, 4, 1)
Table = dict[str, dict[str, dict[str, dict[str, list[int]]]]]
TABLE = Path(__file__).with_name("tiles.json")


@functools.cache
def table() -> Table:
    """Tiles by architecture, kind of dtype, head size and kernel; `kernels.tune` writes them."""
    found: Table = json.loads(TABLE.read_text())
    return found


def tile(arch: int, itemsize: int, width: int, kernel: str, docs: bool) -> Tile | None:
    """The tile of a kernel; with documents some need a smaller one. None: no such kernel."""
    tiles = table()[f"sm_{arch}"]["float32" if itemsize == 4 else "half"][str(width)]
    found = tiles.get(f"{kernel} documents") if docs else None
    found = found or tiles.get(kernel)
    return Tile(*found) if found else None


def arch_of(x: Tensor) -> int:
    """90 on Hopper, where tiles move by TMA; 80 on every other chip, where they do by pointers."""
    import torch

    return 90 if x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0) else 80


def forward(
    q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None = None, keep: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, T, H, D), what its rounding cut off, and lse, log2 of the sums of 2^s.

    lse is (B, H, T up to a multiple of STATISTICS_ROWS), float32, beside float32 inputs float64;
    past T it is infinite. What was cut off is int8 like the output, for the backward pass: empty
    where there is none to `keep`, and beside float32.
    """
    run = Run(q, k, docs)
    q, k, v = run.movable(q), run.movable(k), run.movable(v)
    out, lse = q.new_empty(q.shape), run.statistics(q, math.inf, wide=True)
    rest = run.rest(out, keep)
    tile = run.tile("forward")
    run.launch(
        kernels._forward, (run.B * run.H, triton.cdiv(run.T, tile.M)), tile,
        *run.tiles(tile, q, k, v), out, rest, strides_of(q, k, v, out, out), lse,
        run.borders(lse)[0], lse.shape[2], run.T, run.S, run.H, run.group, run.scale,
        DOCS=docs is not None, REST=rest.numel() > 0,
    )  # fmt: skip
    return run.cut(out), run.cut(rest), lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rest: Tensor, lse: Tensor,
    docs: Tensor | None = None, deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, from the gradient of `out` and what `forward` returned.

    Not deterministic: dq is summed by atomic additions along with dk and dv, where such a kernel is
    in the table. That is five products instead of seven, in an order that is never the same.
    """
    run = Run(q, k, docs)
    grad, q, k, v, out = (run.movable(x) for x in (grad, q, k, v, out))
    kept = rest.numel() > 0
    rest = run.movable(rest) if kept else rest
    delta, exact = run.statistics(q, 0.0), run.itemsize == 4
    if not exact:
        run.launch(
            kernels._delta, (run.B * run.H, triton.cdiv(run.T, DELTA.M)), DELTA,
            run.tiles_of(out, DELTA.M), rest, run.tiles_of(grad, DELTA.M),
            strides_of(out, rest if kept else out, grad), delta, delta.shape[2], run.T, run.H,
            REST=kept,
        )  # fmt: skip
    fused = not (deterministic or exact) and run.tile("fused") is not None
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dq = empty32(q, *q.shape).zero_() if fused else q.new_empty(q.shape)
    if not fused:
        # before the others, as in float32 it makes δ
        tile = run.tile("dq")
        run.launch(
            kernels._dq, (run.B * run.H, triton.cdiv(run.T, tile.M)), tile,
            *run.tiles(tile, q, k, v, grad), dq, strides_of(q, k, v, grad, dq), lse, delta,
            run.borders(lse)[0], lse.shape[2], run.T, run.S, run.H, run.group, run.scale, run.root,
            DOCS=docs is not None, EXACT=exact,
        )  # fmt: skip
    tile = run.tile("fused" if fused else "dkdv")
    run.launch(
        kernels._dkdv, (run.B * run.K, triton.cdiv(run.S, tile.N)), tile,
        *run.tiles(tile, q, k, v, grad), dk, dv, run.tiles_of(dq, tile.M) if fused else dq,
        strides_of(q, k, v, grad, dk, dv, dq), run.rows_of(lse, tile.M), run.rows_of(delta, tile.M),
        *run.borders(lse), lse.shape[2], run.T, run.S, run.K, run.group,
        run.scale, run.root, DOCS=docs is not None, FUSED=fused,
    )  # fmt: skip
    return run.cut(dq.to(q.dtype)), run.cut(dk), run.cut(dv)


def strides_of(*tensors: Tensor) -> tuple[tuple[int, int, int], ...]:
    return tuple((x.stride(0), x.stride(1), x.stride(2)) for x in tensors)


class Run:
    """What the launches of one forward or backward pass share."""

    def __init__(self, q: Tensor, k: Tensor, docs: Tensor | None) -> None:
        (self.B, self.T, self.H, self.D), (self.S, self.K) = q.shape, k.shape[1:3]
        self.q, self.docs, self.arch, self.itemsize = q, docs, arch_of(q), q.element_size()
        self.width = max(64 if self.itemsize == 4 else 32, triton.next_power_of_2(self.D))
        self.group, self.root = self.H // self.K, 1 / math.sqrt(self.D)
        self.scale = self.root / math.log(2)

    def tile(self, kernel: str) -> Any:
        return tile(self.arch, self.itemsize, self.width, kernel, self.docs is not None)

    def launch(
        self, kernel: Any, grid: tuple[int, int], tile: Tile, *arguments: Any, **constants: Any
    ) -> None:
        if tile.N:
            constants["N"] = tile.N
        constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
        self.start(kernel, grid, *arguments, **constants, M=tile.M, D=self.width)

    def start(self, kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
        """Launch on the device of q: Triton takes the current one."""
        import torch

        if 0 not in grid:
            with torch.cuda.device_of(self.q):
                # chips that came after Hopper make descriptors of pointers in memory
                triton.set_allocator(lambda size, *_: self.q.new_empty(size, dtype=torch.int8))
                kernel[grid](*arguments, **constants)

    def rest(self, out: Tensor, keep: bool) -> Tensor:
        import torch

        kept = keep and self.itemsize == 2
        return out.new_empty(out.shape if kept else (0,), dtype=torch.int8)

    def cut(self, x: Tensor) -> Tensor:
        """Without the columns that `movable` added."""
        return x if x.shape[-1] in (0, self.D) else x[..., : self.D].contiguous()

    def statistics(self, x: Tensor, padding: float, wide: bool = False) -> Tensor:
        """(B, H, T rounded up) with `padding` past T, wider than x if `wide`."""
        import torch

        dtype = torch.float64 if wide and self.itemsize == 4 else torch.float32
        shape = self.B, self.H, triton.cdiv(self.T, STATISTICS_ROWS) * STATISTICS_ROWS
        if self.T % STATISTICS_ROWS == 0:
            return x.new_empty(shape, dtype=dtype)
        return x.new_full(shape, padding, dtype=dtype)

    def movable(self, x: Tensor) -> Tensor:
        """x, or a copy that tiles can be read from: a power of two wide, on 16-byte borders."""
        if self.width != self.D:
            from torch.nn.functional import pad

            return pad(x, (0, self.width - self.D))
        unit = 16 // x.element_size()
        (B, T, H, D), (b, t, h, d) = x.shape, x.stride()
        fits = d == 1 and x.data_ptr() % 16 == 0 and all(s % unit == 0 for s in (b, t, h))
        if fits and self.arch == 90:
            # a head is whole columns of the rows that lie a token's stride apart
            heads = 1 if (H - 1) * h + D <= t else H
            fits = t >= D and (B == 1 or b % t == 0) and (heads == 1 or h % t == 0)
            # past its last token a tile reads on in memory: that must be the tensor's own there, as
            # 0 · NaN of what nobody has written would be NaN
            own = (heads == 1 or h == T * t) and (B == 1 or b == heads * T * t)
            fits = fits and (own or T % STATISTICS_ROWS == 0)
        # not `contiguous`, to which the stride of an axis of one element is nothing
        return x if fits else x.new_empty(x.shape).copy_(x)

    def tiles_of(self, x: Tensor, rows: int) -> Any:
        """(B, T, H, D) as a kernel takes what it reads in tiles: see `_head`."""
        if self.arch != 90:
            return x
        (B, T, H, D), (b, t, h, _) = x.shape, x.stride()
        last = (B - 1) * b + (H - 1) * h if h % t == 0 else (B - 1) * b
        columns = D if h % t == 0 else (H - 1) * h + D
        return TensorDescriptor(x, [last // t + T, columns], [t, 1], [rows, D])

    def tiles(self, tile: Sequence[int], *tensors: Tensor) -> list[Any]:
        """q, k, v and the gradient, or the first of them, in tiles as high as M or N of `tile`."""
        M, N = tile[:2]
        return [self.tiles_of(x, n) for x, n in zip(tensors, (M, N, N, M), strict=False)]

    def rows_of(self, x: Tensor, columns: int) -> Any:
        """(B, H, padded T) as a kernel takes what it reads in rows: see `_row`."""
        if self.arch != 90 or self.itemsize == 4:
            return x
        x = x.flatten(0, 1)
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, columns])

    def borders(self, unused: Tensor) -> tuple[Tensor, Tensor]:
        """First and last positions of documents; something else where there are none."""
        return (unused, unused) if self.docs is None else (self.docs[0], self.docs[1])


# -- what the compile gate compiles ----------------------------------------------------------------


def gate(arch: int) -> Iterator[dict[str, Any]]:
    """Every kernel of the table with the types it is launched with, for kernels/check.py.

    With documents, and at the head sizes of LLaMA also without.
    """
    yield _case(arch, 2, 128, "delta", False, DELTA)
    for kind, sizes in table()[f"sm_{arch}"].items():
        for width, tiles in sizes.items():
            fast = kind == "half" and width in ("64", "128")
            for kernel in (name for name in tiles if "documents" not in name):
                for docs in (False, True) if fast else (True,):
                    itemsize = 4 if kind == "float32" else 2
                    found = tile(arch, itemsize, int(width), kernel, docs)
                    assert found is not None
                    options = {"products": kind == "half", "spills": not fast}
                    yield _case(arch, itemsize, int(width), kernel, docs, found, **options)


def _case(
    arch: int, itemsize: int, width: int, kernel: str, docs: bool, tile: Tile, **expected: bool
) -> dict[str, Any]:
    element, fused = "fp32" if itemsize == 4 else "bf16", kernel == "fused"
    function = kernels._dkdv if fused else getattr(kernels, f"_{kernel}")
    read = {"q": tile.M, "k": tile.N, "v": tile.N, "grad": tile.M}
    tensors = (*read, "out", "rest", "dq", "dk", "dv")
    types: dict[str, Any] = dict.fromkeys(tensors, f"*{element}:16") | {"rest": "*i8:16"}
    types |= {"lse": "*fp64:16" if itemsize == 4 else "*fp32:16", "delta": "*fp32:16"}
    if fused:
        # it adds its dq; the others write theirs
        types["dq"] = "*fp32:16"
    if arch == 90:
        types |= {x: f"tensordesc<{element}[{n}, {width}]>" for x, n in read.items()}
        if kernel == "delta":
            types["out"] = types["grad"]
        if kernel in ("dkdv", "fused") and itemsize == 2:
            types |= {x: f"tensordesc<fp32[1, {tile.M}]>" for x in ("lse", "delta")}
        if fused:
            types["dq"] = f"tensordesc<fp32[{tile.M}, {width}]>"
    types |= dict.fromkeys(("docs", "ends"), "*i32:16") | {"group": "i32"}
    types |= dict.fromkeys(("TP", "T", "S", "H", "K"), "i32:16")
    types |= dict.fromkeys(("scale", "root"), "fp32")
    types["strides"] = (("i32:16",) * 3,) * len(set(tensors) & set(function.arg_names))
    constants: dict[str, Any] = {"DOCS": docs, "REST": itemsize == 2, "EXACT": itemsize == 4}
    constants |= {"FUSED": fused, "M": tile.M, "N": tile.N, "D": width}
    name = f"{kernel} {element} D {width}{' documents' * docs}"
    return compilation(function, name, types, constants, tile.warps, tile.stages, **expected)
