"""What every command shares: parsing with suggestions, counts, exit codes, tables and progress.

Exit codes: 0 done, 2 a user's error told in one sentence, 75 stopped on purpose and ready to
resume, 1 anything else (with its traceback).
"""

import difflib
import errno
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

import jsonargparse

EXIT_USER, EXIT_REQUEUE = 2, 75
# A folder of somebody else, or on a disk that takes nothing.
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
CORPUS_EXTRA = "'llama-pretraining[corpus]'"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
PLAIN_PROGRESS_EVERY_S = 10.0


class UserError(ValueError):
    """A mistake the user can mend: one sentence with the file or key and the value."""


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call `main` with the command line and exit with the project's codes."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        # what runs leave is read under other locales: Python begins anew, in UTF-8
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    # closed ones, as under some daemons, say nothing
    sys.stdout, sys.stderr = (out or open(os.devnull, "w") for out in (sys.stdout, sys.stderr))
    try:
        with as_user_error("the working folder is gone", FileNotFoundError):
            os.getcwd()
        with as_user_error("the command line is not UTF-8", UnicodeEncodeError):
            "".join(sys.argv).encode()
        if isinstance(sys.stdout, io.TextIOWrapper):
            # names that a terminal's encoding lacks must not end a command
            sys.stdout.reconfigure(errors="backslashreplace")
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # the reader of our output has gone, as in `command | head`
        sys.stderr.close()
        code = 0
    except OSError as error:
        # what names no file is a bug of ours
        if error.errno not in CLOSED or not error.filename:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        code = EXIT_USER
    sys.exit(code or 0)


def needed(module: str, by: str, install: str) -> Any:
    """A module that an extra brings; `UserError` where it is missing or broken."""
    try:
        return import_module(module)
    except Exception as error:  # a broken package raises anything
        raise UserError(
            f"{by} needs {module}, which cannot be imported ({error}): pip install {install}"
        ) from error


def expect(good: object, what: str, expected: str) -> None:
    """Raise `UserError` unless a value is good: what it is, and what would be."""
    if not good:
        raise UserError(f"{what}, expected {expected}")


@contextmanager
def as_user_error(
    what: str, *kinds: type[BaseException], show: Callable[[Any], str] = str
) -> Iterator[None]:
    """Errors of these kinds become the user's: `what`, a colon, and what they show."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {show(error)}") from error


# -- numbers as people write them ------------------------------------------------------------------


def count(value: str | int | float) -> int:
    """A whole number written 4194304, 4M, 1.4T, 512k or 1.4e12 (K, M, B, T are powers of ten)."""
    match = re.fullmatch(r"\s*([-+]?[\d_.]+(?:[eE][-+]?\d+)?)\s*([kKmMbBtT]?)\s*", str(value))
    try:
        assert match
        number = float(match[1]) * _UNITS[match[2].upper()]
        # 1.4T is exact as an integer though not as a binary fraction
        if not number.is_integer():
            number = round(number, 3)
        if not number.is_integer():
            raise ValueError
    except (AssertionError, ValueError, OverflowError):
        raise UserError(f"{value!r} is not a count such as 4096, 4M, 1.4T or 1e9") from None
    return int(number)


def byte_count(value: str | int | float) -> int:
    """Bytes written 20000000000, 20e9, 20GB or 512 MB."""
    plain = re.sub(r"\s*([kKMGT]?)B$", lambda unit: unit[1].replace("G", "B"), str(value).strip())
    return count(plain)


def show_count(number: float) -> str:
    """1234 -> 1,234; 4194304 -> 4.19M; 1.4e12 -> 1.40T."""
    unit = next((unit for unit in "TBM" if abs(number) >= _UNITS[unit]), "")
    return f"{number / _UNITS[unit]:.2f}{unit}" if unit else f"{number:,.0f}"


def show_bytes(number: float) -> str:
    """Bytes in powers of ten: 512 B, 3.2 MB, 1.4 TB."""
    power = next((power for power in (4, 3, 2, 1) if abs(number) >= 1000**power), 0)
    return f"{number / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def show_seconds(seconds: float) -> str:
    """45 -> 45s, 125 -> 2m 05s, 7380 -> 2h 03m, 200000 -> 2d 7h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns of plain text under a ruled header; columns that hold numbers are right-aligned."""
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [
        all(re.match(r"^[-+]?[\d.]|^-?$|^nan", row[i]) for row in cells[1:])
        for i in range(len(header))
    ]
    lines = []
    for row in cells:
        columns = zip(row, widths, numeric, strict=True)
        text = "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in columns)
        lines.append(text.rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


# -- parsing ---------------------------------------------------------------------------------------


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse without abbreviations, with hyphens for underscores and one-sentence errors."""

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        return super().parse_args([_underscored(arg) for arg in given], *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_one_sentence(message, self._keys()))

    def _keys(self) -> list[str]:
        return [a.dest for a in self._actions if a.dest not in ("help", "config")]


def parser(prog: str, description: str) -> Parser:
    """A command's parser; `prog` is how the user calls it, as in `python -m llama.plan`."""
    return Parser(prog=prog, description=description, allow_abbrev=False, exit_on_error=True)


def _underscored(argument: str) -> str:
    """--optim.min-lr-ratio=0.1 -> --optim.min_lr_ratio=0.1; values stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _one_sentence(message: str, keys: Sequence[str]) -> str:
    """Squeeze an argument error into one line and propose the nearest known key."""
    text = re.sub(r"\s+", " ", message.replace("Parser key", "key")).strip().rstrip(".")
    text = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("<unicode string>:", "line ")
    said = r"(?:[Uu]nrecognized arguments:|does not accept option|Option)"
    unknown = re.search(rf"{said} ['\"]?-{{0,2}}([\w.]+)", text)
    if not unknown:
        return text
    wrong = unknown[1]
    near = difflib.get_close_matches(wrong, keys, n=1, cutoff=0.6)
    if not near:
        last = {key.rpartition(".")[2]: key for key in keys}
        near = [last[k] for k in difflib.get_close_matches(wrong.rpartition(".")[2], last, 1, 0.6)]
    return f"{text}; did you mean {near[0]}?" if near else text


# -- progress --------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal; elsewhere (files, Slurm logs) a plain line now and then."""

    def __init__(self, label: str, total: float | None = None, unit: str = "") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        self._start = self._printed = time.monotonic()
        if sys.stderr.isatty():
            # imported here: commands that print no bar must not pay for rich
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total)
        return self

    def update(self, n: float = 1, note: str = "") -> None:
        """Add `n` units; `note` is shown behind the label."""
        self.done += n
        if self._bar:
            self._bar.update(self._task, advance=n, description=f"{self.label} {note}".strip())
        elif time.monotonic() - self._printed > PLAIN_PROGRESS_EVERY_S:
            self._printed = time.monotonic()
            self._line(note)

    def _line(self, note: str) -> None:
        spent = max(time.monotonic() - self._start, 1e-9)
        of = f" of {show_count(self.total)}" if self.total else ""
        rate = f"{show_count(self.done / spent)} {self.unit}/s".replace(" /s", "/s")
        text = f"{self.label}: {show_count(self.done)}{of} {self.unit}".rstrip()
        print(f"{text}, {show_seconds(spent)}, {rate} {note}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None:
            self._line("")
