"""Chosen steps of a run as Chrome traces, and on GPUs what held their memory.

The loop's batches in, the same batches out; beside them, in runs/<name>/profile, rank-R-steps-A-B
as .json.gz (for Perfetto and `python -m llama.trace`) and as .pickle (for pytorch.org/memory_viz).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile, record_function

from llama.runtime.metrics import Clock
from llama.runtime.state import State

Batch = tuple[int, torch.Tensor, torch.Tensor]
# a machine's processes; thousands of traces would say nothing more
RANKS = 8
# kilobytes each, in memory and in the file: enough for a step of any size here
MEMORY_EVENTS = 100_000


def recorded(batches: Iterator[Batch], state: State, clock: Clock) -> Iterator[Batch]:
    """The same batches, recording the steps of `log.profile`, counted as in the log from 1."""
    first, last = map(int, (state.cfg.log.profile or "0-0").split("-"))
    steps = range(max(first, state.step + 1), min(last, state.steps) + 1)
    if last and not steps:
        to_come = f"steps {state.step + 1} to {state.steps} are to come"
        state.world.say(f"WARNING: log.profile {first}-{last} has no effect: {to_come}")
    if steps and state.world.rank < RANKS:
        while state.step + 1 < steps[0]:
            # they end early where the run is stopped
            if not (batch := next(batches, None)):
                return
            yield batch
        with _recording(state, clock) as made:
            # a rewind ends it, unless to one of these steps: it may be a thousand back
            while state.step + 1 in steps:
                with record_function(f"step {state.step + 1}"):
                    with record_function("data"):
                        batch = next(batches, None)
                    if not batch:
                        return
                    made.append(state.step + 1)
                    yield batch
    yield from batches


@contextmanager
def _recording(state: State, clock: Clock) -> Iterator[list[int]]:
    """Record what happens inside and write it; a failure is said and training goes on.

    What it yields is told the steps that are made.
    """
    here, folder, made = state.world, state.run / "profile", list[int]()
    cuda = here.device.type == "cuda"
    # the GPU's kernels too, where there is one
    recorder = profile()
    with clock.paused():
        if cuda:
            # what was launched before belongs to no recorded step
            torch.cuda.synchronize()
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        recorder.start()
    try:
        yield made
    finally:
        with clock.paused():
            recorder.stop()
            if made:
                _write(recorder, state, folder / f"rank-{here.rank}-steps-{made[0]}-{max(made)}")
            if cuda:
                torch.cuda.memory._record_memory_history(enabled=None)


def _write(recorder: profile, state: State, path: Path) -> None:
    """What was recorded, in files that begin with `path`."""
    cuda = state.world.device.type == "cuda"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a trace that a kill cut off is no trace
        recorder.export_chrome_trace(f"{path}.part.gz")
        os.replace(f"{path}.part.gz", f"{path}.json.gz")
        if cuda:
            torch.cuda.memory._dump_snapshot(f"{path}.pickle")
        without = "" if cuda else " (no memory snapshot: a CPU has none)"
        _, first, last = path.name.rsplit("-", 2)
        state.world.say(f"steps {first} to {last} are in {path.parent}{without}")
    except (OSError, RuntimeError) as error:
        print(f"WARNING: {path} cannot be written ({error}); training goes on")
