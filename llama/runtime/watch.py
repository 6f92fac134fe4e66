"""Where a run stands, second by second: it stops when asked to, and ends when it hangs.

In: a `beat` of the main thread wherever a phase of the run begins. Out: `asked`, on which the ranks
agree in `poll`; and runs/<name>/stacks/rank-<n>.txt, whose first line is the last beat, followed by
the stacks of all threads where the next one did not come in time. Time is monotonic throughout.
"""

import faulthandler
import math
import os
import platform
import signal
import time
import weakref
from contextlib import suppress

from llama.cli import show_seconds
from llama.costs import checkpoint_bytes
from llama.runtime import folder, signals, world
from llama.runtime.state import State

TIME_LIMIT = 128  # beside the numbers of signals
NAMES = {number: number.name for number in signal.Signals} | {0: "", TIME_LIMIT: "the time limit"}
# The longest step and the last save are taken to be this much longer, and ending takes a moment.
SAFETY, ENDING_S = 1.5, 2.0
# What a process writes and hashes, until the first save is measured.
SAVED_BYTES_PER_S = 100e6
# What keeps all of Python from running is given so many times the timeout: it cannot be told from
# a process that was stopped, but for Ctrl-Z (signals.py).
HELD = 2
# A rank that hangs leaves the others time to write their stacks too.
GRACE_S = 3.0
# Once a rank has failed, collectives on GPUs would wait for it for ever.
FOLLOW_S = 30.0
# Watches say more than a collective does in the end, and do not count time in which all is stopped.
COLLECTIVE_S = 7 * 24 * 3600.0
WIDTH = 160  # of the last beat, in bytes


class Watch:
    """One rank's, over the state of its run."""

    def __init__(self, state: State) -> None:
        # weakly: the thread that ticks holds this to the end, and a run that is over is let go
        self._state: State = weakref.proxy(state)
        cfg, self._stop = state.cfg.train, signals.listen()
        self._run, self._rank = state.run, state.world.rank
        self.asked, self._phase, self._key, self._seen = "", "", "", set[str]()
        self._since, self._step_s = time.monotonic(), 0.0
        of_run = (cfg.time_limit or math.inf) - (self._since - self._stop.began)
        left_s, key = min((of_run, "train.time_limit"), (job_seconds_left(), "the job's end"))
        self._deadline = self._since + left_s
        if left_s < math.inf:
            state.world.say(f"{show_seconds(left_s)} left ({key}): saves and stops before")
        world.set_timeout(COLLECTIVE_S)
        path = state.run / "stacks" / f"rank-{state.world.rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        # stacks of earlier starts stay
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.lseek(self._file, max(path.stat().st_size, WIDTH), os.SEEK_SET)
        self.beat("starting")
        self._note("alive")
        self._stop.tick = self._tick

    def beat(self, phase: str) -> None:
        """The main thread begins `phase`: it has until the timeout to come to the next one."""
        now = time.monotonic()
        if self._phase == "training" and self._key == "step_timeout":
            self._step_s = max(self._step_s, now - self._since)
        # the first of each compiles, loads, or fills caches
        long = phase == "saving" or phase not in self._seen
        self._seen.add(phase)
        self._key = "save_timeout" if long else "step_timeout"
        self._limit_s = getattr(self._state.cfg.train, self._key)
        self._phase, self._since, self._idle_s = phase, now, 0.0
        self._step = self._state.step

    def poll(self, phase: str, waiting: bool = False) -> bool | None:
        """Beat, and agree: None if any rank was asked to stop, else whether any is waiting.

        All ranks call it together.
        """
        self.beat(phase)
        if not self.asked:
            state = self._state
            guess_s = checkpoint_bytes(state.cfg.model) / state.world.size / SAVED_BYTES_PER_S
            # a save may be in flight that the last one has to wait for
            needed_s = SAFETY * (self._step_s + 2 * (state.saver.write_s or guess_s)) + ENDING_S
            number = self._stop.number or TIME_LIMIT * (self._since + needed_s > self._deadline)
            number, waits = divmod(state.world.largest(2 * number + waiting), 2)
            self.asked, waiting = NAMES[number], bool(waits)
        return None if self.asked else waiting

    def failed(self, why: str) -> bool:
        """Leave the verdict that this rank failed; False where another one did before."""
        return folder.exit_reason(
            self._run, "failed", f"rank {self._rank}: {why}", self._state.step
        )

    def _note(self, word: str) -> None:
        self._where = f"{self._phase} after step {self._step}"
        here = f"rank {self._rank}, process {os.getpid()} on {platform.node()}"
        line = f"{word} {time.strftime('%F %T')}: {here}, {self._where}"[: WIDTH - 1]
        with suppress(OSError):  # a full disk must not end a run
            os.pwrite(self._file, line.ljust(WIDTH - 1).encode() + b"\n", 0)

    def _tick(self, ran_s: float) -> None:
        """Called about once a second by the thread that hears signals."""
        self._idle_s += ran_s
        # no tick any more: a thread of C, which needs no lock of Python, writes stacks and ends it
        with suppress(RuntimeError):
            later_s = HELD * self._limit_s
            faulthandler.dump_traceback_later(later_s, file=self._file, exit=True)
        # here and not in a beat: a step must not wait for the file
        self._note("alive")
        run, rank = self._run, self._rank
        stuck = self._idle_s > FOLLOW_S and "training" in self._seen and self._phase != "saving"
        if stuck and folder.has_failed(run):
            signals.end(f"rank {rank} ends: another one has failed", 1)
        if self._idle_s > self._limit_s:
            self._note("hung")
            faulthandler.dump_traceback_later(0.01, file=self._file)
            why = f"hangs: nothing for {self._limit_s:g} s, {self._where} (train.{self._key})"
            signals.say(f"ERROR: rank {rank} {why}; stacks of every rank are in {run}/stacks")
            time.sleep(GRACE_S)
            self.failed(why)
            os._exit(1)


def job_seconds_left() -> float:
    """Seconds until Slurm ends this job; infinite outside of one, and past an end put off."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    left = int(end) - time.time() if end.isdecimal() else 0.0
    return left if left > 0 else math.inf
