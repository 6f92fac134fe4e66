"""One unit of work, in a worker process: pieces of input in, one shard and its counts out.

Documents go through the steps some at a time. A step that raises costs the document it raises on.
A step that crashes the process or takes too long costs the worker; the unit is then done again
with `careful`, where every batch runs in a child process of its own and only the guilty document
is lost. The bytes written are the same either way.
"""

import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from llama.corpus import guard
from llama.corpus.document import (
    SAMPLE_CHARS,
    Document,
    Dropped,
    Ended,
    Item,
    Passed,
    Step,
    describe,
    trace,
)
from llama.corpus.journal import Record, stamp
from llama.corpus.plan import Piece, Read, Unit
from llama.corpus.pool import At, Died, Failed, death
from llama.files import LineWriter

BATCH_DOCUMENTS = 64
BATCH_CHARS = 1 << 20
# Quarantined records listed one by one per unit; beyond, they are only counted.
MAX_LISTED = 10_000
# Beside each shard: id, reason, bytes and step of every document that ended here, and the text of
# the first few of each reason.
DROPPED = "dropped/{}.zst"
SAMPLES = 20

# Format of the input -> "documents", "bytes", "dropped", ... -> name -> count.
Counts = defaultdict[str, defaultdict[str, Counter[str]]]
Outcome = Item | Ended | Passed


def no_counts() -> Counts:
    # without a lambda, since they travel between processes
    return defaultdict(partial(defaultdict, Counter))


def add(total: Mapping[str, Counter[str]], more: Mapping[str, Mapping[str, int]]) -> None:
    """Add counts to counts, group by group."""
    for group, counter in more.items():
        total[group].update(counter)


class Job(NamedTuple):
    """A unit to be done; `lost` are pieces whose reader has crashed before, and how."""

    unit: Unit
    careful: bool = False
    lost: tuple[tuple[int, str], ...] = ()

    @property
    def name(self) -> str:
        return self.unit.output

    @property
    def cost(self) -> int:
        return sum(piece.size for piece in self.unit.pieces)

    def again(self, died: Died) -> "Job | None":
        """The job after a crash: with care, then without the piece whose reader crashes."""
        if not self.careful:
            return self._replace(careful=True)
        if died.place is None or died.place in dict(self.lost):
            return None
        return self._replace(lost=(*self.lost, (died.place, death(died.code))))


def work(
    read: Read, steps: Sequence[Step], folder: Path, deadline_s: float, job: Job, at: At
) -> Record:
    """Do one unit, in a worker: documents that `read` finds, through the steps, into the folder.

    `deadline_s` is the longest time for one document; `at` is told which piece is being read, in
    case the reader crashes.
    """
    tally = _Tally()
    lost = dict(job.lost)
    names = job.name, DROPPED.format(job.name.partition(".")[0])
    path, aside = (folder / name for name in names)
    with LineWriter(path) as out, LineWriter(aside) as dropped:
        for i, piece in enumerate(job.unit.pieces):
            if job.careful:
                at(i)
            files = tally.counts[piece.format]["files"]
            files.update(read=int(piece.begin == 0), bytes=piece.size)
            items: Iterable[Item] = to_its_end(read, piece)
            if i in lost:
                items = [Dropped(piece.name, "crash", piece.size, f"the reader {lost[i]}")]
            for batch in _batches(items, piece.format, tally):
                for item in _applied(steps, batch, deadline_s, job.careful):
                    tally.end(piece.format, item, out, dropped)
    return {
        "unit": job.name,
        "files": {name: stamp(folder / name) for name in names},
        "counts": tally.counts,
        "quarantined": tally.listed,
    }


def to_its_end(read: Read, piece: Piece) -> Iterator[Item]:
    """The reader's items; where it fails, the rest of the piece is one quarantined record."""
    try:
        yield from read(piece)
    except Exception as error:
        of_the_system = isinstance(error, OSError) and error.errno is not None
        reason = "unreadable" if of_the_system else "damaged"
        yield Dropped(piece.name, reason, 0, f"not read to its end: {describe(error)}")


@dataclass
class _Tally:
    """Counts of one unit and its list of quarantined records."""

    counts: Counts = field(default_factory=no_counts)
    listed: list[dict[str, str]] = field(default_factory=list)
    samples: Counter[str] = field(default_factory=Counter)

    def begin(self, format: str, item: Document | Dropped) -> None:
        """A document that the reader has found, whatever becomes of it."""
        self.counts[format]["documents"]["in"] += 1
        self.counts[format]["bytes"]["in"] += item.n_bytes

    def end(self, format: str, item: Outcome, out: LineWriter, dropped: LineWriter) -> None:
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
            item = Ended(item, "", "")
        if isinstance(item, Ended):
            dropped.write(self.drop(counts, item))
        elif isinstance(item, Passed):
            counts["steps"][item.step] += item.documents
            counts["step_bytes"][item.step] += item.n_bytes
        else:
            counts["noted"][item.name] += item.times

    def drop(self, counts: Any, ended: Ended) -> bytes:
        """Count it, and put it on the quarantine's list; returns the line that is kept of it."""
        id, reason, n_bytes, error, detail = ended.dropped
        group = "quarantined" if error else "dropped"
        counts[group][reason] += 1
        counts[f"{group}_bytes"][reason] += n_bytes
        line: dict[str, Any] = {"id": id, "reason": reason, "bytes": n_bytes, "step": ended.step}
        if error:
            line["error"] = _valid(error)
            if len(self.listed) < MAX_LISTED:
                self.listed.append({"id": id, "reason": reason, "error": line["error"]})
        if detail:
            line["detail"] = _valid(detail)
        self.samples[reason] += 1
        if ended.sample and self.samples[reason] <= SAMPLES:
            line["sample"] = _valid(ended.sample)
        return orjson.dumps(line)


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


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


def _applied(
    steps: Sequence[Step], batch: Sequence[Item], deadline_s: float, careful: bool
) -> list[Outcome]:
    """The documents of a batch through the steps, and beside them what the reader dropped.

    In this process, which the alarm ends when it takes too long, or with care in a child process.
    """
    documents = [item for item in batch if isinstance(item, Document)]
    aside: list[Outcome] = [item for item in batch if not isinstance(item, Document)]
    if careful or not documents:
        return [*_guarded(steps, documents, deadline_s), *aside]
    signal.setitimer(signal.ITIMER_REAL, deadline_s)
    try:
        return [*trace(steps, documents), *aside]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _guarded(
    steps: Sequence[Step], documents: Sequence[Document], deadline_s: float
) -> Sequence[Outcome]:
    """`trace` in a child process; if it dies, each document in one of its own."""
    if not documents:
        return []
    [answer] = guard.each(partial(trace, steps), [documents], deadline_s)
    if not isinstance(answer, Died | Failed):
        return answer
    if len(documents) == 1:
        how = death(answer.code) if isinstance(answer, Died) else answer.error
        dropped = documents[0].dropped("crash", f"the process {how}")
        return [Ended(dropped, "", documents[0].text[:SAMPLE_CHARS])]
    return [item for document in documents for item in _guarded(steps, [document], deadline_s)]
