"""Run a recipe: a plan and steps in, document shards with their counts out (paper §2.1).

Output folder: 00000.jsonl.zst ... (documents), dropped/00000.zst ... (what ended, where and why),
stats.json (what went in, came out and was dropped, by step and reason), quarantine.jsonl.zst (every
record that could not be used, with file, line and error) and journal.jsonl (what is done). The
bytes depend on input and options alone.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from llama import cli, files
from llama.cli import UserError
from llama.corpus import runner, unit
from llama.corpus.document import Step
from llama.corpus.executors import Executor
from llama.corpus.journal import Record
from llama.corpus.plan import LeftOut, Plan
from llama.corpus.runner import Stage
from llama.corpus.unit import Counts, Job

STATS, QUARANTINE = "stats.json", "quarantine.jsonl.zst"
# After this many documents a run that must pass its limit is stopped before its end.
ENOUGH_DOCUMENTS = 10_000
DEADLINE_S = 300.0
EXAMPLES = 5
# Groups of counts that add up over the parts of a run.
ENDS = ("dropped", "dropped_bytes", "quarantined", "quarantined_bytes", "noted")


@dataclass
class Summary:
    """What a finished run has made.

    Args:
        output: The folder.
        name: Recipe or step.
        units: Finished units in the order of their names.
        left_out: Files under the input that were not read.
        before: The run that has made what was read, if it is a part of this one.
    """

    output: Path
    name: str
    units: Sequence[Record]
    left_out: Sequence[LeftOut]
    before: "Summary | None" = None

    @property
    def counts(self) -> Counts:
        """Counts by input format, of the last part."""
        total = unit.no_counts()
        for done in self.units:
            for format, groups in done["counts"].items():
                unit.add(total[format], groups)
        return total

    @property
    def total(self) -> Mapping[str, Mapping[str, int]]:
        """Counts over all formats and parts: total["documents"]["out"], ["dropped"]["empty"]..."""
        total = defaultdict[str, Counter[str]](Counter)
        for groups in self.counts.values():
            unit.add(total, groups)
        if self.before:
            earlier = self.before.total
            unit.add(total, {group: earlier.get(group, {}) for group in ENDS})
            total["files"] = Counter(earlier["files"])
            for group in ("documents", "bytes"):
                total[group]["in"] = earlier[group]["in"]
        return total

    @property
    def quarantined(self) -> int:
        return sum(self.total["quarantined"].values())

    def table(self) -> str:
        """What a person wants to know: a line a format and part, then every reason's count."""
        parts = [self]
        while parts[0].before:
            parts.insert(0, parts[0].before)
        rows = [(format, *_row(groups)) for format, groups in sorted(parts[0].counts.items())]
        rows += [
            (part.name, "", "", *_row(g)[2:]) for part in parts[1:] for g in part.counts.values()
        ]
        if len(rows) > 1:
            rows.append(("all", *_row(self.total)))
        header = ("input", "files", "on disk", "documents", "text", "kept", "text kept")
        lines = [cli.table(header, rows)]
        total = self.total
        for group in ("dropped", "quarantined", "noted"):
            if reasons := total.get(group):
                listed = ", ".join(f"{name} {n:,}" for name, n in sorted(reasons.items()))
                lines.append(f"{group}: {listed}")
        for reason, found in left_out_by_reason(self.left_out).items():
            examples = ", ".join(map(repr, found["examples"]))
            lines.append(f"files left out: {reason} {found['files']:,} (such as {examples})")
        return "\n".join(lines)


def _row(groups: Mapping[str, Mapping[str, int]]) -> list[str]:
    files, documents, n_bytes = groups["files"], groups["documents"], groups["bytes"]
    row = [f"{files['read']:,}", cli.show_bytes(files["bytes"])]
    for way in ("in", "out"):
        row += [f"{documents.get(way, 0):,}", cli.show_bytes(n_bytes.get(way, 0))]
    return row


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
    workers: int | Executor,
    max_quarantined: float = 0.01,
    deadline_s: float = DEADLINE_S,
) -> Summary:
    """Do every unit of the plan that is not done yet, `workers` at a time.

    Raises `UserError` naming the units when more than the share `max_quarantined` of the documents
    had to be quarantined, or when a unit could not be done; finished units are kept for a next run.
    """
    executor = Executor(workers) if isinstance(workers, int) else workers
    executor.check()
    prepared = stage(plan, steps, output, max_quarantined, deadline_s)
    [records] = runner.run([prepared], executor)
    return conclude(plan, prepared, records, max_quarantined)


