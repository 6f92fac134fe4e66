"""Stopping on purpose: a signal sets a flag, the world agrees on it between steps and saves.

Schedulers send SIGTERM (torchrun, preemption), SIGUSR1 or SIGUSR2 (time limits), people SIGINT.
"""

import os
import signal
import sys
from types import FrameType

from llama.runtime.world import World

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Stop:
    """Remembers the first stop signal; a second one ends the process at once."""

    def __init__(self) -> None:
        self._asked = 0
        for number in STOPPING:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            # not sys.exit: a hanging collective would keep the process
            os._exit(128 + number)
        self._asked = number
        name = signal.Signals(number).name
        # os.write: print is not safe inside a handler
        text = f"{name}: saving after this step, then stopping; a second signal stops at once\n"
        os.write(sys.stderr.fileno(), text.encode())

    def agreed(self, world: World) -> str | None:
        """Name of the signal any rank received, the same on every rank: one gloo reduction."""
        number = world.largest(self._asked)
        return signal.Signals(number).name if number else None
