"""Stages of work: units in, their files and a journal out, whatever happens on the way.

A stage is a list of jobs, a function that does one of them, and a folder. The jobs of one or more
stages go over an executor; what is done is journalled, what crashes is tried again, what is left is
named. The bytes depend on the plan alone: not on the executor, the number of workers, nor on how
often the run was killed and started again. Cleaning, global steps and tokenising all run here.
"""

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llama import cli
from llama.cli import UserError
from llama.corpus.executors import Executor
from llama.corpus.journal import Journal, Record
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
    """

    label: str
    folder: Path
    header: Record
    jobs: Sequence[Job]
    work: Callable[[Any, At], Record]
    watch: Callable[[Record], bool] = lambda record: False
    more: Callable[[Mapping[str, Record]], Sequence[Job]] = lambda records: ()

    def todo(self, finished: Mapping[str, Record]) -> Sequence[Job]:
        return [job for job in self.jobs if job.name not in finished] or self.more(finished)


class _Works:
    """The work of every stage in one worker; a job comes with the folder of its stage."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.works = {str(stage.folder): stage.work for stage in stages}

    def __call__(self, given: tuple[str, Job], at: At) -> Record:
        folder, job = given
        return self.works[folder](job, at)


def run(stages: Sequence[Stage], executor: Executor) -> list[list[Record]]:
    """Do every job that is not done yet; records of each stage in the order of its jobs.

    Raises `UserError` naming the jobs that could not be done; the others are kept for a next run.
    """
    try:
        with ExitStack() as stack:
            journals = [stack.enter_context(Journal(s.folder, s.header)) for s in stages]
            executor.begin([stage.folder for stage in stages])
            for journal in journals:
                journal.collect()
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
    with Journal(stage.folder, stage.header) as journal:
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
    with cli.Progress(stages[0].label, done + cost, "bytes") as progress:
        progress.update(done)
        for (folder, job), answer in executor.answers(_Works(stages), jobs):
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
