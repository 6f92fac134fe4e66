"""Chosen steps of a run as Chrome traces, and on GPUs what held their memory.

The loop's batches in, the same batches out; beside them, in runs/<name>/profile, rank-R-steps-A-B
as .json.gz (for Perfetto and `python -m llama.trace`) and as .pickle (for pytorch.org/memory_viz).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch.profiler import profile, record_function

from llama.runtime.metrics import Clock
from llama.runtime.state import State

Batch = tuple[int, torch.Tensor, torch.Tensor]
# a machine's processes; thousands of traces would say nothing more
RANKS = 8
# the last ones, of kilobytes each, in memory and in the file
MEMORY_EVENTS = 100_000


def recorded(batches: Iterator[Batch], state: State, clock: Clock) -> Iterator[Batch]:
    """The same batches, recording the steps of `log.profile`, counted as in the log from 1."""
    first, last = map(int, (state.cfg.log.profile or "0-0").split("-"))
    steps = range(max(first, state.step + 1), min(last, state.steps) + 1)
    if last and not steps:
        to_come = f"steps {state.step + 1} to {state.steps} are to come"
        state.world.say(f"WARNING: log.profile {first}-{last} has no effect: {to_come}")
    if steps and state.world.rank < RANKS:
        # they end early where the run is stopped: then it saves before the recording is written
        with suppress(StopIteration):
            while state.step + 1 < steps[0]:
                yield next(batches)
            made = state.recording.enter_context(_recording(state, clock))
            # a rewind ends it, unless to one of these steps: it may be a thousand back
            while state.step + 1 in steps:
                with record_function(f"step {state.step + 1}"):
                    with record_function("data"):
                        batch = next(batches)
                    made.append(state.step + 1)
                    yield batch
            state.recording.close()
    yield from batches


@contextmanager
def _recording(state: State, clock: Clock) -> Iterator[list[int]]:
    """Record what happens inside and write it; a failure is said and training goes on.

    What it yields is told the steps that are made.
    """
    cuda, made = state.world.device.type == "cuda", list[int]()
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
                _write(recorder, state, f"{made[0]}-{max(made)}")
            if cuda:
                torch.cuda.memory._record_memory_history(enabled=None)


def _write(recorder: profile, state: State, steps: str) -> None:
    """What was recorded, for `python -m llama.trace` and pytorch.org/memory_viz."""
    here, folder = state.world, state.run / "profile"
    path = f"{folder}/rank-{here.rank}-steps-{steps}"
    without = " (no memory snapshot: a CPU has none)"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a trace that a kill cut off is no trace
        recorder.export_chrome_trace(f"{path}.part.gz")
        os.replace(f"{path}.part.gz", f"{path}.json.gz")
        if here.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(f"{path}.pickle")
            without = ""
        here.say(f"steps {steps.replace('-', ' to ')} are in {folder}{without}")
    except (OSError, RuntimeError) as error:
        print(f"WARNING: {path} cannot be written ({error}); training goes on")
