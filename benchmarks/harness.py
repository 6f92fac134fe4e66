"""What every benchmark shares: turns in alternation, medians, the machine, results on disk.

Ways of doing the same thing go in; their times and ratios come out. They take turns, A B A B, and a
ratio is the median over rounds: on a machine shared with others that is the only figure to trust,
and CPU time more than wall time. `save` writes results/<machine>/.
"""

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama import cli, files

RESULTS = Path(__file__).parent / "results"


# -- time ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What one call took; CPU time is that of all threads of this process."""

    wall_s: float
    cpu_s: float


def timed(work: Callable[[], object]) -> Turn:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Turn(time.perf_counter() - wall, time.process_time() - cpu)


def rounds(n: int, *works: Callable[[], object]) -> list[tuple[Turn, ...]]:
    """`n` turns of each in alternation, after one of each that does not count."""
    return [tuple(timed(work) for work in works) for _ in range(n + 1)][1:]


@dataclass(frozen=True)
class Spread:
    """Median, least and most of several measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def show(self, pattern: str = "{:.2f}") -> str:
        low, high = pattern.format(self.least), pattern.format(self.most)
        return f"{pattern.format(self.median)} ({low} to {high})"


@dataclass(frozen=True)
class Comparison:
    """Seconds of both, and how many times faster we are, by wall and by CPU time."""

    ours_s: Spread
    theirs_s: Spread
    ratio: Spread
    ours_cpu_s: Spread
    theirs_cpu_s: Spread
    ratio_cpu: Spread
    pairs: int

    @classmethod
    def of(cls, turns: Sequence[tuple[Turn, ...]], ours: int = 0, theirs: int = 1) -> "Comparison":
        """Of two that took part in `rounds`, by their places there."""
        both = [(turn[ours], turn[theirs]) for turn in turns]
        wall = _spreads([(a.wall_s, b.wall_s) for a, b in both])
        cpu = _spreads([(a.cpu_s, b.cpu_s) for a, b in both])
        return cls(*wall, *cpu, len(both))


def _spreads(times: Sequence[tuple[float, float]]) -> tuple[Spread, Spread, Spread]:
    """Of both, and of their ratio."""
    ours, theirs = zip(*times, strict=True)
    return Spread.of(ours), Spread.of(theirs), Spread.of([b / a for a, b in times])


# -- the machine and the file ----------------------------------------------------------------------


def processor() -> str:
    """The processor's name as it gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        return found[1]
    return platform.processor() or platform.machine()


def parser(name: str, purpose: str) -> cli.Parser:
    """The options of `python -m benchmarks.<name>`, of which every benchmark has one."""
    p = cli.parser(f"python -m benchmarks.{name}", purpose)
    p.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    return p


def machine(*more: str) -> str:
    """Processor, cores and what else matters (a GPU), as a folder name; never the host's name."""
    words = " ".join((processor(), f"{os.cpu_count()} cores", *more)).lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those of the packages that are installed."""
    installed = (p for p in packages if find_spec(p))
    return {"python": platform.python_version()} | {p: metadata.version(p) for p in installed}


def save(name: str, result: dict[str, Any], *more: str) -> Path:
    """Write results/<machine>/<name>.json; dataclasses in the result become objects."""
    path = RESULTS / machine(*more) / f"{name}.json"
    files.write_json(path, {"processor": processor(), "cores": os.cpu_count()} | result)
    return path


def keep(wanted: bool, name: str, result: dict[str, Any], *more: str) -> None:
    """`save`, and say where, for a command whose `--save` is given."""
    if wanted:
        print("saved in", os.path.relpath(save(name, result, *more)))
