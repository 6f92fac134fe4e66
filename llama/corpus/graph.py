"""`python -m llama.corpus all`: every source below RAW by its recipe, models, steps across sources.

In: a folder with a folder per source, called after its recipe (arxiv, books, c4, commoncrawl,
github, stackexchange, wikipedia; paper §2.1). Out: CLEAN/<source>, folders of documents as the
tokenizer takes them; what lies between, with its counts, in CLEAN/.stages. Models are learnt from
the clean articles and the clean crawl (or given with --models), and the crawl is graded by them;
what there is too little to learn from is left out, and said. Everything that can be wrong with
tools, options and input is said before the first recipe runs. A source that fails does not stop the
next; what comes after needs all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama import cli, files
from llama.cli import UserError
from llama.corpus import executors, recipes, shuffle
from llama.corpus.dedup import options_of, step_class
from llama.corpus.executors import Executor
from llama.corpus.journal import only_one
from llama.corpus.models.train import train
from llama.corpus.recipes import Prepared
from llama.corpus.sources import quality

# In this order: models are learnt from Wikipedia, and of equal documents the first source's stays.
SOURCES = ("wikipedia", "books", "arxiv", "stackexchange", "github", "c4", "commoncrawl")
GRADED = "commoncrawl"


def main(argv: Sequence[str]) -> None:
    """Read the command line, then run."""
    p = cli.parser("python -m llama.corpus all", "Every source below a folder, to documents.")
    p.add_argument("--config", default="configs/corpus/all.yaml", help="Steps across sources.")
    p.add_argument("--input", required=True, help="Folder with a folder per source.")
    p.add_argument("--output", required=True, help="Folder that gets a folder per source.")
    p.add_argument("--sources", nargs="+", default=[], help="Only these; all if not given.")
    p.add_argument("--models", default="", help="Folder of models, in place of learning; or none.")
    executors.add_arguments(p)
    values = p.parse_args(list(argv))
    executor = executors.from_arguments(values)
    raw, clean, config = Path(values.input), Path(values.output), Path(values.config)
    across = _across(files.read_yaml(config), config)
    sources = _sources(raw, values.sources)
    common = ["--workers", str(values.workers), "--executor", values.executor]
    common += ["--cluster", *values.cluster] if values.cluster else []
    stages = clean / shuffle.STAGES
    is_graded = GRADED in sources and values.models != "none"
    prepared = {}
    for source in sources:
        is_last = not across and not (is_graded and source == GRADED)
        folder = clean / source if is_last else stages / "recipe" / source
        line = ["--config", str(config.parent / f"{source}.yaml"), "--source", source]
        line += ["--input", str(raw / source), "--output", str(folder), *common]
        prepared[source] = recipes.prepare(line)
    models = Path(values.models or stages / "models")
    grade = ["--config", str(config.parent / "quality.yaml"), "--source", GRADED, *common]
    grade += ["--input", str(stages / "recipe" / GRADED), "--models", str(models)]
    grade += ["--output", str((stages / "0-quality" if across else clean) / GRADED)]
    if is_graded:
        _, options, _ = recipes.parse(grade)
        if values.models:
            quality.check(options)
    with only_one(clean):
        folders = _run(prepared)
        if is_graded:
            grade += [] if values.models else _learn(folders, models, executor)
            print(f"== quality of {GRADED}", flush=True)
            each = recipes.prepare(grade)
            each.run()
            folders[GRADED] = each.output
        elif GRADED in sources:
            print(f"== {GRADED} stays as it is, ungraded: --models none")
        _join(folders, across, clean, executor)
    print(f"documents of {', '.join(folders)} in {clean}")


def _run(prepared: Mapping[str, Prepared]) -> dict[str, Path]:
    """Recipes one after the other; the folder of each."""
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
    return {source: each.output for source, each in prepared.items()}


def _learn(folders: Mapping[str, Path], models: Path, executor: Executor) -> list[str]:
    """Models from what there is; options of the recipe quality that follow from what is not."""
    print("== models", flush=True)
    articles = [folders["wikipedia"]] if "wikipedia" in folders else []
    learnt = train(articles, [folders[GRADED]], models, executor, needs_all=False)["learnt"]
    return [] if "references" in learnt else ["--min_reference_score", "0"]


def _join(
    folders: Mapping[str, Path], across: Sequence[Any], clean: Path, executor: Executor
) -> None:
    """Each step across sources over the documents of the one before."""
    groups = list(filter(None, shuffle.grouped(across)))
    inputs = list(folders.values())
    for i, (step, *then) in enumerate(groups, 1):
        print(f"== {', '.join(each.name for each in (step, *then))}, across sources", flush=True)
        place = clean if i == len(groups) else clean / shuffle.STAGES / f"{i}-{step.name}"
        outputs = [place / source for source in folders]
        options = {"then": [{"step": each.name, **asdict(each)} for each in then]} if then else {}
        summaries = shuffle.run(step, inputs, outputs, executor, then, options)
        for source, summary in zip(folders, summaries, strict=True):
            print(f"{source}\n{summary.table()}")
        inputs = outputs


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
