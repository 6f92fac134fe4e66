"""Kill -9 in the middle of a command, at a moment chosen by what it has written.

By the clock a kill may come too late on a machine that is faster the second time.
"""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path


def kill_again_and_again(
    start: Callable[[], subprocess.Popen[bytes]],
    output: Path,
    whole: Path,
    rng: random.Random,
    times: int,
) -> None:
    """Start a command that writes to `output` so many times, each time killed on its way.

    `whole` is what it writes undisturbed. What one start leaves, the next one goes on from.
    """
    kills, half = 0, written(whole) // 2
    for _ in range(times):
        wanted = rng.randint(written(output), max(written(output), half))
        process = start()
        while process.poll() is None:
            if written(output) >= wanted:
                os.kill(process.pid, signal.SIGKILL)  # its workers notice by themselves
                process.wait()
                kills += 1
    print(f"{kills} of {times} were killed")
    assert kills


def written(folder: Path) -> int:
    """Files below a folder, also while it changes."""
    return sum(len(names) for _, _, names in os.walk(folder))
