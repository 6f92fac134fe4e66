"""What the benchmarks on a GPU share: the device or a refusal, medians by its clock, its rates."""

import statistics
from collections.abc import Callable
from functools import cache

import torch

from benchmarks import harness
from llama.cli import UserError

FLUSH_BYTES = 2**30


def device() -> torch.device:
    """The GPU; raises `UserError` where there is none."""
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA GPU, and torch finds none here")
    return torch.device("cuda")


def seconds(work: Callable[[], object], where: torch.device, n: int = 20) -> float:
    """Median of n calls after three, each with caches emptied.

    Emptying takes the GPU longer than Python takes to launch: what is measured is the kernels.
    """
    if where.type == "cpu":
        return statistics.median(harness.timed(work).wall_s for _ in range(n))
    for _ in range(3):
        work()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=where)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    for start, end in marks:
        flush.zero_()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in marks)


def peak_bytes(work: Callable[[], object], where: torch.device) -> int:
    """Most bytes that a call holds beyond those held before it; 0 on a CPU."""
    if where.type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def wait(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize()


def name() -> str:
    return torch.cuda.get_device_name()


@cache
def rates(where: torch.device, n: int = 8192) -> tuple[float, float]:
    """FLOP/s of a bfloat16 matrix product and bytes/s of a copy: what this chip reaches."""
    a, b = torch.randn(2, n, n, device=where).bfloat16()
    out = torch.empty_like(a)
    source = torch.randn(8 * n * n, device=where)
    target = torch.empty_like(source)
    product = seconds(lambda: torch.mm(a, b, out=out), where)
    copy = seconds(lambda: target.copy_(source), where)
    return 2 * n**3 / product, 2 * source.nbytes / copy
