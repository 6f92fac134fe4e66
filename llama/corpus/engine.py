"""Run a recipe: a plan and steps in, document shards with their counts out (paper §2.1).

Output folder: 00000.jsonl.zst ... (documents), stats.json (what went in, came out and was dropped,
and why), quarantine.jsonl.zst (every record that could not be used, with file, line and error) and
journal.jsonl (what is done). The bytes depend on input and options alone: not on the number of
workers, nor on how often the run was killed and started again. Only `_execute` knows that the
workers are processes of this machine.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from llama import cli, files
from llama.cli import UserError
from llama.corpus import pool, unit
from llama.corpus.document import Step
from llama.corpus.journal import Journal
from llama.corpus.plan import LeftOut, Plan
from llama.corpus.unit import Counts, Finished, Job, Work

STATS, QUARANTINE = "stats.json", "quarantine.jsonl.zst"
# After this many documents a run that must pass its limit is stopped before its end.
ENOUGH_DOCUMENTS = 10_000
DEADLINE_S = 300.0
EXAMPLES = 5


@dataclass
class Summary:
    """What a finished run has made.

    Args:
        output: The folder.
        plan: Hash of the plan.
        units: Finished units in the order of their names.
        left_out: Files under the input that were not read.
    """

    output: Path
    plan: str
    units: list[Finished]
    left_out: Sequence[LeftOut]

    @property
    def counts(self) -> Counts:
        """Counts by input format."""
        total = unit.no_counts()
        for done in self.units:
            unit.add(total, done.counts)
        return total

    @property
    def total(self) -> Mapping[str, Mapping[str, int]]:
        """Counts over all formats: total["documents"]["out"], total["dropped"]["empty"], ..."""
        total = unit.no_counts()
        for groups in self.counts.values():
            unit.add(total, {"all": groups})
        return total["all"]

    @property
    def quarantined(self) -> int:
        return sum(self.total["quarantined"].values())

    def table(self) -> str:
        """What a person wants to know: one line a format, then every reason with its count."""
        rows = [(format, *_row(groups)) for format, groups in sorted(self.counts.items())]
        if len(rows) > 1:
            rows.append(("all", *_row(self.total)))
        header = ("input", "files", "on disk", "documents", "text", "kept", "text kept")
        lines = [cli.table(header, rows)]
        for group in ("dropped", "quarantined", "noted"):
            if reasons := self.total.get(group):
                listed = ", ".join(f"{name} {n:,}" for name, n in sorted(reasons.items()))
                lines.append(f"{group}: {listed}")
        for reason, found in left_out_by_reason(self.left_out).items():
            examples = ", ".join(map(repr, found["examples"]))
            lines.append(f"files left out: {reason} {found['files']:,} (such as {examples})")
        return "\n".join(lines)


def _row(groups: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    documents, n_bytes = groups["documents"], groups["bytes"]
    return (
        f"{groups['files']['read']:,}",
        cli.show_bytes(groups["files"]["bytes"]),
        f"{documents.get('in', 0):,}",
        cli.show_bytes(n_bytes.get("in", 0)),
        f"{documents.get('out', 0):,}",
        cli.show_bytes(n_bytes.get("out", 0)),
    )


def left_out_by_reason(left_out: Sequence[LeftOut]) -> dict[str, dict[str, Any]]:
    """Reason -> files, bytes and some names."""
    found: dict[str, dict[str, Any]] = {}
    for name, reason, size in sorted(left_out):
        entry = found.setdefault(reason, {"files": 0, "bytes": 0, "examples": []})
        entry["files"] += 1
        entry["bytes"] += size
        entry["examples"] += [name] if len(entry["examples"]) < EXAMPLES else []
    return found


def run(
    plan: Plan,
    steps: Sequence[Step],
    output: str | Path,
    workers: int,
    max_quarantined: float = 0.01,
    deadline_s: float = DEADLINE_S,
) -> Summary:
    """Do every unit of the plan that is not done yet, over `workers` processes.

    Raises `UserError` naming the units when more than the share `max_quarantined` of the documents
    had to be quarantined, or when a unit could not be done; finished units are kept for a next run.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}, expected 1 or more")
    try:
        return _run(plan, steps, Path(output), workers, max_quarantined, deadline_s)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error}") from error


