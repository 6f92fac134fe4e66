"""Where a run stands, second by second: it stops when asked to, and ends when it hangs.

In: a `beat` of the main thread wherever a phase of the run begins. Out: `asked`, on which the ranks
agree in `poll`; and runs/<name>/stacks/rank-<n>.txt, whose first line is the last beat, followed by
the stacks of all threads where the next one did not come in time. Time is monotonic throughout.
"""

import faulthandler
import os
import platform
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llama.cli import show_seconds
from llama.config import TrainConfig
from llama.runtime import folder, signals, world
from llama.runtime.world import World

TIME_LIMIT = 128  # beside the numbers of signals
# The longest step and save so far are taken to be this much longer, and ending takes a moment.
SAFETY, ENDING_S = 1.5, 2.0
# A rank that hangs leaves the others time to write their stacks too.
GRACE_S = 3.0
# Once a rank has failed, collectives on GPUs would wait for it for ever.
FOLLOW_S = 30.0
WIDTH = 160  # of the last beat, in bytes


class Watch:
    """One rank's. `save_s` is how long saving takes; `failed(why)` is told of a rank that hangs."""

    def __init__(
        self,
        run: Path,
        here: World,
        cfg: TrainConfig,
        save_s: Callable[[], float],
        failed: Callable[[str], object],
    ) -> None:
        self.asked = ""
        self._run, self._here, self._cfg, self._failed = run, here, cfg, failed
        self._stop = signals.listen()
        self._deadline = self._planned_end()
        self._times = Counter[str]()
        self._step_s, self._save_s = 0.0, save_s
        self._phase, self._since = "", time.monotonic()
        path = run / "stacks" / f"rank-{here.rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        # stacks of earlier starts stay
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.lseek(self._file, max(path.stat().st_size, WIDTH), os.SEEK_SET)
        self.beat("starting", 0)
        self._stop.ticks.append(self._tick)

    def beat(self, phase: str, step: int) -> None:
        """The main thread begins `phase`: it has until the timeout to come to the next one."""
        now = time.monotonic()
        if self._phase == "training":
            # the first step compiles: it says nothing about the others
            known_s = self._step_s if self._times["training"] > 2 else 0.0
            self._step_s = max(now - self._since, known_s)
        self._times[phase] += 1
        self._phase, self._since, self._doing = phase, now, f"{phase} at step {step}"
        first = self._times[phase] == 1
        self._key = "save" if phase == "saving" else "start" if first else "step"
        self._limit_s = getattr(self._cfg, f"{self._key}_timeout")
        self._idle_s = 0.0
        if (phase, self._times[phase]) == ("training", 2):
            # behind the watch, which says more; a save may keep other ranks waiting
            world.set_timeout(max(self._cfg.step_timeout, self._cfg.save_timeout) + 60)
        self._note("alive")
        # a thread of C writes them: it needs no lock that a hanging thread may hold
        faulthandler.dump_traceback_later(self._limit_s, file=self._file)

    def poll(self, phase: str, step: int, waiting: bool = False) -> bool:
        """Beat, and agree on `asked`; whether any rank waits. All ranks call it together."""
        self.beat(phase, step)
        if self.asked:
            return False
        # a save may be in flight that the last one has to wait for
        needed_s = SAFETY * (self._step_s + 2 * self._save_s()) + ENDING_S
        late = time.monotonic() + needed_s > self._deadline
        number = self._stop.number or TIME_LIMIT * late
        agreed = self._here.largest(2 * number + waiting)
        if number := agreed // 2:
            name = "the time limit" if number == TIME_LIMIT else signal.Signals(number).name
            self.asked = name
        return bool(agreed % 2)

    def _planned_end(self) -> float:
        """When, by the monotonic clock, this process will be ended from outside."""
        ends = {}
        if self._cfg.time_limit:
            ends["train.time_limit"] = self._stop.began + self._cfg.time_limit
        if left_s := world.job_seconds_left():
            ends["SLURM_JOB_END_TIME"] = time.monotonic() + left_s
        if not ends:
            return float("inf")
        key = min(ends, key=ends.__getitem__)
        left = show_seconds(ends[key] - time.monotonic())
        self._here.say(f"{left} left ({key}): saves and stops before, ready to resume")
        return ends[key]

    def _note(self, word: str) -> None:
        where = f"rank {self._here.rank}, process {os.getpid()} on {platform.node()}"
        line = f"{word} {time.strftime('%F %T')}: {where}, {self._doing}"
        with suppress(OSError):  # a full disk must not end a run
            os.pwrite(self._file, line[: WIDTH - 1].ljust(WIDTH - 1).encode() + b"\n", 0)

    def _tick(self, ran_s: float) -> None:
        """Called about once a second by the thread that hears signals."""
        self._idle_s += ran_s
        stuck = self._idle_s > FOLLOW_S and self._times["training"] and self._phase != "saving"
        if stuck and folder.has_failed(self._run):
            signals.end(f"rank {self._here.rank} ends: another one has failed", 1)
        if self._idle_s > self._limit_s:
            self._note("hung")
            why = (
                f"rank {self._here.rank} hangs: nothing for {self._limit_s:g} s in {self._doing} "
                f"(train.{self._key}_timeout); stacks of every rank are in {self._run / 'stacks'}"
            )
            time.sleep(GRACE_S)
            self._failed(why)
            signals.end(f"ERROR: {why}", 1)
