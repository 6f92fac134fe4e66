"""Slow processes: which rank keeps the others waiting, and by how much.

In a collective the fast wait for the slow, so steps take as long everywhere. What is compared is
a process's own part of a step: the time from one step to the next, less what it spent waiting, in
collectives and for its device. On GPUs, whose work runs behind the host, that is the host's part,
which matters where it never waits; a fixed product on the idle device stands for the other. On CPUs
the collectives inside compiled blocks count as work: ranks that wait there all look alike.
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
# A host that works so much of its time is what its device waits for.
BUSY = 0.9


class Pace:
    """Seconds that each of the last steps took, and those that this process itself took for it."""

    def __init__(self) -> None:
        self.step_s: deque[float] = deque(maxlen=STEPS)
        self.own_s: deque[float] = deque(maxlen=STEPS)
        self.named: set[tuple[str, int]] = set()
        self._since: tuple[float, float] | None = None

    def mark(self) -> None:
        """A step has ended and the next one begins."""
        now, waited = time.monotonic(), _waited()[0]
        if self._since:
            self.step_s.append(now - self._since[0])
            self.own_s.append(self.step_s[-1] - (waited - self._since[1]))
        self._since = now, waited


@functools.cache
def _waited() -> list[float]:
    """Seconds this process has waited in collectives since the first call."""
    # torch's Python functions, FSDP's too, end in this method; it blocks on CPUs only
    dist.Work.wait = waiting()(dist.Work.wait)  # type: ignore[method-assign]
    return [0.0]


@contextmanager
def waiting() -> Iterator[None]:
    """What happens inside is no work of this process."""
    began = time.monotonic()
    yield
    _waited()[0] += time.monotonic() - began


def compare(pace: Pace, here: World, device_s: float | None = None) -> dict[str, Any]:
    """Values of a metrics row; rank 0 names a rank that has become slow. All ranks call it.

    `device_s` is what a fixed product takes where it stands for the step.
    """
    if here.size == 1 or len(pace.own_s) < FEWEST:
        return {}
    own_s = median(pace.own_s)
    busy = device_s is None or own_s > BUSY * median(pace.step_s)
    told = here.gather((own_s, device_s, busy, platform.node()))
    hosts, devices, busy_ones, nodes = zip(*told, strict=True)
    measures = {"of its own a step": hosts} | ({"on its GPU": devices} if device_s else {})
    for what, times in measures.items():
        # of two, the faster one: the slower must not be its own measure
        usual, slowest = median_low(times), times.index(max(times))
        ratio, matters = times[slowest] / usual, times is devices or busy_ones[slowest]
        if ratio > SLOW and matters and (what, slowest) not in pace.named:
            here.say(
                f"WARNING: rank {slowest} on {nodes[slowest]} is {ratio:.2f} x slower than the "
                f"median rank: {times[slowest]:.3g} s {what}, not {usual:.3g} s"
            )
            pace.named.add((what, slowest))
    return {"own_s": usual, "own_s_max": times[slowest], "slowest_rank": slowest}
