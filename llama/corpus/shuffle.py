"""Global steps: what becomes of a document depends on all the others (duplicates, paper §2.1).

In: folders of document shards. Out: as many folders, without what the step found. Four stages on
the runner, of which only resolve holds more than a shard or a partition in memory:

    map      each shard: small records, by the hash in their key put into partitions
    reduce   each partition: records sorted by key, in the order of the input; finds
    resolve  only where finds must be joined once more (clusters): all finds, some at a time
    filter   each shard: documents with the decisions about them, then any further steps

The partitions are files of a folder `.shuffle` that goes when the filter is done. The bytes depend
on the documents alone: not on the number of partitions or workers, nor on kills.
"""

import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from llama import files
from llama.cli import UserError
from llama.corpus import engine, guard, runner
from llama.corpus.document import Document, Item, Step
from llama.corpus.executors import Executor
from llama.corpus.groups import Rows, read_groups, sorted_by_key, write_groups
from llama.corpus.journal import NAME as JOURNAL
from llama.corpus.journal import Record, stamp
from llama.corpus.plan import EXPANSION, Piece, Plan, Unit, header
from llama.corpus.pool import At, Died, death
from llama.corpus.runner import Stage, Task
from llama.corpus.unit import BATCH_DOCUMENTS

WORK, STAGES = ".shuffle", ".stages"
# Text whose records go into one partition: half a GB of records for lines, much less for documents.
PARTITION_BYTES = 1 << 30
# Where the reader of the filter leaves the number of a document for the decisions about it.
_NUMBER = "\0number"


class Global(Protocol):
    """A step over all documents: a dataclass whose fields are its options.

    Rows are structured arrays. `records` has a field "key" of well mixed uint64 (and may have more
    that begin so, as in "key2"), and as `decisions` has "unit", the number of the shard, which is
    filled in after `map`, and "document", the place of a document in its shard from 0.
    """

    name: str
    records: np.dtype[Any]
    decisions: np.dtype[Any]
    # Decisions from the finds of each partition; None where these are decisions already.
    resolve: Callable[[Iterator[Rows]], Rows] | None

    def map(self, unit: int, documents: Iterator[Document]) -> tuple[Rows, Rows]:
        """Records of a shard, and decisions that it takes by itself; a key should occur once, or
        a line that is everywhere fills a partition. Takes one document after the other."""

    def reduce(self, records: Rows) -> Rows:
        """Finds in a partition, sorted by key, equal ones in the order of the input."""

    def apply(self, document: Document, decisions: Rows) -> Item:
        """What becomes of a document about which there are decisions."""


def is_global(step: Any) -> bool:
    return hasattr(step, "reduce")


def grouped(steps: Sequence[Any]) -> list[list[Any]]:
    """Plain steps before the first global one, then each global one with those behind it."""
    parts: list[list[Any]] = [[]]
    for step in steps:
        if is_global(step):
            parts.append([])
        parts[-1].append(step)
    return parts


