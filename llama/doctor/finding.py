"""What a check returns, and how code that may crash is tried: in a process of its own."""

import json
import re
import subprocess
import sys
from typing import Any, NamedTuple

IMPORT_TIMEOUT_S = 120


class Finding(NamedTuple):
    """`verdict` is ok, note or problem; a `fatal` problem makes training impossible."""

    verdict: str
    name: str
    text: str
    todo: str = ""
    fatal: bool = False


def probe(code: str) -> dict[str, Any] | str:
    """What code prints as JSON in a process of its own, or how it failed, in one line."""
    # -P: the working folder is not searched, nothing in it can pass for a package
    command = [sys.executable, "-P", "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=IMPORT_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"no answer after {IMPORT_TIMEOUT_S} s"
    try:
        if done.returncode == 0:
            answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return answer
    except (ValueError, IndexError):
        pass
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    return said[-1][:300] if said else f"exit code {done.returncode}"


def at_least(version: str, least: str) -> bool:
    """Whether 2.13.0+cpu is at least 2.11: by the numbers that both begin with."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.match(r"[\d.]*", text)[0].split(".") if part]  # type: ignore

    return numbers(version) >= numbers(least)


def gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB"
