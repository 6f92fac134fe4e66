"""What of a stage is done: a line for the plan, then one for every finished unit, flushed to disk.

A unit's line is written after its files have their names, so a run that is killed anywhere loses at
most the units it had in hand, which are done again to the same bytes. One run at a time holds the
journal. Tasks on other machines leave their records beside it as answers, which it takes in.
"""

import os
import pickle
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

from llama import files
from llama.cli import UserError
from llama.corpus.plan import differences

NAME = "journal.jsonl"
ANSWERS = ".*.answer"

# What is known of a finished unit: its name under "unit", `stamp`s of its files under "files".
Record = dict[str, Any]


def stamp(path: Path, sha256: str = "") -> Record:
    """What tells whether a file is still what was written."""
    status = path.stat()
    digest = sha256 or files.sha256(path)
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}


def intact(path: Path, known: Record) -> bool:
    """Whether a file is what it was; it is read only if it was touched since."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    if status.st_size != known["bytes"]:
        return False
    return status.st_mtime_ns == known["mtime_ns"] or files.sha256(path) == known["sha256"]


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep a second run out of the same output; what a killed one was writing is removed."""
    with files.locked(folder, f"another run is writing to {folder}"):
        try:
            _sweep(folder)
            yield
        finally:
            _sweep(folder)


def _sweep(folder: Path) -> None:
    for part in folder.rglob("*.part-*"):
        part.unlink(missing_ok=True)


@contextmanager
def opened(folder: Path, header: Record) -> Iterator["Journal"]:
    """The journal of an output folder, for one plan.

    Raises `UserError` when another run is at work there, or when the journal is of another plan.
    """
    with only_one(folder), open(folder / NAME, "a+b") as file:
        yield Journal(folder, header, file)


class Journal:
    """The journal of an output folder, see `opened`."""

    def __init__(self, folder: Path, header: Record, file: IO[bytes]) -> None:
        self.folder, self.path, self.header, self._file = folder, folder / NAME, header, file
        self.finished: dict[str, Record] = {}
        self._read()

    def write(self, record: Record) -> None:
        """Record a unit; once this returns, no later run does it again."""
        self.finished[record["unit"]] = record
        self._append(record)

    def collect(self) -> None:
        """Take in what the tasks of a killed run have done elsewhere."""
        for left in self.folder.glob(ANSWERS):
            record = pickle.loads(left.read_bytes())
            if isinstance(record, dict) and record["unit"] not in self.finished:
                self.write(record)
            left.unlink()

    def _read(self) -> None:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if not lines:
            self._begin()
            return
        try:
            header, *records = [orjson.loads(line) for line in lines]
            finished = {record["unit"]: record for record in records}
            same = header["plan"] == self.header["plan"]
        except (orjson.JSONDecodeError, TypeError, KeyError) as error:
            raise UserError(f"{self.path} is damaged ({error}): remove {self.folder}") from error
        if not same:
            raise UserError(
                f"{self.folder} holds a run with another plan: "
                f"{'; '.join(differences(header, self.header))}; "
                "give another --output, or remove that folder to begin again"
            )
        # a line without its end was being written when the run was killed
        self._file.truncate(self._file.tell() - len(torn))
        with ThreadPoolExecutor() as threads:
            whole = threads.map(self._intact, finished.values())
            known = zip(finished.items(), whole, strict=True)
            self.finished = {name: record for (name, record), ok in known if ok}

    def _intact(self, record: Record) -> bool:
        return all(intact(self.folder / name, s) for name, s in record["files"].items())

    def _begin(self) -> None:
        if found := sorted(self.folder.glob("*.jsonl.zst")):
            raise UserError(f"{self.folder} holds {found[0].name} but no journal of a corpus run")
        self._file.truncate(0)
        self._append(self.header)
        files.fsync(self.folder)

    def _append(self, value: Mapping[str, Any]) -> None:
        self._file.write(orjson.dumps(value) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
