"""Chosen steps of a run as Chrome traces, and on GPUs what held their memory.

The loop's batches in, the same batches out; beside them, in runs/<name>/profile, rank-R-steps-A-B
as .json.gz (for Perfetto and `python -m llama.trace`) and as .pickle (for pytorch.org/memory_viz).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import profiler
from torch.profiler import record_function

from llama.runtime.metrics import Clock
from llama.runtime.state import State

Batch = tuple[int, torch.Tensor, torch.Tensor]
# a machine's processes; thousands of traces would say nothing more
RANKS = 8
MEMORY_EVENTS = 1_000_000


def recorded(batches: Iterator[Batch], state: State, clock: Clock) -> Iterator[Batch]:
    """The same batches, recording the steps of `log.profile`, counted as in the log from 1."""
    asked, here = state.cfg.log.profile, state.world
    if asked is None or here.rank >= RANKS:
        yield from batches
        return
    first, last = map(int, asked.split("-"))
    first, last = max(first, state.step + 1), min(last, state.steps)
    if first > last:
        here.say(
            f"WARNING: log.profile {asked} has no effect: "
            f"steps {state.step + 1} to {state.steps} are to come"
        )
    yield from islice(batches, max(0, min(first, state.steps + 1) - 1 - state.step))
    if first <= last:
        with _recording(state, first, clock):
            for step in range(first, last + 1):
                with record_function(f"step {step}"):
                    with record_function("data"):
                        batch = next(batches)
                    yield batch
    yield from batches


@contextmanager
def _recording(state: State, first: int, clock: Clock) -> Iterator[None]:
    """Record what happens inside and write it; a failure is said and training goes on."""
    here, folder = state.world, state.run / "profile"
    cuda = here.device.type == "cuda"
    kinds = [profiler.ProfilerActivity.CPU] + [profiler.ProfilerActivity.CUDA] * cuda
    if cuda:
        # what was launched before belongs to no recorded step
        torch.cuda.synchronize()
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
    recorder = profiler.profile(activities=kinds)
    recorder.start()
    try:
        yield
    finally:
        recorder.stop()
        # fewer than asked for, where the run was stopped
        name = f"rank-{here.rank}-steps-{first}-{state.step}"
        try:
            folder.mkdir(exist_ok=True)
            _whole(folder / f"{name}.json.gz", recorder.export_chrome_trace)
            if cuda:
                _whole(folder / f"{name}.pickle", torch.cuda.memory._dump_snapshot)
            without = "" if cuda else ", without a memory snapshot: a CPU has none"
            here.say(f"profiled steps {first} to {state.step}{without}: see {folder}")
        except (OSError, RuntimeError) as error:
            print(f"WARNING: {folder}/{name} cannot be written ({error}); training goes on")
        if cuda:
            torch.cuda.memory._record_memory_history(enabled=None)


def _whole(path: Path, write: Callable[[str], object]) -> None:
    """Have `write` make a file that appears when it is complete."""
    aside = path.with_name(f".tmp-{path.name}")
    write(str(aside))
    os.replace(aside, path)
