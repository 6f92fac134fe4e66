"""Units of tokenisation: which input files become which shard, and which of them are done.

In: a folder of documents per source. Out: the plan of units, a journal that survives a kill at any
moment, and the units that must be made again because an id of theirs came before.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from llama import files
from llama.cli import UserError
from llama.data.indexed import SUFFIXES
from llama.data.writer import SPLITS

# Bytes of a documents file per token, roughly; only the size of a shard follows from it.
BYTES_PER_TOKEN = {".zst": 1.6, ".gz": 1.6, ".jsonl": 4.5}
JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Unit:
    """Input files that become the shard ``name`` of a source; ``left_out`` are hashes of ids."""

    source: str
    name: str
    inputs: tuple[str, ...]
    input_bytes: int
    left_out: frozenset[int] = frozenset()


def source_names(documents: Path) -> list[str]:
    """Folders of the input, each a source that holds documents."""
    if not documents.is_dir():
        raise UserError(f"--input {documents} is no folder")
    names = sorted(path.name for path in documents.iterdir() if path.is_dir())
    for name in names:
        if not files.document_files(documents / name):
            known = " or ".join(files.DOCUMENT_SUFFIXES)
            raise UserError(f"{documents / name} holds no {known}")
    if not names:
        raise UserError(f"--input {documents} holds no folder of documents per source")
    return names


def plan_units(folder: Path, shard_tokens: int) -> list[Unit]:
    """Input files of a source, sorted, in groups of about ``shard_tokens`` tokens."""
    found = files.document_files(folder)
    groups: list[list[tuple[str, int]]] = []
    room = 0.0
    for path in sorted(found, key=lambda path: path.relative_to(folder).as_posix()):
        size = path.stat().st_size
        guess = size / BYTES_PER_TOKEN[path.suffix]
        if not groups or guess > room:
            groups.append([])
            room = shard_tokens
        groups[-1].append((path.relative_to(folder).as_posix(), size))
        room -= guess
    return [
        Unit(folder.name, f"{i:05d}", tuple(n for n, _ in group), sum(s for _, s in group))
        for i, group in enumerate(groups)
    ]


def plan_hash(units: Sequence[Unit]) -> str:
    """Which files of which size go into which unit."""
    plan = [(unit.name, unit.inputs, unit.input_bytes) for unit in units]
    return hashlib.sha256(orjson.dumps(plan)).hexdigest()


class Journal:
    """Finished units of a source: a line each behind the line of the plan."""

    def __init__(self, folder: Path, plan: dict[str, Any], itemsize: int) -> None:
        self.folder, self.path, self.itemsize = folder, folder / JOURNAL, itemsize
        self.done: dict[str, dict[str, Any]] = {}
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        # What a kill leaves behind the last newline is no record.
        records = [orjson.loads(line) for line in lines[:-1]]
        if records:
            refuse_other_plan(folder, records[0], plan)
        else:
            files.write_atomic(self.path, orjson.dumps(plan) + b"\n")
        if len(lines) > 1 and lines[-1]:
            files.write_atomic(self.path, b"\n".join(lines[:-1]) + b"\n")
        for record in records[1:]:
            self.done[record["unit"]] = record
        self.done = {name: r for name, r in self.done.items() if self._there(r)}

    def add(self, record: dict[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(orjson.dumps(record) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[record["unit"]] = record

    def _there(self, record: dict[str, Any]) -> bool:
        """Whether the shards of a record are still there, by name and size."""
        for split, shard in record["shards"].items():
            base = self.folder / split / record["unit"]
            sizes = [_size(f"{base}{suffix}") for suffix in SUFFIXES]
            if shard is None:
                if any(size is not None for size in sizes):
                    return False
            elif None in sizes or sizes[0] != shard["tokens"] * self.itemsize:
                return False
        return True


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def refuse_other_plan(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if old.get(key) != value:
            what = "other input files" if key == "inputs" else f"{key} {old.get(key)}, not {value}"
            raise UserError(f"{folder} was begun with {what}: remove it or choose another --output")


def duplicates(folder: Path, units: Sequence[Unit], done: dict[str, dict[str, Any]]) -> list[Unit]:
    """Units that hold an id which an earlier unit holds too, to be made again without it."""
    hashes, owners = [np.empty(0, "<u8")], [np.empty(0, np.int64)]
    for i, unit in enumerate(units):
        for split in SPLITS:
            if done[unit.name]["shards"][split] is not None:
                hashes.append(np.fromfile(folder / split / f"{unit.name}.hash", "<u8"))
                owners.append(np.full(len(hashes[-1]), i))
    keys, owner = np.concatenate(hashes), np.concatenate(owners)
    order = np.lexsort((owner, keys))
    again = order[1:][keys[order][1:] == keys[order][:-1]]
    left_out: dict[int, set[int]] = {}
    for i, key in zip(owner[again].tolist(), keys[again].tolist(), strict=True):
        left_out.setdefault(i, set(done[units[i].name]["left_out"])).add(key)
    return [replace(units[i], left_out=frozenset(keys)) for i, keys in sorted(left_out.items())]


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep a second run out of the same output."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder} is being written by another run of this command") from None
    finally:
        os.close(handle)


def hold(path: Path) -> int:
    """Mark a worker as alive; the kernel forgets it when the worker dies."""
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def wait_for_workers(path: Path) -> None:
    """Wait until the workers of a run that was killed have noticed and ended."""
    if path.exists():
        handle = os.open(path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.close(handle)
