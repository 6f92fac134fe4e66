"""What of a run is done: a line for the plan, then one for every finished unit, flushed to disk.

A unit's line is written after its shard has its name, so a run that is killed anywhere loses at
most the units it had in hand, which are done again to the same bytes. One run at a time holds the
journal.
"""

import fcntl
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from llama import files
from llama.cli import UserError
from llama.corpus.plan import Plan, differences
from llama.corpus.unit import Finished

NAME = "journal.jsonl"


class Journal:
    """The journal of an output folder, opened for one plan.

    Raises `UserError` when another run is at work there, or when the journal is of another plan.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.path = folder, folder / NAME
        self.header = plan.header()
        self.finished: dict[str, Finished] = {}

    def __enter__(self) -> "Journal":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")
        try:
            self._lock()
            self._read()
        except BaseException:
            with suppress(OSError):
                self._file.close()
            raise
        self._sweep()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sweep()
        # on a full disk closing tries once more to write, and fails once more
        with suppress(OSError):
            self._file.close()

    def write(self, done: Finished) -> None:
        """Record a unit; once this returns, no later run does it again."""
        self.finished[done.output] = done
        self._append(asdict(done))

    def _sweep(self) -> None:
        """Remove what killed workers were writing."""
        for left in self.folder.glob("*.part-*"):
            left.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {self.folder}") from None

    def _read(self) -> None:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if not lines:
            self._begin()
            return
        try:
            header, *units = [orjson.loads(line) for line in lines]
            finished = [Finished(**unit) for unit in units]
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
        self.finished = {unit.output: unit for unit in finished if self._intact(unit)}

    def _begin(self) -> None:
        if found := sorted(self.folder.glob("*.jsonl.zst")):
            raise UserError(f"{self.folder} holds {found[0].name} but no journal of a corpus run")
        self._file.truncate(0)
        self._append(self.header)
        files.fsync_folder(self.folder)

    def _append(self, value: Mapping[str, Any]) -> None:
        self._file.write(orjson.dumps(value) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _intact(self, unit: Finished) -> bool:
        """Whether a shard is still what was written."""
        path = self.folder / unit.output
        if not path.is_file() or path.stat().st_size != unit.size:
            return False
        return files.sha256(path) == unit.sha256
