"""One unit of work, in a worker process: pieces of input in, one shard and its counts out.

Documents go through the steps some at a time. A step that raises costs the document it raises on.
A step that crashes the process or takes too long costs the worker; the unit is then done again
with `careful`, where every batch runs in a child process of its own and only the guilty document
is lost. The bytes written are the same either way.
"""

import os
import pickle
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from llama.corpus.document import Document, Dropped, Item, Step, apply, describe
from llama.corpus.plan import Piece, Unit
from llama.files import LineWriter, sha256

BATCH_DOCUMENTS = 64
BATCH_CHARS = 1 << 20
# Quarantined records listed one by one per unit; beyond, they are only counted.
MAX_LISTED = 10_000

# Format of the input -> "documents", "bytes", "dropped", ... -> name -> count.
Counts = defaultdict[str, defaultdict[str, Counter[str]]]
PlainCounts = Mapping[str, Mapping[str, Mapping[str, int]]]


def no_counts() -> Counts:
    return defaultdict(lambda: defaultdict(Counter))


def add(total: Counts, more: PlainCounts) -> None:
    """Add counts to counts."""
    for format, groups in more.items():
        for group, counter in groups.items():
            total[format][group].update(counter)


class Job(NamedTuple):
    """A unit to be done; `lost` are pieces whose reader has crashed before, and how."""

    unit: Unit
    careful: bool = False
    lost: tuple[tuple[int, str], ...] = ()


@dataclass
class Finished:
    """A unit that is done: what the journal keeps of it."""

    output: str
    sha256: str
    size: int
    counts: Any
    quarantined: list[dict[str, str]]


@dataclass
class Work:
    """What a worker needs to do units.

    Args:
        read: Documents of a piece.
        steps: What documents go through.
        folder: Where shards go.
        deadline_s: Longest time for one document.
    """

    read: Callable[[Piece], Iterator[Item]]
    steps: Sequence[Step]
    folder: Path
    deadline_s: float

    def __call__(self, job: Job, at: Callable[[int], None]) -> Finished:
        """Do one unit; `at` is told which piece is being read, in case the reader crashes."""
        tally = _Tally()
        lost = dict(job.lost)
        run = _apply_in_child if job.careful else _apply_here
        with LineWriter(self.folder / job.unit.output) as out:
            for i, piece in enumerate(job.unit.pieces):
                if job.careful:
                    at(i)
                tally.file(piece)
                items: Iterable[Item] = self._read(piece)
                if i in lost:
                    items = [Dropped(piece.name, "crash", piece.size, f"the reader {lost[i]}")]
                for batch in _batches(items, piece.format, tally):
                    for item in run(self.steps, batch, self.deadline_s):
                        tally.end(piece.format, item, out)
        path = self.folder / job.unit.output
        size = path.stat().st_size
        return Finished(job.unit.output, sha256(path), size, tally.plain(), tally.listed)

    def _read(self, piece: Piece) -> Iterator[Item]:
        """The reader's items; where it fails, the rest of the piece is one quarantined record."""
        try:
            yield from self.read(piece)
        except Exception as error:
            of_the_system = isinstance(error, OSError) and error.errno is not None
            reason = "unreadable" if of_the_system else "damaged"
            yield Dropped(piece.name, reason, 0, f"not read to its end: {describe(error)}")


@dataclass
class _Tally:
    """Counts of one unit and its list of quarantined records."""

    counts: Counts = field(default_factory=no_counts)
    listed: list[dict[str, str]] = field(default_factory=list)

    def file(self, piece: Piece) -> None:
        self.counts[piece.format]["files"].update(
            {"read": int(piece.begin == 0), "bytes": piece.size}
        )

    def begin(self, format: str, item: Document | Dropped) -> None:
        """A document that the reader has found, whatever becomes of it."""
        self.counts[format]["documents"]["in"] += 1
        self.counts[format]["bytes"]["in"] += item.n_bytes

    def end(self, format: str, item: Item, out: LineWriter) -> None:
        """What became of a document."""
        counts = self.counts[format]
        if isinstance(item, Document):
            try:
                line = orjson.dumps(item._asdict())
            except TypeError as error:
                # lone surrogates, or a meta that is not JSON
                item = item.dropped("not_json", str(error))
            else:
                out.write(line)
                counts["documents"]["out"] += 1
                counts["bytes"]["out"] += item.n_bytes
                return
        if isinstance(item, Dropped):
            group = "quarantined" if item.error else "dropped"
            counts[group][item.reason] += 1
            counts[f"{group}_bytes"][item.reason] += item.n_bytes
            if item.error and len(self.listed) < MAX_LISTED:
                told = item.error.encode("utf-8", "replace").decode()
                self.listed.append({"id": item.id, "reason": item.reason, "error": told})
        else:
            counts["noted"][item.name] += 1

    def plain(self) -> dict[str, dict[str, dict[str, int]]]:
        """The counts as plain dictionaries, which travel between processes."""
        return {
            format: {group: dict(counter) for group, counter in groups.items()}
            for format, groups in self.counts.items()
        }


def _batches(items: Iterable[Item], format: str, tally: _Tally) -> Iterator[list[Item]]:
    """Items some at a time; all are counted as read."""
    batch: list[Item] = []
    chars = 0
    for item in items:
        if isinstance(item, Document | Dropped):
            tally.begin(format, item)
        batch.append(item)
        chars += len(item.text) if isinstance(item, Document) else 0
        if len(batch) >= BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    yield batch


def _apply_here(steps: Sequence[Step], batch: list[Item], deadline_s: float) -> list[Item]:
    """A batch through the steps in this process, which the alarm ends when it takes too long."""
    signal.setitimer(signal.ITIMER_REAL, deadline_s)
    try:
        return _mixed(batch, lambda documents: apply(steps, documents))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _apply_in_child(steps: Sequence[Step], batch: list[Item], deadline_s: float) -> list[Item]:
    """A batch through the steps in a child process; if it dies, each document in one of its own."""
    return _mixed(batch, lambda documents: _guarded(steps, documents, deadline_s))


def _mixed(batch: list[Item], through: Callable[[Sequence[Document]], list[Item]]) -> list[Item]:
    """The documents of a batch through the steps, and beside them what the reader dropped."""
    documents = [item for item in batch if isinstance(item, Document)]
    aside = [item for item in batch if not isinstance(item, Document)]
    return (through(documents) if documents else []) + aside


def _guarded(steps: Sequence[Step], documents: Sequence[Document], deadline_s: float) -> list[Item]:
    """`apply` in a child process."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        # nothing of the parent may be flushed or closed from here: leave without clean-up
        code = 1
        try:
            os.close(receiving)
            signal.setitimer(signal.ITIMER_REAL, deadline_s)
            with os.fdopen(sending, "wb") as pipe:
                pickle.dump(apply(steps, documents), pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return list(pickle.loads(answer))
    if len(documents) == 1:
        how = death(os.waitstatus_to_exitcode(status))
        return [documents[0].dropped("crash", f"the process {how}")]
    return [item for document in documents for item in _guarded(steps, [document], deadline_s)]


def death(code: int | None) -> str:
    """How a process ended, from its exit code: what to tell about it."""
    if code == -signal.SIGALRM:
        return "took longer than the deadline"
    if code == -signal.SIGKILL:
        return "was killed (out of memory?)"
    if code is not None and code < 0:
        return f"died of signal {signal.Signals(-code).name}"
    return f"ended with code {code}"
