"""`python -m llama.corpus all`: every source below RAW by its recipe, then the steps across them.

In: a folder with a folder per source, called after its recipe (arxiv, books, c4, commoncrawl,
github, stackexchange, wikipedia; paper §2.1). Out: CLEAN/<source>, folders of documents as the
tokenizer takes them; what lies between, with its counts, in CLEAN/.stages. Everything that can be
wrong with tools, options and input is said before the first recipe runs. A source that fails does
not stop the next; the steps across sources need all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama import cli, files
from llama.cli import UserError
from llama.corpus import executors, recipes, shuffle
from llama.corpus.dedup import options_of, step_class
from llama.corpus.journal import only_one
from llama.corpus.recipes import Prepared

# In this order: models are learnt from Wikipedia, and of equal documents the first source's stays.
SOURCES = ("wikipedia", "books", "arxiv", "stackexchange", "github", "c4", "commoncrawl")


def main(argv: Sequence[str]) -> None:
    """Read the command line, then run."""
    p = cli.parser("python -m llama.corpus all", "Every source below a folder, to documents.")
    p.add_argument("--config", default="configs/corpus/all.yaml", help="Steps across sources.")
    p.add_argument("--input", required=True, help="Folder with a folder per source.")
    p.add_argument("--output", required=True, help="Folder that gets a folder per source.")
    p.add_argument("--sources", nargs="+", default=[], help="Only these; all if not given.")
    executors.add_arguments(p)
    values = p.parse_args(list(argv))
    executors.from_arguments(values)
    raw, clean, config = Path(values.input), Path(values.output), Path(values.config)
    across = _across(files.read_yaml(config), config)
    sources = _sources(raw, values.sources)
    common = ["--workers", str(values.workers), "--executor", values.executor]
    common += ["--cluster", *values.cluster] if values.cluster else []
    prepared = {}
    for source in sources:
        folder = clean / shuffle.STAGES / "recipe" / source if across else clean / source
        line = ["--config", str(config.parent / f"{source}.yaml"), "--source", source]
        line += ["--input", str(raw / source), "--output", str(folder), *common]
        prepared[source] = recipes.prepare(line)
    with only_one(clean):
        run(prepared, across, clean)


def run(prepared: Mapping[str, Prepared], across: Sequence[Any], clean: Path) -> None:
    """Run recipes one after the other, then each step over the documents of the one before."""
    failed = {}
    for source, each in prepared.items():
        print(f"== {source}", flush=True)
        try:
            each.run()
        except UserError as error:
            print(f"{source}: {error}", flush=True)
            failed[source] = str(error)
    if failed:
        told = "; ".join(f"{source}: {error}" for source, error in failed.items())
        raise UserError(f"{len(failed)} of {len(prepared)} sources are not complete: {told}")
    folders = [each.output for each in prepared.values()]
    groups = list(filter(None, shuffle.grouped(across)))
    for i, (step, *then) in enumerate(groups, 1):
        print(f"== {', '.join(each.name for each in (step, *then))}, across sources", flush=True)
        place = clean if i == len(groups) else clean / shuffle.STAGES / f"{i}-{step.name}"
        outputs = [place / source for source in prepared]
        executor = next(iter(prepared.values())).executor
        options = {"then": [{"step": each.name, **asdict(each)} for each in then]} if then else {}
        summaries = shuffle.run(step, folders, outputs, executor, then, options)
        for source, summary in zip(prepared, summaries, strict=True):
            print(f"{source}\n{summary.table()}")
        folders = outputs
    print(f"documents of {', '.join(prepared)} in {clean}")


def _sources(raw: Path, chosen: Sequence[str]) -> list[str]:
    """Folders of sources, in the order in which they are run."""
    if not raw.is_dir():
        raise UserError(f"--input {raw} is no folder")
    found = {path.name for path in raw.iterdir() if path.is_dir() and path.name[0] != "."}
    for name in chosen or found:
        if name not in SOURCES:
            raise UserError(f"{raw / name} is called after no recipe ({', '.join(SOURCES)})")
        if name not in found:
            raise UserError(f"--sources names {name}, but {raw / name} is no folder")
    if not found:
        raise UserError(f"--input {raw} holds no folder of a source")
    return [name for name in SOURCES if name in (chosen or found)]


def _across(config: Mapping[str, Any], path: Path) -> list[Any]:
    """The steps that the configuration lists, as in `across: [{step: exact}]`."""
    steps = []
    for entry in config.get("across") or []:
        options = dict(entry)
        step = step_class(options.pop("step", ""))
        if unknown := options.keys() - set(options_of(step)):
            raise UserError(f"{path}: step {step.name} has no option {', '.join(sorted(unknown))}")
        steps.append(step(**options))
    return steps
