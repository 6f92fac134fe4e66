"""Stages of work: units in, their files and a journal out, whatever happens on the way.

A stage is a list of jobs, a function that does one of them, and a folder. The jobs of one or more
stages go over an executor; what is done is journalled, what crashes is tried again, what is left is
named. The bytes depend on the plan alone: not on the executor, the number of workers, nor on how
often the run was killed and started again. What was read is hashed: a run does not go on with files
that have been edited since. Cleaning, global steps and tokenising all run here.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llama import files
from llama.cli import Progress, UserError
from llama.corpus.executors import Executor
from llama.corpus.journal import Journal, Record, intact, opened, stamp
from llama.corpus.pool import At, Died


class Job(Protocol):
    """One unit of work; `cost` is in bytes of input."""

    @property
    def name(self) -> str: ...

    @property
    def cost(self) -> int: ...

    def again(self, died: Died) -> "Job | None":
        """The job after a worker died of it, or None when that is enough."""


class Task(NamedTuple):
    """A job of a kind that is simply tried twice."""

    name: str
    cost: int
    what: Any
    tried: bool = False

    def again(self, died: Died) -> "Task | None":
        return None if self.tried else self._replace(tried=True)


def no_inputs(job: Any) -> Mapping[str, Path]:
    return {}


@dataclass(frozen=True)
class Stage:
    """Work to be done.

    Args:
        label: What the progress bar calls it.
        folder: Where its files go.
        header: What the bytes follow from; a folder begun with another one is refused.
        jobs: Units, each known by its name.
        work: Does a job and returns its record.
        watch: Is shown every record, and says whether to stop.
        more: Jobs to be done (again) once all are done, given their records.
        inputs: Files of a job, by their names, that the header knows by their size only.
    """

    label: str
    folder: Path
    header: Record
    jobs: Sequence[Job]
    work: Callable[[Any, At], Record]
    watch: Callable[[Record], bool] = lambda record: False
    more: Callable[[Mapping[str, Record]], Sequence[Job]] = lambda records: ()
    inputs: Callable[[Any], Mapping[str, Path]] = no_inputs

    def todo(self, finished: Mapping[str, Record]) -> Sequence[Job]:
        return [job for job in self.jobs if job.name not in finished] or self.more(finished)

    def check(self, finished: Mapping[str, Record]) -> None:
        """Raise `UserError` if a job is done whose input is another by now."""
        read = [(finished[job.name], self.inputs(job)) for job in self.jobs if job.name in finished]
        check_inputs(self.folder, read)


def check_inputs(folder: Path, read: Sequence[tuple[Record, Mapping[str, Path]]]) -> None:
    """Raise `UserError` if files, by their names, are no longer those that a record tells of.

    One that was only copied is read to see that, and is the same.
    """
    known = [
        (p, r["inputs"][n])
        for r, paths in read
        for n, p in paths.items()
        if n in r.get("inputs", {})
    ]
    with ThreadPoolExecutor() as threads:
        same = threads.map(lambda given: intact(*given), known)
        edited = [path for (path, _), ok in zip(known, same, strict=True) if not ok]
    if edited:
        raise UserError(
            f"{folder} was begun with other bytes in {edited[0]} ({len(edited)} such files); "
            "give another --output, or remove that folder to begin again"
        )


def _work(works: Mapping[str, tuple[Any, Any]], given: tuple[str, Job], at: At) -> Record:
    """A job, by the work of its stage: it comes with the folder of that."""
    folder, job = given
    work, inputs = works[folder]
    done: Record = files.retried(lambda: work(job, at)) | {"inputs": dict(_hashed(inputs(job)))}
    return done


def _hashed(paths: Mapping[str, Path]) -> Iterator[tuple[str, Record]]:
    for name, path in paths.items():
        # a folder, or what could not be read either
        with suppress(OSError):
            yield name, stamp(path)


def run(stages: Sequence[Stage], executor: Executor) -> list[list[Record]]:
    """Do every job that is not done yet; records of each stage in the order of its jobs.

    Raises `UserError` naming the jobs that could not be done; the others are kept for a next run.
    """
    try:
        with ExitStack() as stack:
            journals = [stack.enter_context(opened(s.folder, s.header)) for s in stages]
            executor.begin([stage.folder for stage in stages])
            for stage, journal in zip(stages, journals, strict=True):
                journal.collect()
                stage.check(journal.finished)
            by_folder = {str(s.folder): (s, j) for s, j in zip(stages, journals, strict=True)}
            while jobs := deque(
                (folder, job) for folder, (s, j) in by_folder.items() for job in s.todo(j.finished)
            ):
                if _stopped(by_folder, jobs, executor):
                    break
            return [
                [j.finished[job.name] for job in s.jobs if job.name in j.finished]
                for s, j in zip(stages, journals, strict=True)
            ]
    except OSError as error:
        where = error.filename or stages[0].folder
        raise UserError(
            f"{where} cannot be written ({error}); mend that and the same command goes on"
        ) from error


def finished(stage: Stage) -> bool:
    """Whether there is nothing left to do."""
    with opened(stage.folder, stage.header) as journal:
        return not stage.todo(journal.finished)


def _stopped(
    by_folder: Mapping[str, tuple[Stage, Journal]],
    jobs: deque[tuple[str, Job]],
    executor: Executor,
) -> bool:
    """One round: write what is done into the journals; whether a stage wants to stop."""
    stages = [stage for stage, _ in by_folder.values()]
    left, cost = len(jobs), sum(job.cost for _, job in jobs)
    done = sum(job.cost for s, j in by_folder.values() for job in s.jobs if job.name in j.finished)
    failed: dict[str, str] = {}
    stop = any([s.watch(record) for s, j in by_folder.values() for record in j.finished.values()])
    works = {str(stage.folder): (stage.work, stage.inputs) for stage in stages}
    with Progress(stages[0].label, done + cost, "bytes") as progress:
        progress.update(done)
        for (folder, job), answer in executor.answers(partial(_work, works), jobs):
            stage, journal = by_folder[folder]
            if isinstance(answer, dict):
                journal.write(answer)
                progress.update(job.cost, job.name)
                left -= 1
                stop = stage.watch(answer) or stop
            elif isinstance(answer, Died) and (again := job.again(answer)):
                print(f"unit {job.name}: {answer.error}, doing it again", file=sys.stderr)
                jobs.appendleft((folder, again))
            else:
                failed[job.name] = answer.error
            if stop or failed:
                jobs.clear()
    if failed:
        where = ", ".join(by_folder)
        named = "; ".join(f"{name}: {error}" for name, error in sorted(failed.items()))
        raise UserError(
            f"{where}: {left} of {sum(len(s.jobs) for s in stages)} units are not done ({named});"
            " the same command goes on with them"
        )
    return stop