def _run(
    plan: Plan,
    steps: Sequence[Step],
    output: Path,
    workers: int,
    max_quarantined: float,
    deadline_s: float,
) -> Summary:
    with Journal(output, plan) as journal:
        work = Work(plan.read, tuple(steps), output, deadline_s)
        jobs = deque(Job(u) for u in plan.units if u.output not in journal.finished)
        failed = _do(_execute(work, jobs, workers), jobs, plan, journal, max_quarantined)
        order = {u.output: i for i, u in enumerate(plan.units)}
        done = sorted(journal.finished.values(), key=lambda unit: order[unit.output])
        summary = Summary(output, journal.header["plan"], done, plan.left_out)
        _write_quarantine(summary)
        if failed:
            named = "; ".join(f"{name}: {error}" for name, error in sorted(failed.items()))
            missing = len(plan.units) - len(done)
            raise UserError(
                f"{output}: {missing} of {len(plan.units)} units are not done ({named}); "
                "the same command goes on with them"
            )
        _check_quarantine(summary, max_quarantined)
        assert len(done) == len(plan.units), "a unit was neither done nor refused"
        _write_stats(summary, plan)
    return summary


# What came of each job; the same function over Slurm or Ray would do the same.
_execute: Callable[
    [Work, deque[Job], int], Iterator[tuple[Job, Finished | pool.Failed | pool.Died]]
] = pool.answers


def _do(
    answers: Iterator[tuple[Job, Finished | pool.Failed | pool.Died]],
    jobs: deque[Job],
    plan: Plan,
    journal: Journal,
    max_quarantined: float,
) -> dict[str, str]:
    """Write finished units into the journal, try crashed ones again; errors by unit that failed."""
    failed: dict[str, str] = {}
    size = {u.output: sum(piece.size for piece in u.pieces) for u in plan.units}
    total = sum(size.values())
    documents = quarantined = 0
    with cli.Progress(f"corpus {plan.recipe}", total, "bytes") as progress:
        for name, done in journal.finished.items():
            progress.update(size[name])
            documents += _sum(done, "documents", "in")
            quarantined += _sum(done, "quarantined")
        for job, answer in answers:
            name = job.unit.output
            if isinstance(answer, Finished):
                journal.write(answer)
                progress.update(size[name], name)
                documents += _sum(answer, "documents", "in")
                quarantined += _sum(answer, "quarantined")
                # even if all that is left is good, the limit will be passed
                certain = quarantined * progress.done > max_quarantined * documents * total
                if certain and documents > ENOUGH_DOCUMENTS:
                    jobs.clear()
            elif isinstance(answer, pool.Died) and (again := _again(job, answer)):
                how = unit.death(answer.code)
                print(f"unit {name}: a worker {how}, doing it again with care", file=sys.stderr)
                jobs.appendleft(again)
            else:
                told = answer.error if isinstance(answer, pool.Failed) else unit.death(answer.code)
                failed[name] = told
                jobs.clear()
    return failed


def _sum(done: Finished, group: str, name: str | None = None) -> int:
    found = (groups.get(group, {}) for groups in done.counts.values())
    return sum(c.get(name, 0) if name else sum(c.values()) for c in found)


def _again(job: Job, died: pool.Died) -> Job | None:
    """A crashed job once more: with care, then without the piece whose reader crashes."""
    if not job.careful:
        return job._replace(careful=True)
    if died.place is None or died.place in dict(job.lost):
        return None
    return job._replace(lost=(*job.lost, (died.place, unit.death(died.code))))


def _check_quarantine(summary: Summary, max_quarantined: float) -> None:
    documents = summary.total["documents"]["in"]
    if summary.quarantined <= max_quarantined * documents:
        return
    worst = sorted(summary.units, key=lambda done: -_sum(done, "quarantined"))
    named = [done for done in worst if done.quarantined][:EXAMPLES]
    first = named[0].quarantined[0]
    raise UserError(
        f"{summary.quarantined:,} of {documents:,} documents had to be quarantined "
        f"({summary.quarantined / documents:.2%}), more than max_quarantined allows "
        f"({max_quarantined:.2%}): units {', '.join(done.output for done in named)}; "
        f"{first['id']}: {first['error']}; all are in {summary.output / QUARANTINE}"
    )


def _write_quarantine(summary: Summary) -> None:
    """Every listed record, in the order of the input."""
    path = summary.output / QUARANTINE
    if not any(done.quarantined for done in summary.units):
        path.unlink(missing_ok=True)
        return
    with files.LineWriter(path) as out:
        for done in summary.units:
            for record in done.quarantined:
                out.write(orjson.dumps({**record, "unit": done.output}))


def _write_stats(summary: Summary, plan: Plan) -> None:
    outputs = [
        {"name": done.output, "bytes": done.size, "sha256": done.sha256} for done in summary.units
    ]
    files.write_json(
        summary.output / STATS,
        {
            "recipe": plan.recipe,
            "options": plan.options,
            "plan": summary.plan,
            "total": summary.total,
            "formats": summary.counts,
            "left_out": left_out_by_reason(summary.left_out),
            "outputs": outputs,
        },
    )