@dataclass(frozen=True)
class Shuffle:
    """A global step over shards, which are numbered in the order of the inputs.

    Args:
        step: What is looked for.
        shards: Paths of the input.
        partitions: Number of partitions.
        folder: Where the files between the stages go.
        deadline_s: Longest time for one document.
    """

    step: Global
    shards: tuple[Path, ...]
    partitions: int
    folder: Path
    deadline_s: float = engine.DEADLINE_S

    def stages(self, identity: Record) -> list[Stage]:
        """map, reduce and, if the step has it, resolve."""
        sizes = [path.stat().st_size for path in self.shards]
        share = sum(sizes) // self.partitions
        maps = [Task(f"{i:05}", size, i) for i, size in enumerate(sizes)]
        partitions = [Task(f"{i:05}", share, i) for i in range(self.partitions)]
        works = [("map", maps, self._map), ("reduce", partitions, self._reduce)]
        if self.step.resolve:
            works.append(("resolve", [Task("0", sum(sizes), 0)], self._resolve))
        label = f"corpus {self.step.name}, "
        return [Stage(label + n, self.folder / n, identity, jobs, work) for n, jobs, work in works]

    def _map(self, task: Task, at: At) -> Record:
        # what has ended a worker is looked for in processes of their own
        lost = self._guilty(task.what) if task.tried else {}
        try:
            records, decisions = self._rows(task.what, lost)
        except Exception:
            # whatever a document makes the step raise; an error that no document makes goes on
            if lost or not (lost := self._guilty(task.what)):
                raise
            records, decisions = self._rows(task.what, lost)
        records["unit"] = decisions["unit"] = task.what
        partition = (records["key"] >> np.uint64(32)) * np.uint64(self.partitions)
        partition >>= np.uint64(32)
        place, nothing = self.folder / "map", np.zeros(len(decisions), np.int64)
        made = {
            f"{task.name}.records": (records, partition, self.partitions),
            f"{task.name}.decisions": (decisions, nothing, 1),
        }
        known = {name: write_groups(place / name, *rows) for name, rows in made.items()}
        files.write_json(place / f"{task.name}.lost", lost)
        known[f"{task.name}.lost"] = stamp(place / f"{task.name}.lost")
        return {"unit": task.name, "files": known}

    def _rows(self, unit: int, lost: Mapping[int, Any]) -> tuple[Rows, Rows]:
        """What the step makes of a shard without the lost documents; the alarm ends a hang."""
        numbers: list[int] = []

        def given() -> Iterator[Document]:
            for number, document in enumerate(_documents(self.shards[unit])):
                if number not in lost:
                    numbers.append(number)
                    signal.setitimer(signal.ITIMER_REAL, self.deadline_s)
                    yield document

        try:
            found = [rows.copy() for rows in self.step.map(unit, given())]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for rows in found:
            rows["document"] = np.array(numbers, "<u4")[rows["document"]]
        return found[0], found[1]

    def _guilty(self, unit: int) -> dict[int, tuple[str, str]]:
        """Documents of a shard that the step cannot map even alone: number -> reason and error."""
        found: dict[int, tuple[str, str]] = {}
        documents, number = _documents(self.shards[unit]), 0
        while batch := list(islice(documents, BATCH_DOCUMENTS)):
            for answer in guard.each(partial(_map_alone, self.step), batch, self.deadline_s):
                if isinstance(answer, Died):
                    found[number] = "crash", f"the process {death(answer.code)}"
                elif answer:
                    found[number] = "exception", answer.error
                number += 1
        return found

    def _reduce(self, task: Task, at: At) -> Record:
        paths = (self.folder / f"map/{i:05}.records" for i in range(len(self.shards)))
        dtype, n = self.step.records, self.partitions
        records = np.concatenate([read_groups(path, dtype, n, task.what) for path in paths])
        finds = self.step.reduce(sorted_by_key(records))
        return self._decide("reduce", task.name, finds)

    def _resolve(self, task: Task, at: At) -> Record:
        paths = (self.folder / f"reduce/{i:05}.finds" for i in range(self.partitions))
        assert self.step.resolve
        return self._decide("resolve", task.name, self.step.resolve(map(np.load, paths)))

    def _decide(self, stage: str, name: str, rows: Rows) -> Record:
        """Write decisions by shard, or finds that are none yet as they are."""
        if stage == "reduce" and self.step.resolve:
            path = self.folder / stage / f"{name}.finds"
            with files.atomic_file(path) as file:
                np.save(file, rows)
            return {"unit": name, "files": {path.name: stamp(path)}}
        path = self.folder / stage / f"{name}.decisions"
        known = write_groups(path, rows, rows["unit"], len(self.shards))
        return {"unit": name, "files": {path.name: known}}

    def decisions(self, unit: int) -> Rows:
        """All that was decided about a shard, by document."""
        dtype, n = self.step.decisions, len(self.shards)
        parts = [f"reduce/{i:05}" for i in range(self.partitions)]
        parts = ["resolve/0"] if self.step.resolve else parts
        found = [read_groups(self.folder / f"map/{unit:05}.decisions", dtype, 1)]
        found += [read_groups(self.folder / f"{x}.decisions", dtype, n, unit) for x in parts]
        # sorted by all fields: not even their order may tell of the partitions
        return np.sort(np.concatenate(found), order=list(dtype.names or ()))


def _map_alone(step: Global, document: Document) -> None:
    step.map(0, iter([document]))


class Filter:
    """The step that applies decisions; `_read` has left the number of each document."""

    def __init__(self, shuffle: Shuffle) -> None:
        self.shuffle, self.__name__ = shuffle, shuffle.step.name
        self.unit, self.rows = -1, cast(Rows, np.empty(0))
        self.lost: dict[str, tuple[str, str]] = {}

    def __call__(self, documents: Iterator[Document]) -> Iterator[Item]:
        for document in documents:
            meta = dict(document.meta)
            unit, number = meta.pop(_NUMBER)
            if unit != self.unit:
                self.unit, self.rows = unit, self.shuffle.decisions(unit)
                self.lost = files.read_json(self.shuffle.folder / f"map/{unit:05}.lost")
            begin, end = np.searchsorted(self.rows["document"], [number, number + 1])
            document, rows = document._replace(meta=meta), self.rows[begin:end]
            if lost := self.lost.get(str(number)):
                yield document.dropped(*lost)
            else:
                yield self.shuffle.step.apply(document, rows) if len(rows) else document


