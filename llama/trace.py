"""Where the time of recorded steps went: `python -m llama.trace runs/quickstart`.

The Chrome traces that `train.py --profile 10-12` left in runs/<name>/profile in; out, per rank and
step, milliseconds and shares of the step. A GPU's time is that of its kernels, a CPU's that of
torch's operators; what either is for is told by the operators and phases around it.
"""

import gzip
import math
import re
import zlib
from bisect import bisect, bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import orjson

from llama import cli
from llama.cli import UserError

Events = list[dict[str, Any]]
Span = tuple[int, int]  # nanoseconds
# what a device did, when, and when the host asked for it
Task = tuple[str, Span, int]
ASKED = itemgetter(2)
Step = tuple[int, dict[str, int]]
STEPS_ACROSS = 3
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
# of torch's; the others are bookkeeping, or wait
OPERATOR = re.compile(r"^(?!autograd|FSDP|_?c10d)\w+::|^## Call Compiled")

# of NCCL and RCCL, of gloo, and of torch's symmetric memory
TRAVELS = re.compile("^(gloo:|nccl|msccl|Memcpy PtoP)|multimem_|_shot_all_|(barrier|signal)_kernel")

# The first that is found: in the name of a collective; of a computation also in what is around it.
COLLECTIVES = {
    "all-gather": re.compile("all_?gather", re.I),
    "reduce-scatter": re.compile("reduce_?scatter", re.I),
    "all-reduce": re.compile("all_?reduce", re.I),
    "other collectives": re.compile(""),
}
COMPUTATIONS = {
    "optimizer": re.compile(r"\boptimizer\b"),
    "copies": re.compile("copy_in|chunk_cat|split_with_sizes_copy|gpu_mem|rocclr"),
    "loss": re.compile("LinearCrossEntropy"),
    "attention": re.compile("attention|CausalBlocks|flash|fmha|sdpa", re.I),
    "matrix products": re.compile(r"::(add|b|badd)?mm\b|::(matmul|linear)\b|gemm|nvjet|cutlass"),
    "norms, elementwise": re.compile(""),
}


