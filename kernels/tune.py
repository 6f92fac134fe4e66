"""Measure tiles of the attention kernels on a GPU, write tiles.json: `python -m kernels.tune`.

For every head size and kernel: the sizes below that compile, fit and give the fastest pass over
16,384 tokens of 2,048 features win. A run never tunes; it reads the table. `kernels.check` then
compiles what was chosen for both architectures.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

TOKENS, FEATURES, SEQUENCE = 16_384, 2_048, 4_096
# M, N, warps, stages
CANDIDATES = list(map(list, product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))))


def fastest(
    candidates: Iterable[list[int]], seconds: Callable[[list[int]], float]
) -> tuple[list[int], float]:
    """The candidate that took the least time; those that raise do not fit."""
    timed = []
    for candidate in candidates:
        try:
            timed.append((seconds(candidate), candidate))
        except Exception as error:
            print(f"  {candidate}: {type(error).__name__}")
    if not timed:
        raise ValueError("none of the tiles runs on this GPU")
    least, best = min(timed)
    return best, least


def show(table: Any, depth: int = 0) -> str:
    """The table as JSON with a line for each head size."""
    if depth == 3:
        return json.dumps(table)
    space = " " * (depth + 1)
    inner = (f"{space}{json.dumps(key)}: {show(value, depth + 1)}" for key, value in table.items())
    return "{\n" + ",\n".join(inner) + "\n" + " " * depth + "}" + "\n" * (depth == 0)


def work(kernel: str, head_dim: int, half: bool, docs: bool) -> Callable[[], Any]:
    """One pass that runs the kernel: the forward pass, or the whole backward pass."""
    import torch

    from kernels import attention_launch, attention_op

    shape = TOKENS // SEQUENCE, SEQUENCE, FEATURES // head_dim, head_dim
    dtype = torch.bfloat16 if half else torch.float32
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4))
    ids = (torch.rand(shape[:2], device="cuda") < 1 / 1000).cumsum(1)
    given = attention_op.documents(ids) if docs else None
    out, rest, lse = attention_launch.forward(q, k, v, given)
    if kernel == "forward":
        return lambda: attention_launch.forward(q, k, v, given)
    tensors = grad, q, k, v, out, rest, lse, given, kernel != "fused"
    return lambda: attention_launch.backward(*tensors)


def seconds(
    tiles: dict[str, list[int]], name: str, run: Callable[[], Any], tile: list[int]
) -> float:
    """Median time of `run` with this tile of the kernel `name`."""
    import triton

    tiles[name] = tile
    return float(triton.testing.do_bench(run, return_mode="median")) / 1e3


def main() -> int:
    parser = argparse.ArgumentParser("python -m kernels.tune", description=__doc__)
    parser.add_argument("--only", default="", help="part of a name, as 'half 128 forward'")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("error: tuning needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 2
    from kernels import attention_launch as launch

    table = launch.table()
    arch = f"sm_{launch.arch_of(torch.empty(0, device='cuda'))}"
    for kind, sizes in table[arch].items():
        for width, tiles in sizes.items():
            for name in [name for name in tiles if args.only in f"{kind} {width} {name}"]:
                kernel, docs = name.split(" ")[0], name.endswith("documents")
                run = work(kernel, int(width), kind == "half", docs)

                time = partial(seconds, tiles, name, run)
                tiles[name], least = fastest([tiles[name], *CANDIDATES], time)
                print(f"{arch} {kind} {width} {name}: {tiles[name]}, {1e6 * least:.0f} us")
                launch.TABLE.write_text(show(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
