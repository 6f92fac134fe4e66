"""`python -m llama.corpus run`: raw text in, document shards out, by a recipe (paper §2.1).

A recipe is a module of `sources` with `Options` (what its YAML may say), `plan(options, inputs)`
and `steps(options)`, in which global steps may be among the others. `plan` says what is missing on
this machine, and must not need what other recipes make; `steps` is called when its turn has come.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from llama import files
from llama.cli import UserError, expect, parser
from llama.corpus import engine, executors, shuffle
from llama.corpus.executors import Executor
from llama.corpus.plan import Plan

# To add one, add its name: the module is imported when it runs.
RECIPES = """arxiv books c4 commoncrawl github installed plain quality stackexchange
wikipedia""".split()


@dataclass
class Prepared:
    """A recipe that is ready to run: its files are found and its needs are met."""

    recipe: ModuleType
    options: Any
    plan: Plan
    output: Path
    max_quarantined: float
    executor: Executor

    def run(self) -> engine.Summary:
        """Make the documents; prints the table of counts."""
        steps = self.recipe.steps(self.options)
        summary = shuffle.pipeline(
            self.plan, steps, self.output, self.executor, self.max_quarantined
        )
        print(summary.table())
        if not summary.total["documents"]["out"]:
            before = summary.total["documents"]["in"]
            raise UserError(f"{self.output}: no document is left of {before:,}, see above")
        print(f"documents in {self.output}, counts in {self.output / engine.STATS}")
        return summary


def main(argv: list[str]) -> None:
    """Run the recipe that the configuration names."""
    prepare(argv).run()


def prepare(argv: Sequence[str]) -> Prepared:
    """Read a command line and lay out the input."""
    recipe, options, values = parse(argv)
    output = Path(values.output)
    inputs = [Path(path) for path in values.input]
    for path in inputs:
        if output.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--output {output} lies inside --input {path}, and would be read")
    executor = executors.from_arguments(values)
    plan = recipe.plan(options, inputs)
    if not plan.units:
        found = engine.left_out_by_reason(plan.left_out)
        why = ", ".join(f"{reason} {entry['files']}" for reason, entry in found.items())
        raise UserError(f"nothing to read in {', '.join(map(str, inputs))} ({why or 'empty'})")
    return Prepared(recipe, options, plan, output, values.max_quarantined, executor)


def parse(argv: Sequence[str]) -> tuple[ModuleType, Any, Any]:
    """(recipe, its options, all values) of a command line; what is to be read may not be there."""
    name = _recipe(argv)
    recipe = import_module(f"llama.corpus.sources.{name}")
    p = parser("python -m llama.corpus run", f"Recipe {name}: raw text to documents.")
    p.add_argument("--config", action="config", help="YAML file of the recipe.")
    p.add_argument("--recipe", default=name, help="Its name.")
    p.add_argument("--input", nargs="+", default=[], help="Files, or folders that are searched.")
    p.add_argument("--output", required=True, help="Folder of the documents.")
    what = "Share of documents that may be unusable before the run is refused."
    p.add_argument("--max_quarantined", type=float, default=0.01, help=what)
    executors.add_arguments(p)
    p.add_class_arguments(recipe.Options)
    values = p.parse_args(argv)
    keys = recipe.Options.__dataclass_fields__
    options = recipe.Options(**{key: values[key] for key in keys})
    options.source = options.source or Path(values.output).resolve().name
    good = re.fullmatch(r"\w[\w.+-]*", options.source)
    expect(good, f"source is {options.source!r}", "letters, digits, '.', '_', '+' and '-' only")
    share = values.max_quarantined
    expect(0 <= share <= 1, f"max_quarantined is {share}", "0 to 1")
    return recipe, options, values


def _recipe(argv: Sequence[str]) -> str:
    """The recipe that the last --config or --recipe names: its options are needed for parsing."""
    name = None
    for option, value in zip(argv, [*argv[1:], ""], strict=True):
        option, equals, inline = option.partition("=")
        value = inline if equals else value
        if option == "--recipe":
            name = value
        elif option == "--config":
            name = files.read_yaml(value).get("recipe", name)
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise UserError(f"recipe is {name!r}: --config names a YAML with recipe: one of {known}")
    return name
