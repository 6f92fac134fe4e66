"""Saving while training goes on: a copy of the tensors is taken, a thread writes it.

In: what `checkpoint.save` takes. Out: the same checkpoint, a line when it is there or has failed,
and how long steps had to wait. The thread's collectives run on a gloo group of their own.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from llama import faults
from llama.cli import UserError, show_seconds
from llama.config import CheckpointConfig
from llama.runtime import checkpoint, folder, metrics, signals
from llama.runtime.world import World

# Then something is wrong that does not pass by itself, and every further step could be lost.
FAILURES_IN_A_ROW = 3


class Saver:
    """One save at a time; every rank has one and calls it at the same steps."""

    def __init__(self) -> None:
        # what steps waited since `take_stall`, and how long the last save took
        self.stall_s = self.write_s = 0.0
        self._thread: Thread | None = None
        # one for all saves: there are 32 streams, and a new one may be that of the collectives
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        self.problem: str | None = None
        self._failures = 0

    def save(
        self,
        run: Path,
        step: int,
        tensors: dict[str, torch.Tensor],
        state: dict[str, Any],
        world: World,
        cfg: CheckpointConfig,
        wait: bool,
    ) -> bool:
        """Begin a save, or with `wait` make one; False if that failed. Training may go on.

        Waits for the save before. Raises `UserError` after `FAILURES_IN_A_ROW`.
        """
        began = time.monotonic()
        if self.busy():
            world.say(f"step {step} waits: the checkpoint before it is still being written")
        self.finish()
        if self._failures >= FAILURES_IN_A_ROW:
            raise UserError(
                f"{self._failures} checkpoints of {run} in a row could not be written "
                f"({self.problem}): mend that, the same command goes on from the newest"
            )
        world = replace(world, channel="saves")
        background = cfg.background and not wait
        if background:
            tensors, state = self._stage(tensors), copy.deepcopy(state)
            faults.point("ckpt.staged", step=step)
        kept = (cfg.keep, cfg.keep_every)
        work = partial(checkpoint.save, run, step, tensors, state, world, *kept)
        # in any case a thread: while this one waits for it, it hears signals
        self._thread = Thread(target=self._write, args=(run, step, work, world), daemon=True)
        self._thread.start()
        if not background:
            self.finish()
        self.stall_s += time.monotonic() - began
        return background or not self.problem

    def _stage(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies in the memory of the CPU: pinned, and on a stream of their own, from a GPU."""
        if not any(tensor.is_cuda for tensor in tensors.values()):
            return {name: tensor.detach().clone() for name, tensor in tensors.items()}
        stream = self._stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            staged = {
                n: t.detach().to("cpu", copy=True, non_blocking=True) for n, t in tensors.items()
            }
        self._copied = stream.record_event()
        return staged

    def before_update(self) -> None:
        """Let the device, not this process, wait until what it is about to change is copied."""
        if self._copied:
            torch.cuda.current_stream().wait_event(self._copied)

    def _write(self, run: Path, step: int, work: Callable[[], str | None], world: World) -> None:
        began, path = time.monotonic(), checkpoint.path_of(run, step)
        try:
            if world.device.type == "cuda":
                torch.cuda.set_device(world.device)  # a thread begins on the first one
            if self._copied:
                self._copied.synchronize()
            if world.leads:
                metrics.sync(run)  # a checkpoint never outlives the rows before it
            self.problem = work()
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"
            if world.size > 1:
                # a rank is gone: others wait for this one's part, and the loop of none may notice
                folder.exit_reason(run, "failed", f"rank {world.rank}: {self.problem}", step)
                signals.end(f"rank {world.rank} ends: another one has failed ({self.problem})", 1)
        self.write_s = time.monotonic() - began
        self._failures = self._failures + 1 if self.problem else 0
        if self.problem:
            world.say(f"WARNING: the checkpoint {path.name} failed: {self.problem}")
        else:
            world.say(f"saved {path} in {show_seconds(self.write_s)}")

    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait for the save in flight, if there is one."""
        if self._thread:
            self._thread.join(timeout_s)
            self._thread = None
        self._copied = None

    def take_stall(self) -> float | None:
        """Seconds that steps waited since the last call; None without a save."""
        stall, self.stall_s = self.stall_s, 0.0
        return stall or None
