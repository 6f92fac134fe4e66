"""Where the time of recorded steps went: `python -m llama.trace runs/quickstart`.

The Chrome traces that `train.py --profile 10-12` left in runs/<name>/profile in; out, per rank and
step, milliseconds and shares of the step. A GPU's time is that of its kernels, a CPU's that of
torch's operators; what either is for is told by the operators and phases around it.
"""

import gzip
import re
import zlib
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from llama import cli
from llama.cli import UserError

Events = list[dict[str, Any]]
Span = tuple[int, int]
STEPS_ACROSS = 3
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")

# The first that is found: in the name of a collective, and in those of a computation with all that
# is around it.
COLLECTIVES = {
    "all-gather": re.compile("all_?gather", re.I),
    "reduce-scatter": re.compile("reduce_?scatter", re.I),
    "all-reduce": re.compile("all_?reduce", re.I),
    "other collectives": re.compile(""),
}
COMPUTATIONS = {
    "optimizer": re.compile(r"\boptimizer\b"),
    "copies": re.compile("copy_in|chunk_cat|split_with_sizes_copy|gpu_mem"),
    "loss": re.compile("LinearCrossEntropy"),
    "attention": re.compile("attention|CausalBlocks|flash_|fmha|sdpa", re.I),
    "matrix products": re.compile(r"::(add|b|badd)?mm\b|::(matmul|linear)\b|gemm|nvjet|cutlass"),
    "norms, elementwise": re.compile(""),
}
# what a thread spends in these is no computation: waiting, or torch's own bookkeeping
NO_OPERATOR = re.compile("c10d|^(autograd|FSDP|gloo):")


class Task(NamedTuple):
    """A stretch of a device's time, in nanoseconds, and when the host asked for it."""

    kind: str
    start: int
    end: int
    asked: int


@dataclass(frozen=True)
class Step:
    """Nanoseconds of one step in one process, by what they were spent on.

    `parts` add up to `whole`; `hidden` is the communication beside computation, part of that.
    Kinds that ran at the same time are counted in each.
    """

    number: int
    whole: int
    parts: dict[str, int]
    hidden: int
    kinds: dict[str, int]
    also: list[str]


def covered(spans: Iterable[Span], low: int, high: int) -> int:
    """Length of what is covered by at least one of the spans, between `low` and `high`."""
    total = 0
    for start, end in sorted(spans):
        start, end = max(start, low), min(end, high)
        total += max(0, end - start)
        low = max(low, end)
    return total


# -- a trace ---------------------------------------------------------------------------------------


def read(path: Path) -> list[Step]:
    """The steps of a trace. Raises `UserError` where it is cut off or holds none."""
    try:
        with gzip.open(path) as file:
            events = [e for e in orjson.loads(file.read())["traceEvents"] if e.get("ph") == "X"]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a whole Chrome trace: {error}") from None
    found = list(steps(events))
    if not found:
        raise UserError(f"{path} holds no step of train.py")
    return found


def steps(events: Events) -> Iterator[Step]:
    """What each `step N` of a trace's complete events was spent on."""
    phases: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "user_annotation":
            phases[event["name"]].append(_span(event))
    tasks = _tasks(events)
    of: dict[str, list[Span]] = {kind: [] for kind in (*COMPUTATIONS, *COLLECTIVES)}
    for task in tasks:
        of[task.kind].append((task.start, task.end))
    compute = [span for kind in COMPUTATIONS for span in of[kind]]
    busy = compute + [span for kind in COLLECTIVES for span in of[kind]]
    numbers = (int(name[5:]) for name in phases if re.fullmatch(r"step \d+", name))
    high = 0
    for number in sorted(numbers):
        begin, done = phases[f"step {number}"][0]
        # a GPU goes on with what it was given when the host is already in the next step
        low, high = max(begin, high), max(done, high)
        high = max([high, *(task.end for task in tasks if begin <= task.asked < done)])

        def within(spans: Iterable[Span], low: int = low, high: int = high) -> int:
            return covered(spans, low, high)

        kinds = {kind: within(spans) for kind, spans in of.items()}
        computing, working = within(compute), within(busy)
        waiting = within(busy + phases["data"]) - working
        parts = {
            "compute": computing,
            "exposed communication": working - computing,
            "waiting for data": waiting,
            "idle": high - low - working - waiting,
        }
        communication = within(span for kind in COLLECTIVES for span in of[kind])
        also = [name for name in ("validation", "save") if covered(phases[name], begin, done)]
        hidden = communication - parts["exposed communication"]
        yield Step(number, high - low, parts, hidden, kinds, also)


def _span(event: dict[str, Any]) -> Span:
    start = round(1000 * event["ts"])
    return start, start + round(1000 * event["dur"])


