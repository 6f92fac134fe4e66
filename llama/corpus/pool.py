"""Jobs over worker processes that may die: every job gets an answer, a dead worker a successor.

`concurrent.futures` gives up all its jobs when one worker dies and does not say which job it had.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from llama.cli import UserError
from llama.corpus.document import describe

J = TypeVar("J")
R = TypeVar("R")
At = Callable[[int], None]


@dataclass
class Failed:
    """The job raised: an error of ours or of the machine, not of a document."""

    error: str


@dataclass
class Died:
    """The worker ended with `code` while the job was at `place`, the last it told."""

    code: int | None
    place: int | None

    @property
    def error(self) -> str:
        return f"a worker {death(self.code)}"


def death(code: int | None) -> str:
    """How a process ended, from its exit code: what to tell about it."""
    if code in (-signal.SIGALRM, -signal.SIGPROF):
        return "took longer than the deadline"
    if code == -signal.SIGKILL:
        return "was killed (out of memory?)"
    if code is not None and code < 0:
        return f"died of signal {signal.Signals(-code).name}"
    return "was lost with its machine" if code is None else f"ended with code {code}"


def answers(
    work: Callable[[J, At], R], jobs: deque[J], workers: int
) -> Iterator[tuple[J, R | Failed | Died]]:
    """Each job with what came of it, in the order in which they end.

    The caller may add to `jobs` between two answers, to try one again, or clear it, to stop.
    """
    hands: dict[Connection, _Hand[J]] = {}
    try:
        while jobs or hands:
            while jobs and len(hands) < workers:
                hand = _Hand(work, jobs.popleft())
                hands[hand.pipe] = hand
            for ready in wait(list(hands)):
                assert isinstance(ready, Connection)
                hand = hands[ready]
                answer = hand.listen()
                if answer is None:
                    continue
                job = hand.job
                if isinstance(answer, Died):
                    del hands[ready]
                # the caller sees the answer before the next job is taken: it may put this one back
                yield job, answer
                if not isinstance(answer, Died):
                    if jobs:
                        hand.give(jobs.popleft())
                    else:
                        del hands[ready]
                        hand.end()
    finally:
        for hand in hands.values():
            hand.process.kill()
            hand.process.join()


class _Hand(Generic[J]):
    """A worker process and the job it has."""

    def __init__(self, work: Callable[[J, At], Any], job: J) -> None:
        # a fresh interpreter: forking a process that draws a progress bar copies its locks
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.give(job)

    def give(self, job: J) -> None:
        self.job = job
        self.place: int | None = None
        # it may have died between two jobs; listening will tell
        with suppress(BrokenPipeError):
            self.pipe.send(job)

    def listen(self) -> Any:
        """The job's answer, or None when it only told its place."""
        try:
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return Died(self.process.exitcode, self.place)
        if kind == "at":
            self.place = value
            return None
        return Failed(value) if kind == "failed" else value

    def end(self) -> None:
        self.pipe.close()
        self.process.join()


def _serve(work: Callable[[Any, At], Any], pipe: Connection) -> None:
    """A worker's life, which ends with its parent's."""
    # Ctrl-C is the parent's business
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("done", work(job, lambda place: pipe.send(("at", place))))
        except UserError as error:
            answer = ("failed", str(error))
        except Exception as error:
            answer = ("failed", describe(error))
        pipe.send(answer)


def _die_with_parent() -> None:
    """A later run must not meet the workers of one that was killed."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
