"""Slow processes: which rank keeps the others waiting, and by how much.

In a collective the fast wait for the slow, so steps take as long everywhere. What is compared is
a process's own part of a step: the time from one step to the next, less what it spent waiting in
collectives. On GPUs, whose work runs behind the host, a fixed product on the idle device stands
for it: a throttled GPU is found there, a slow host is not.
"""

import functools
import platform
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median, median_low
from typing import Any

import torch.distributed as dist

from llama.runtime.world import World

# Slower than the median of the ranks by this much is named; 1.2 must be, and clocks are not exact.
SLOW = 1.15
STEPS, FEWEST = 32, 10


class Pace:
    """Seconds that this process itself took for each of the last steps."""

    def __init__(self) -> None:
        self.own_s: deque[float] = deque(maxlen=STEPS)
        self.named: int | None = None
        self._since: float | None = None

    def mark(self) -> None:
        """A step has ended and the next one begins."""
        now = time.monotonic() - _waited()[0]
        if self._since is not None:
            self.own_s.append(now - self._since)
        self._since = now


@functools.cache
def _waited() -> list[float]:
    """Seconds this process has waited in collectives since the first call."""
    total, wait = [0.0], dist.Work.wait

    def timed(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        with waiting():
            return wait(work, *args, **kwargs)

    # torch's Python functions, FSDP's too, end in this method; it blocks on CPUs only
    dist.Work.wait = timed  # type: ignore[assignment, method-assign]
    return total


@contextmanager
def waiting() -> Iterator[None]:
    """What happens inside is no work of this process."""
    began = time.monotonic()
    yield
    _waited()[0] += time.monotonic() - began


def compare(pace: Pace, here: World, own_s: float | None = None) -> dict[str, Any]:
    """Values of a metrics row; rank 0 names a rank that has become slow. All ranks call it.

    `own_s` takes the place of what `pace` has measured.
    """
    if here.size == 1 or len(pace.own_s) < FEWEST:
        return {}
    times, nodes = zip(*here.gather((own_s or median(pace.own_s), platform.node())), strict=True)
    # of two, the faster one: the slower must not be its own measure
    usual, slowest = median_low(times), times.index(max(times))
    ratio = times[slowest] / usual
    if ratio > SLOW and slowest != pace.named:
        here.say(
            f"WARNING: rank {slowest} on {nodes[slowest]} is {ratio:.2f} x slower than the median "
            f"rank: {times[slowest]:.3g} s of its own a step, not {usual:.3g} s"
        )
        pace.named = slowest
    return {"own_s": usual, "own_s_max": times[slowest], "slowest_rank": slowest}
