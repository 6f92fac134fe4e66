"""Work that may hang, crash or eat the memory, in a child process: it costs only its own item.

The child is a fork, so it has the items already; it answers item by item, and when it dies the item
without an answer is the guilty one, and another child goes on behind it. The system ends the child,
since nothing else can stop a native parser.
"""

import os
import resource
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, TypeVar

from llama.cli import UserError
from llama.corpus.document import describe
from llama.corpus.pool import Died, Failed, death

T = TypeVar("T")
R = TypeVar("R")


def each(
    work: Callable[[T], R],
    items: Sequence[T],
    deadline_s: float,
    timer: int = signal.ITIMER_REAL,
    memory_bytes: int = 0,
) -> list[R | Failed | Died]:
    """What `work` makes of every item, in order, or how it failed, or how the process died of it.

    An item has `deadline_s` seconds: of the clock, or with ITIMER_PROF of the processor, which a
    busy machine does not shorten. `memory_bytes` is what it may use beside what is in use, 0 for
    all there is.
    """
    answers: list[R | Failed | Died] = []
    while len(answers) < len(items):
        receiving, sending = Pipe(duplex=False)
        child = os.fork()
        if child == 0:
            # nothing of the parent may be flushed or closed from here: leave without clean-up
            try:
                receiving.close()
                for ending in (signal.SIGALRM, signal.SIGPROF):
                    signal.signal(ending, signal.SIG_DFL)
                _limit_memory(memory_bytes)
                for item in items[len(answers) :]:
                    signal.setitimer(timer, deadline_s)
                    sending.send(_answer(work, item))
            finally:
                os._exit(1)
        sending.close()
        # no more, or cut off within one
        with receiving, suppress(EOFError, OSError):
            while True:
                answers.append(receiving.recv())
        _, status = os.waitpid(child, 0)
        if len(answers) < len(items):
            answers.append(Died(os.waitstatus_to_exitcode(status), None))
    return answers


def tried(load: Callable[[str], object], name: str, path: str | Path) -> None:
    """Raise `UserError` for a file that ends the process which loads it; a mere error is no concern
    here. Native code may crash on a damaged one, or read on behind its end without end.
    """
    size = os.path.getsize(path)
    deadline_s, memory_bytes = 10 + size / 2e6, (1 << 30) + 4 * size
    [answer] = each(
        lambda item: bool(load(item)), [name], deadline_s, signal.ITIMER_PROF, memory_bytes
    )
    if isinstance(answer, Died):
        raise UserError(f"{path} cannot be loaded: the process {death(answer.code)}")


def _answer(work: Callable[[Any], Any], item: Any) -> Any:
    try:
        return work(item)
    except Exception as error:
        return Failed(describe(error))


def _limit_memory(more_bytes: int) -> None:
    """Let this process ask for so much beside what it has; only Linux tells what that is."""
    if not more_bytes or not os.path.exists("/proc/self/statm"):
        return
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, hard))