def _tasks(events: Events) -> list[Task]:
    """What the device did: the GPU's kernels where there are any, else the CPU's operators."""
    threads: dict[Any, Events] = defaultdict(list)
    for event in events:
        if event.get("cat") in ON_HOST:
            threads[event["tid"]].append(event)
    launches: dict[Any, tuple[int, str]] = {}
    on_host = [task for thread in threads.values() for task in _on_host(thread, launches)]
    kernels = [event for event in events if event.get("cat") in ON_GPU]
    if not kernels:
        return [*on_host, *_gloo(events)]
    tasks = []
    for event in kernels:
        start, end = _span(event)
        asked, around = launches.get(event.get("args", {}).get("correlation"), (start, ""))
        name = event["name"]
        kind = _first(COMPUTATIONS, f"{around} {event['cat']} {name}")
        if "nccl" in name:
            kind = _first(COLLECTIVES, name)
        tasks.append(Task(kind, start, end, asked))
    return tasks


def _on_host(events: Events, launches: dict[Any, tuple[int, str]]) -> Iterator[Task]:
    """Stretches of one thread by the operators that run; fills in `launches` by correlation."""
    stack: list[tuple[int, str, str | None]] = []
    reached = 0
    sentinel = {"name": "", "ts": float(2**52), "dur": 0.0, "cat": ""}
    for event in [*sorted(events, key=lambda e: (e["ts"], -e["dur"])), sentinel]:
        start, end = _span(event)
        while stack:
            until, _, kind = stack[-1]
            if kind and min(until, start) > reached:
                yield Task(kind, reached, min(until, start), reached)
            reached = max(reached, min(until, start))
            if until > start:
                break
            stack.pop()
        reached = start
        name = event["name"]
        around, computing = (stack[-1][1], stack[-1][2] is not None) if stack else ("", False)
        around = f"{around} {name}"
        if event["cat"].startswith("cuda"):
            launches[event.get("args", {}).get("correlation")] = start, around
        operator = ("::" in name or name.startswith("## Call Compiled")) or computing
        kind = _first(COMPUTATIONS, around) if operator and not NO_OPERATOR.search(name) else None
        stack.append((end, around, kind))


def _gloo(events: Events) -> Iterator[Task]:
    """Collectives on gloo's threads. Its reduce-scatter is an all-reduce: c10d knows which."""
    calls = sorted((_span(e)[0], e["name"]) for e in events if "c10d::" in e["name"])
    for event in events:
        if (name := event["name"]).startswith("gloo:"):
            start, end = _span(event)
            before = bisect(calls, (start, "~")) - 1
            if name == "gloo:all_reduce" and before >= 0:
                name = calls[before][1]
            yield Task(_first(COLLECTIVES, name), start, end, start)


def _first(kinds: dict[str, re.Pattern[str]], text: str) -> str:
    return next(kind for kind, pattern in kinds.items() if pattern.search(text))


# -- the command -----------------------------------------------------------------------------------


def show(rank: int, found: list[Step]) -> Iterator[str]:
    """Tables of a rank's steps, beside their mean; all in milliseconds and percent of the step."""

    def cell(value: float, whole: float) -> str:
        return f"{value / 1e6:.1f} {100 * value / max(whole, 1):3.0f}%"

    columns = [
        (f"step {s.number}", s.whole, [*s.parts.values(), s.hidden, *s.kinds.values()])
        for s in found
    ]
    whole = sum(s.whole for s in found) / len(found)
    sums = [sum(values) / len(found) for values in zip(*(c[2] for c in columns), strict=True)]
    names = [*found[0].parts, "hidden communication", *(f"  {kind}" for kind in found[0].kinds)]
    for low in range(0, len(columns), STEPS_ACROSS):
        part = columns[low : low + STEPS_ACROSS]
        part += [("mean", whole, sums)] * (len(found) > 1)
        rows = [["step", *(cell(whole, whole) for _, whole, _ in part)]]
        for i, name in enumerate(names):
            if sums[i]:
                rows.append([name, *(cell(values[i], whole) for _, whole, values in part)])
        yield cli.table((f"rank {rank}, ms", *(name for name, _, _ in part)), rows)
    for step in found:
        if step.also:
            yield f"step {step.number} includes {' and '.join(step.also)}"


def main(argv: list[str]) -> int:
    parser = cli.parser("python -m llama.trace", "Where the time of recorded steps went.")
    parser.add_argument("run", type=Path, help="A run folder.")
    run = parser.parse_args(argv).run
    traces = []
    for path in (run / "profile").glob("rank-*.json.gz"):
        if match := re.match(r"rank-(\d+)-steps-(\d+)", path.name):
            traces.append((int(match[1]), int(match[2]), path))
    if not traces:
        raise UserError(f"{run} has no traces in profile/: train with --profile 10-12")
    for rank, _, path in sorted(traces):
        print("\n\n".join(show(rank, read(path))) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