def _read_plainly(piece: Piece) -> Iterator[Item]:
    return _documents(piece.path)


def _read(numbers: dict[str, int], piece: Piece) -> Iterator[Item]:
    unit = numbers[piece.path]
    for i, document in enumerate(_documents(piece.path)):
        yield document._replace(meta={**document.meta, _NUMBER: [unit, i]})


def _documents(path: str | Path) -> Iterator[Document]:
    for line in files.read_documents(path):
        yield Document(line["id"], line["text"], line.get("source", ""), line.get("meta") or {})


def _shards(folder: Path) -> list[tuple[Path, str | int]]:
    """Shards of a finished run with their hashes, or the documents of others with their sizes."""
    if (folder / engine.STATS).exists():
        outputs = files.read_json(folder / engine.STATS)["outputs"]
        return [(folder / made["name"], made["sha256"]) for made in outputs]
    if (folder / JOURNAL).exists():
        raise UserError(f"{folder} holds an unfinished run: finish that first")
    found: list[tuple[Path, str | int]] = []
    found += [(path, path.stat().st_size) for path in files.document_files(folder)]
    if not found:
        raise UserError(f"{folder} holds no documents")
    return found


def run(
    step: Any,
    inputs: Sequence[Path],
    outputs: Sequence[Path],
    executor: Executor,
    then: Sequence[Step] = (),
    options: Mapping[str, Any] | None = None,
    partitions: int = 0,
    max_quarantined: float = 0.01,
) -> list[engine.Summary]:
    """Take what the step finds in folders of documents out of them, each into its own output.

    Of equal documents the first stays, in the order of the inputs. `then` are steps for those that
    are left, `options` what these follow from. `partitions` is 0 for a number that follows from the
    size of the input. The step may be a plain one that has a name and options like a global one.
    """
    shards = [_shards(folder) for folder in inputs]
    every = tuple(path for found in shards for path, _ in found)
    size = sum(path.stat().st_size * EXPANSION.get(path.suffix, 1) for path in every)
    partitions = partitions or max(1, round(size / PARTITION_BYTES))
    own = {"step": step.name, **asdict(step)}
    known = {str(i): what for i, (_, what) in enumerate(w for found in shards for w in found)}
    shuffle = Shuffle(step, every, partitions, outputs[0] / WORK)
    numbers = {str(path): i for i, path in enumerate(every)}
    read, first = _read_plainly, step
    if is_global(step):
        read, first = partial(_read, numbers), Filter(shuffle)
    of = {**own, **(options or {}), "documents": header(step.name, own, known)["plan"]}
    plans, stages = [], []
    for found, output in zip(shards, outputs, strict=True):
        pieces = [
            Piece(path.name, str(path), "documents", path.stat().st_size) for path, _ in found
        ]
        units = tuple(Unit(f"{i:05}.jsonl.zst", (piece,)) for i, piece in enumerate(pieces))
        plans.append(Plan(step.name, of, read, units))
        stages.append(engine.stage(plans[-1], [first, *then], output, max_quarantined))
    if is_global(step) and not all(runner.finished(stage) for stage in stages):
        for stage in shuffle.stages(header(step.name, {**own, "partitions": partitions}, known)):
            runner.run([stage], executor)
    summaries = [
        engine.conclude(plan, stage, records, max_quarantined)
        for plan, stage, records in zip(plans, stages, runner.run(stages, executor), strict=True)
    ]
    shutil.rmtree(shuffle.folder, ignore_errors=True)
    return summaries


def pipeline(
    plan: Plan,
    steps: Sequence[Any],
    output: Path,
    executor: Executor,
    max_quarantined: float = 0.01,
) -> engine.Summary:
    """A recipe whose steps may be global: what comes before one is made in `.stages` first."""
    parts = grouped(steps)
    folders = [output / STAGES / str(i) for i in range(len(parts) - 1)] + [output]
    summary = engine.run(plan, parts[0], folders[0], executor, max_quarantined)
    for (step, *then), before, after in zip(parts[1:], folders, folders[1:], strict=False):
        [found] = run(
            step, [before], [after], executor, then, plan.options, max_quarantined=max_quarantined
        )
        summary = replace(found, before=summary, left_out=summary.left_out)
    return summary