def stage(
    plan: Plan,
    steps: Sequence[Step],
    output: str | Path,
    max_quarantined: float = 0.01,
    deadline_s: float = DEADLINE_S,
) -> Stage:
    """A recipe as a stage of the runner."""
    work = partial(unit.work, plan.read, tuple(steps), Path(output), deadline_s)
    jobs = [Job(u) for u in plan.units]
    limit = _limit(max_quarantined, {job.name: job.cost for job in jobs})
    label, folder = f"corpus {plan.recipe}", Path(output)
    return Stage(label, folder, plan.header(), jobs, work, limit, inputs=_inputs)


def _inputs(job: Job) -> dict[str, Path]:
    """Files that the unit is the first to read of, whole."""
    return {piece.name: Path(piece.path) for piece in job.unit.pieces if not piece.begin}


def conclude(
    plan: Plan, stage: Stage, records: Sequence[Record], max_quarantined: float = 0.01
) -> Summary:
    """Check the records of a stage that has run, and write the lists and counts beside them."""
    summary = Summary(stage.folder, plan.recipe, records, plan.left_out)
    with cli.as_user_error(f"{stage.folder} cannot be written", OSError):
        _write_quarantine(summary)
        _check_quarantine(summary, max_quarantined)
        assert len(records) == len(plan.units), "a unit was neither done nor refused"
        made = ((done["unit"], done["files"][done["unit"]]) for done in records)
        stats = {
            "recipe": plan.recipe,
            "options": plan.options,
            "plan": stage.header["plan"],
            "total": summary.total,
            "formats": summary.counts,
            "left_out": left_out_by_reason(summary.left_out),
            "outputs": [{"name": n, "bytes": s["bytes"], "sha256": s["sha256"]} for n, s in made],
        }
        files.write_json(stage.folder / STATS, stats)
    return summary


def _limit(max_quarantined: float, cost: Mapping[str, int]) -> Callable[[Record], bool]:
    """Says to stop once the quarantine will pass its limit even if all that is left is good."""
    total, done = sum(cost.values()), Counter[str]()

    def watch(record: Record) -> bool:
        read, quarantined = _sum(record, "documents", "in"), _sum(record, "quarantined")
        done.update(cost=cost[record["unit"]], documents=read, quarantined=quarantined)
        certain = done["quarantined"] * done["cost"] > max_quarantined * done["documents"] * total
        return certain and done["documents"] > ENOUGH_DOCUMENTS

    return watch


def _sum(record: Record, group: str, name: str | None = None) -> int:
    found = (groups.get(group, {}) for groups in record["counts"].values())
    return sum(c.get(name, 0) if name else sum(c.values()) for c in found)


def _check_quarantine(summary: Summary, max_quarantined: float) -> None:
    documents = summary.total["documents"]["in"]
    if summary.quarantined <= max_quarantined * documents:
        return
    worst = sorted(summary.units, key=lambda done: -_sum(done, "quarantined"))
    named = [done for done in worst if done["quarantined"]][:EXAMPLES]
    first, where = named[0]["quarantined"][0], ", ".join(done["unit"] for done in named)
    raise UserError(
        f"{summary.quarantined:,} of {documents:,} documents had to be quarantined "
        f"({summary.quarantined / documents:.2%}), more than max_quarantined allows "
        f"({max_quarantined:.2%}): units {where}; "
        f"{first['id']}: {first['error']}; all are in {summary.output / QUARANTINE}"
    )


def _write_quarantine(summary: Summary) -> None:
    """Every listed record, in the order of the input."""
    path = summary.output / QUARANTINE
    if not any(done["quarantined"] for done in summary.units):
        path.unlink(missing_ok=True)
        return
    with files.LineWriter(path) as out:
        for done in summary.units:
            for record in done["quarantined"]:
                out.write(orjson.dumps({**record, "unit": done["unit"]}))