def union(spans: Iterable[Span]) -> list[Span]:
    """The spans in order, those that touch as one."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def covered(spans: list[Span], low: int, high: int) -> int:
    """Length between `low` and `high` of what spans cover that are a `union`."""
    first = max(0, bisect(spans, (low, low)) - 1)
    some = spans[first : bisect(spans, (high, high))]
    return sum(max(0, min(end, high) - max(start, low)) for start, end in some)


# -- a trace ---------------------------------------------------------------------------------------


def read(path: Path, last: float = math.inf) -> list[Step]:
    """The steps of a trace up to `last`: a run that is stopped waits for the data of one more.

    Raises `UserError` where it is cut off or holds none.
    """
    broken = OSError, EOFError, zlib.error, ValueError, KeyError, TypeError
    with cli.as_user_error(f"{path} is not a whole Chrome trace", *broken), gzip.open(path) as file:
        trace = orjson.loads(file.read())
        # without a length one is not complete
        events = [e for e in trace["traceEvents"] if e["ph"] == "X" and "dur" in e]
        found = [step for step in steps(events) if step[0] <= last]
    if trace.get("deviceProperties") and not any(e["cat"] in ON_GPU for e in events):
        raise UserError(f"{path} has nothing that the GPU did: another profiler may be attached")
    if not found:
        raise UserError(f"{path} holds no step of train.py")
    return found


def steps(events: Events) -> Iterator[Step]:
    """What the nanoseconds of each `step N` of a trace's complete events were spent on.

    Compute, exposed communication, waiting and idling add up to the step; hidden communication is
    part of compute. What is indented may run at the same time as another, and counts in each.
    """
    phases, of = defaultdict(list), defaultdict(list)
    tasks = sorted(_tasks(events), key=ASKED)
    for event in events:
        if event["cat"] == "user_annotation":
            phases[event["name"]].append(_span(event))
    for kind, span, _ in tasks:
        of[kind].append(span)
    compute = union(span for kind in COMPUTATIONS for span in of[kind])
    communication = union(span for kind in COLLECTIVES for span in of[kind])
    both = union(compute + communication)
    with_waiting = union(both + phases["data"])
    parts = {kind: union(of[kind]) for kind in (*COMPUTATIONS, *COLLECTIVES)}
    parts |= {name: union(phases[name]) for name in ("validation", "save")}
    named = [name for name in phases if re.fullmatch(r"step \d+", name)]
    high = 0
    for (begin, done), number in sorted((s, int(name[5:])) for name in named for s in phases[name]):
        low = max(begin, high)
        # a GPU goes on with what it was given when the host is already in the next step; but a
        # checkpoint's copies run beside the next
        asked = (bisect_left(tasks, moment, key=ASKED) for moment in (begin, done))
        ends = (span[1] for kind, span, _ in tasks[slice(*asked)] if kind != "copies")
        high = max(high, done, *ends)
        within = partial(covered, low=low, high=high)
        computing, busy = within(compute), within(both)
        waiting = within(with_waiting) - busy
        spent = {
            "step": high - low,
            "compute": computing,
            "exposed communication": busy - computing,
            "waiting for data": waiting,
            "idle": high - low - busy - waiting,
            "hidden communication": within(communication) - (busy - computing),
        }
        yield number, spent | {f"  {name}": within(spans) for name, spans in parts.items()}


def _span(event: dict[str, Any]) -> Span:
    start = round(1000 * event["ts"])
    return start, start + round(1000 * event["dur"])


def _tasks(events: Events) -> Iterator[Task]:
    """What the device did: the GPU's kernels where there are any, else the CPU's operators."""
    host = [e for e in events if e["cat"] in ("cpu_op", "user_annotation")]
    around = {
        kind: union(_span(e) for e in host if pattern.search(e["name"]))
        for kind, pattern in COMPUTATIONS.items()
    }
    asked_at = {e["args"].get("correlation"): _span(e)[0] for e in events if "cuda_" in e["cat"]}
    # gloo's reduce-scatter is an all-reduce, and RCCL has one kernel for all: c10d knows which
    calls = sorted((_span(e)[0], e["name"]) for e in host if "c10d::" in e["name"])
    kernels = [e for e in events if e["cat"] in ON_GPU]
    for event in kernels or host:
        name, span = event["name"], _span(event)
        asked = asked_at.get(event.get("args", {}).get("correlation", -1), span[0])
        if re.match("gloo:all_reduce|ncclDevKernel_Generic", name) and calls:
            name += calls[max(0, bisect(calls, (asked, "~")) - 1)][1]
        if TRAVELS.search(name):
            yield next(k for k, p in COLLECTIVES.items() if p.search(name)), span, asked
        elif kernels or OPERATOR.search(name):
            named = f"{event['cat']} {name}"
            found = (k for k, p in COMPUTATIONS.items() if p.search(named) or _in(around[k], asked))
            yield next(found), span, asked


def _in(spans: list[Span], moment: int) -> bool:
    """Whether one of the spans, which do not touch, holds the moment."""
    before = bisect(spans, (moment, math.inf)) - 1
    return before >= 0 and moment < spans[before][1]


# -- the command -----------------------------------------------------------------------------------


def show(rank: int, found: list[Step]) -> Iterator[str]:
    """Tables of a rank's steps beside their mean, in milliseconds and percent of the step."""
    mean = {name: sum(spent[name] for _, spent in found) / len(found) for name in found[0][1]}
    for low in range(0, len(found), STEPS_ACROSS):
        columns: dict[str, Any] = {f"step {n}": spent for n, spent in found[low:][:STEPS_ACROSS]}
        columns |= {"mean": mean} if len(found) > 1 else {}
        rows = []
        for name in filter(mean.get, mean):
            values = ((c[name] / 1e6, 100 * c[name] / c["step"]) for c in columns.values())
            rows.append([name, *(f"{ms:.1f} {percent:3.0f}%" for ms, percent in values)])
        yield cli.table((f"rank {rank}, ms", *columns), rows)


def main(argv: list[str]) -> None:
    parser = cli.parser("python -m llama.trace", "Where the time of recorded steps went.")
    parser.add_argument("run", type=Path, help="A run folder.")
    run = parser.parse_args(argv).run
    names = re.compile(r"rank-(\d+)-steps-(\d+)-(\d+)\.json\.gz")
    found = ((names.fullmatch(path.name), path) for path in run.glob("profile/*"))
    traces = sorted((*map(int, name.groups()), path) for name, path in found if name)
    if not traces:
        raise UserError(f"{run} has no traces in profile/: train with --profile 10-12")
    ranks = {rank for rank, *_ in traces}
    if missing := [str(rank) for rank in range(max(ranks)) if rank not in ranks]:
        print(f"WARNING: no trace of rank {', '.join(missing)}")
    for rank, _, last, path in traces:
        print("\n\n".join(show(rank, read(path, last))) + "\n")


if __name__ == "__main__":
    cli.run(main)
