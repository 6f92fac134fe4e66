"""Requests to stop: a signal sets a flag, which the run looks at wherever it can stop.

Schedulers send SIGTERM (torchrun, preemption), SIGUSR1 or SIGUSR2 (time limits), people SIGINT, a
terminal that is closed SIGHUP.
Imports the standard library only: commands listen before they import torch, which takes seconds.
"""

import faulthandler
import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

STOPPING = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
_passed_on = "SIGHUP" in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
if _passed_on or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    # a terminal is closed; nohup has that ignored, but torchrun hears it in spite of nohup
    STOPPING.append(signal.SIGHUP)
TICK_S = 1.0
# A scheduler that signals every process and a launcher that passes it on mean one request.
ONE_REQUEST_S = 0.3


class Stop:
    """Remembers the first stop signal; a second one ends the process at once.

    A thread hears them: Python runs handlers in the main thread, which may hang in a collective.
    About once a second it also calls `tick` with the seconds in which this process was running.
    """

    def __init__(self) -> None:
        self.number, self._first, self.began = 0, 0.0, time.monotonic()
        self.tick: Callable[[float], object] = float
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in STOPPING:
            signal.signal(number, self._flag)
        signal.signal(signal.SIGTSTP, lambda number, frame: None)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()

    def _flag(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    def _listen(self, reader: int) -> None:
        parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        last = time.monotonic()
        while True:
            if select.select([reader], [], [], TICK_S)[0]:
                self._heard(os.read(reader, 1)[0])
            if parent and os.getppid() != parent:
                end("ERROR: torchrun is gone: this process ends too", 1)
            now = time.monotonic()
            # no more: time in which all of the process was stopped (Ctrl-Z) is not its fault
            self.tick(min(now - last, 2 * TICK_S))
            last = now

    def _heard(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGTSTP:
            # Ctrl-Z: no clock may run on while all of this process is stopped
            faulthandler.cancel_dump_traceback_later()
            os.kill(os.getpid(), signal.SIGSTOP)
        if number in STOPPING and not self._first:
            self.number, self._first = self.number or number, now
            say(f"{name}: stopping where it is safe; a second signal stops at once")
        elif number in STOPPING and now - self._first > ONE_REQUEST_S:
            end(f"{name}: stopped at once", 128 + number)


@functools.cache
def listen() -> Stop:
    """The one `Stop` of this process, listening from the first call on."""
    return Stop()


def undone(main: Callable[[list[str]], int | None]) -> Callable[[list[str]], int | None]:
    """`main`, ended by a signal as by an error, leaving nothing half-written: exit code 75."""
    asked: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) == 1:
            raise KeyboardInterrupt

    def run(argv: list[str]) -> int | None:
        from llama.cli import EXIT_REQUEUE

        stop = listen()
        for number in STOPPING:
            signal.signal(number, interrupt)
        try:
            return EXIT_REQUEUE if stop.number else main(argv)
        except BaseException:
            # whatever a library has made of the interrupt
            if asked:
                return EXIT_REQUEUE
            raise

    return run


def say(text: str) -> None:
    """A line on standard error, also where nobody reads it any more."""
    with suppress(OSError):
        os.write(sys.stderr.fileno(), f"{text}\n".encode())


def end(why: str, code: int) -> NoReturn:
    """End the process from any thread; sys.exit would wait for a hanging collective."""
    say(why)
    os._exit(code)
