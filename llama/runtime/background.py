"""Saving while training goes on: a copy of the tensors is taken, a thread writes it.

In: what `checkpoint.save` takes. Out: the same checkpoint, a line when it is there or has failed,
and how long steps had to wait. The thread's collectives run on a gloo group of their own.
"""

import copy
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama import faults
from llama.cli import UserError, show_seconds
from llama.config import CheckpointConfig
from llama.runtime import checkpoint
from llama.runtime.world import World

# Then something is wrong that does not pass by itself, and every further step could be lost.
FAILURES_IN_A_ROW = 3


class Saver:
    """One save at a time; every rank has one and calls it at the same steps."""

    def __init__(self) -> None:
        self.stall_s = 0.0
        self.longest_s = 0.0
        self._thread: threading.Thread | None = None
        self._copied: torch.cuda.Event | None = None
        self._problem: str | None = None
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
        if self._thread and self._thread.is_alive():
            world.say(f"step {step} waits: the checkpoint before it is still being written")
        self.finish()
        if self._failures >= FAILURES_IN_A_ROW:
            raise UserError(
                f"{self._failures} checkpoints of {run} in a row could not be written "
                f"({self._problem}): mend that, the same command goes on from the newest"
            )
        world = replace(world, control=world.saves)
        if wait or not cfg.background:
            self._write(run, step, tensors, state, world, cfg)
        else:
            what = (run, step, self._stage(tensors), copy.deepcopy(state), world, cfg)
            faults.point("ckpt.staged", step=step)
            self._thread = threading.Thread(target=self._write, args=what, daemon=True)
            self._thread.start()
        self.stall_s += time.monotonic() - began
        return self._thread is not None or not self._problem

    def _stage(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies in the memory of the CPU: pinned, and on a stream of their own, from a GPU."""
        if not any(tensor.is_cuda for tensor in tensors.values()):
            return {name: tensor.detach().clone() for name, tensor in tensors.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            staged = {n: t.detach().to("cpu", non_blocking=True) for n, t in tensors.items()}
        self._copied = stream.record_event()
        return staged

    def before_update(self) -> None:
        """Let the device, not this process, wait until what it is about to change is copied."""
        if self._copied:
            torch.cuda.current_stream().wait_event(self._copied)

    def _write(
        self,
        run: Path,
        step: int,
        tensors: dict[str, torch.Tensor],
        state: dict[str, Any],
        world: World,
        cfg: CheckpointConfig,
    ) -> None:
        began = time.monotonic()
        try:
            if self._copied:
                torch.cuda.set_device(world.device)  # a thread begins on the first one
                self._copied.synchronize()
            kept = (cfg.keep, cfg.keep_every)
            self._problem = checkpoint.save(run, step, tensors, state, world, *kept)
        except Exception as error:  # a rank that is gone: the loop will notice as well
            self._problem = f"{type(error).__name__}: {error}"
        self._failures = self._failures + 1 if self._problem else 0
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        path, spent = checkpoint.path_of(run, step), show_seconds(time.monotonic() - began)
        failed = f"WARNING: the checkpoint of step {step} failed: {self._problem}"
        world.say(failed if self._problem else f"saved {path} in {spent}")

    def finish(self, timeout_s: float | None = None) -> bool:
        """Wait for the save in flight, if there is one; whether the last one has not failed."""
        if self._thread:
            self._thread.join(timeout_s)
            self._thread = None
        self._copied = None
        return not self._problem

    def take_stall(self) -> float | None:
        """Seconds that steps waited since the last call; None without a save."""
        stall, self.stall_s = self.stall_s, 0.0
        return stall or None
