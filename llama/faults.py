"""Faults on purpose: `LLAMA_FAULTS="ckpt.hashed:rank=1,step=3,action=kill"` arms a named point.

In goes that variable: faults divided by `;`, each a point of `POINTS` (or a pattern, `ckpt.*`) with
`key=value` pairs. Out comes what a broken machine does, there and then, with a line on standard
error. Unarmed, a point costs one look-up in the environment. Keys: `action`; `hit=3` strikes at
the third time only; `chance=0.1` and `seed=7` at random; `seconds` ends a hang; any other must be
what the point says of itself (`step`, a file's `name`, `rank`, `attempt` of torchrun).
"""

import ctypes
import errno
import fnmatch
import os
import random
import signal
import sys
import time
from functools import lru_cache
from typing import Any

from llama.cli import UserError, as_user_error

VARIABLE = "LLAMA_FAULTS"
# Each is named after what has just been done, or is being done.
_PLACES = {
    "start": "joined",
    "file": "opened written synced renamed",
    "step": "begun graded reading validating",
    "ckpt": "staged folder written hashed state listed synced aside renamed named"
    " protected trashed pruned",
}
POINTS = [f"{place}.{done}" for place, words in _PLACES.items() for done in words.split()]
# hold: a hang that lets no other thread of Python run
ACTIONS = ("kill", "raise", "hang", "hold", "flip", "nan", "spike")


class Fault(RuntimeError):
    """What `action=raise` raises."""


class _Armed:
    """One fault of the variable; it counts how often it was met."""

    def __init__(self, text: str) -> None:
        self.point, _, rest = text.partition(":")
        self.where = dict(pair.strip().partition("=")[::2] for pair in rest.split(",") if pair)
        self.action, self.met = self.where.pop("action", ""), 0
        name = "SIGKILL" if self.action == "kill" else self.action.upper()
        self.errno = getattr(errno, name, 0)
        self.signal = getattr(signal, name, 0) if name.startswith("SIG") else 0
        if not fnmatch.filter(POINTS, self.point):
            raise UserError(f"{VARIABLE}: {self.point!r} is no point of {' '.join(POINTS)}")
        if not (self.errno or self.signal or self.action in ACTIONS):
            raise UserError(
                f"{VARIABLE}: the action of {self.point} is {self.action!r}, expected one of "
                f"{' '.join(ACTIONS)}, a signal (sigterm) or an error of the system (enospc)"
            )
        with as_user_error(f"{VARIABLE}: {text!r}", ValueError):
            self.hit, self.chance, self.seconds, seed = (
                float(self.where.pop(key, default))
                for key, default in (("hit", 0), ("chance", 1), ("seconds", 1e9), ("seed", 0))
            )
        self.random = random.Random(seed)

    def due(self, name: str, here: dict[str, Any]) -> bool:
        asked = all(str(here.get(key)) == value for key, value in self.where.items())
        asked = asked and fnmatch.fnmatch(name, self.point)
        self.met += asked
        return asked and self.hit in (0, self.met) and self.random.random() < self.chance

    def strike(self, value: Any) -> None:
        if self.signal:
            os.kill(os.getpid(), self.signal)
        elif self.errno:
            raise OSError(self.errno, os.strerror(self.errno))
        elif self.action == "raise":
            raise Fault(f"planted at {self.point}")
        elif self.action == "hang":
            time.sleep(self.seconds)
        elif self.action == "hold":
            ctypes.PyDLL(None).sleep(int(self.seconds))
        else:
            self.spoil(value)

    def spoil(self, tensor: Any) -> None:
        """Flip one bit of a tensor, make one element NaN, or all 1000 x."""
        local = getattr(tensor.detach(), "_local_tensor", tensor.detach()).view(-1)
        if self.action == "spike":
            local.mul_(1000)
        elif self.action == "nan":
            local[self.random.randrange(len(local))] = float("nan")
        else:
            bits = local.view(local.new_empty(0).byte().dtype)  # the corpus has points but no torch
            bits[self.random.randrange(len(bits))] ^= 1 << self.random.randrange(8)


@lru_cache
def armed(text: str) -> list[_Armed]:
    """The faults of a variable's text. Raises `UserError` for one that can never strike."""
    return [_Armed(fault.strip()) for fault in text.split(";") if fault.strip()]


def point(name: str, value: Any = None, /, **where: Any) -> None:
    """A place where faults may strike; `value` is the tensor that they would spoil."""
    if not (text := os.environ.get(VARIABLE)):
        return
    assert name in POINTS, f"{name} is not listed in {__name__}"
    here = {"rank": os.environ.get("RANK", 0)}
    here |= {"attempt": os.environ.get("TORCHELASTIC_RESTART_COUNT", 0), **where}
    for fault in armed(text):
        if fault.due(name, here):
            shown = " ".join(f"{key}={word}" for key, word in here.items())
            print(f"FAULT {name} {shown}: {fault.action}", file=sys.stderr, flush=True)
            fault.strike(value)
