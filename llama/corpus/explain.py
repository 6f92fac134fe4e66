"""`python -m llama.corpus explain`: what happened to one document at each step.

In: the --output of a run and an id. Out: a line for every step with the bytes of the text after it,
the reason and the step where it ended, and how its text begins. Between the stages of a run the
text is on disk; given the raw --input, the steps of the recipe are done again for this document.
"""

import difflib
import heapq
import textwrap
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import takewhile
from os.path import commonprefix
from pathlib import Path
from typing import Any

import orjson

from llama import cli, files
from llama.cli import UserError
from llama.corpus import lineage, recipes
from llama.corpus.document import Document, Passed, trace
from llama.corpus.lineage import READING, Stage
from llama.corpus.shuffle import is_global
from llama.corpus.unit import to_its_end

WIDTH, TEXT_CHARS, CANDIDATES = 80, 600, 100


def main(argv: Sequence[str]) -> None:
    """Look for the id in every source."""
    p = cli.parser("python -m llama.corpus explain", "What happened to one document.")
    p.add_argument("clean", type=str, help="Folder that run, dedup or all has written.")
    p.add_argument("id", type=str, help="As in the documents and in the lists of what was dropped.")
    p.add_argument("--input", default="", help="Raw input of the run, to do each step again.")
    values = p.parse_args(list(argv))
    found = lineage.sources(Path(values.clean))
    told = [tell(name, stages, values.id, values.input) for name, stages in found.items()]
    if not any(told):
        # every document passes through the first stage of its source
        near = _nearest(values.id, [stages[0] for stages in found.values()])
        these = ", ".join(near) or "none"
        raise UserError(f"{values.clean} knows no document {values.id}; near it are {these}")
    print("\n\n".join(filter(None, told)))


def tell(source: str, stages: Sequence[Stage], id: str, raw: str = "") -> str:
    """What is known of a document, or nothing."""
    followed = list(_follow(stages, id))
    if not followed:
        return ""
    first, unit, line = followed[0]
    known, text = _again(first, unit, id, Path(raw, source), Path(raw)) if raw else ({}, "")
    rows, verdict = [], "kept"
    size: int | None = None
    for stage, _, line in followed:
        ended = line.get("step") or READING if "reason" in line else None
        steps = [READING] * (stage is first) + stage.steps
        steps = steps if not ended else steps[: steps.index(ended)] if ended in steps else []
        if steps:
            known[steps[-1]] = line["bytes"] if ended else len(line["text"].encode())
        for step in steps:
            before, size = size, known.get(step)
            what = "read" if step == READING else _change(before, size)
            rows.append((f"{stage.name}: {step}", "" if size is None else f"{size:,}", what))
        if ended:
            verdict = "quarantined: " if "error" in line else "dropped: "
            verdict, size = verdict + line["reason"], line["bytes"]
            verdict += f" ({line['detail']})" if "detail" in line else ""
            rows.append((f"{stage.name}: {ended}", "", verdict))
        known = {}
    error = followed[-1][2].get("error", "")
    verdict = f"{id} of {source}: {size:,} bytes, {verdict}, {error}".removesuffix(", ")
    head = textwrap.fill(verdict, WIDTH, subsequent_indent="  ")
    kept = (at.get("text") or at.get("sample", "") for *_, at in reversed(followed))
    text = next(filter(None, kept), text)
    begins = textwrap.fill(" ".join(text[:TEXT_CHARS].split()), WIDTH - 2) or "(no text is kept)"
    table = cli.table(("step", "bytes", "what happened"), rows)
    return f"{head}\n\n{table}\n\n{textwrap.indent(begins, '  ')}"


def _follow(stages: Sequence[Stage], id: str) -> Iterator[tuple[Stage, int, dict[str, Any]]]:
    """(stage, unit, line of the document or of its end) as far as there are such."""
    begin = orjson.dumps({"id": id})[:-1] + b","
    unit = None
    for stage in stages:
        units = range(len(stage.shards)) if unit is None else [unit]
        # what stays first: of documents with the same id the others are in the lists
        lines = (
            (i, line)
            for paths in (stage.shards, stage.lists)
            for i in units
            for line in files.read_lines(paths[i])
            if line.startswith(begin)
        )
        # a shard stays the same one from stage to stage
        unit, line = next(lines, (unit, b""))
        if line:
            yield stage, int(unit or 0), orjson.loads(line)


def _again(stage: Stage, unit: int, id: str, *inputs: Path) -> tuple[dict[str, int], str]:
    """Bytes after each step of the recipe up to its first global one, and the text as read."""
    header, path = stage.header(), next(filter(Path.is_dir, inputs), inputs[-1])
    if header["recipe"] not in recipes.RECIPES:
        raise UserError(f"--input has no effect: {stage.folder} was made by no recipe")
    recipe = import_module(f"llama.corpus.sources.{header['recipe']}")
    options = recipe.Options(**header["options"])
    plan = recipe.plan(options, [path])
    if plan.header()["inputs"] != header["inputs"]:
        raise UserError(f"--input {path} does not hold the files that {stage.folder} is made of")
    pieces = plan.units[unit].pieces
    items = (item for piece in pieces for item in to_its_end(plan.read, piece))
    found = next((d for d in items if isinstance(d, Document) and d.id == id), None)
    if found is None:
        return {}, ""
    own = list(takewhile(lambda step: not is_global(step), recipe.steps(options)))
    passed = (each for each in trace(own, [found]) if isinstance(each, Passed) and each.documents)
    return {READING: found.n_bytes, **{each.step: each.n_bytes for each in passed}}, found.text


def _change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return "passed on"
    return "unchanged" if before == after else f"changed, {after - before:+,} bytes"


def _nearest(id: str, stages: Sequence[Stage]) -> list[str]:
    """Ids that resemble one that is not there; most mistakes are at one end of it."""

    def alike(other: str) -> int:
        return len(commonprefix((id, other))) + len(commonprefix((id[::-1], other[::-1])))

    paths = (path for stage in stages for path in (*stage.lists, *stage.shards))
    lines = (line for path in paths for line in files.read_lines(path))
    ids = (orjson.loads(b'"' + line[7 : line.index(b'","')] + b'"') for line in lines)
    likely = dict.fromkeys(heapq.nlargest(CANDIDATES, ids, key=alike))
    return difflib.get_close_matches(id, likely, n=3)
