"""`python -m llama.corpus run`: raw text in, document shards out, by a recipe (paper §2.1).

A recipe is a module with `Options` (what its YAML may say), `plan` and `steps`; see `sources/`.
"""

import os
import re
from pathlib import Path
from types import ModuleType

import yaml

from llama import cli
from llama.cli import UserError
from llama.corpus import engine
from llama.corpus.sources import installed, plain

RECIPES: dict[str, ModuleType] = {"plain": plain, "installed": installed}
COMMANDS = ("run",)
USAGE = """usage: python -m llama.corpus run --config configs/corpus/plain.yaml --input PATH ...
       --output data/SET/documents/SOURCE [--workers N] [--max_quarantined 0.01] [--OPTION VALUE]

Read a file or everything below a folder and write documents; `run --config FILE --help` lists the
options of a recipe."""


def main(argv: list[str]) -> None:
    """Choose the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
    elif argv[0] == "run":
        run(argv[1:])
    else:
        raise UserError(f"unknown command {argv[0]!r}, expected one of {', '.join(COMMANDS)}")


def run(argv: list[str]) -> None:
    """Run the recipe that the configuration names."""
    name = _recipe(argv)
    recipe = RECIPES[name]
    p = cli.parser("python -m llama.corpus run", f"Recipe {name}: raw text to documents.")
    p.add_argument("--config", action="config", help="YAML file of the recipe.")
    p.add_argument("--recipe", default=name, help="Its name.")
    p.add_argument("--input", nargs="+", default=[], help="Files, or folders that are searched.")
    p.add_argument("--output", required=True, help="Folder of the documents.")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Processes.")
    p.add_argument(
        "--max_quarantined",
        type=float,
        default=0.01,
        help="Share of documents that may be unusable before the run is refused.",
    )
    p.add_class_arguments(recipe.Options)
    values = p.parse_args(argv)
    output = Path(values.output)
    inputs = [Path(path) for path in values.input]
    for path in inputs:
        if output.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--output {output} lies inside --input {path}, and would be read")
    keys = recipe.Options.__dataclass_fields__
    options = recipe.Options(**{key: values[key] for key in keys})
    options.source = options.source or output.resolve().name
    if not re.fullmatch(r"\w[\w.+-]*", options.source):
        raise UserError(
            f"source is {options.source!r}, expected letters, digits, '.', '_', '+' and '-' only"
        )
    if not 0 <= values.max_quarantined <= 1:
        raise UserError(f"max_quarantined is {values.max_quarantined}, expected 0 to 1")
    plan = recipe.plan(options, inputs)
    if not plan.units:
        found = engine.left_out_by_reason(plan.left_out)
        why = ", ".join(f"{reason} {entry['files']}" for reason, entry in found.items())
        raise UserError(f"nothing to read in {', '.join(map(str, inputs))} ({why or 'empty'})")
    summary = engine.run(
        plan, recipe.steps(options), output, values.workers, values.max_quarantined
    )
    print(summary.table())
    if not summary.total["documents"]["out"]:
        raise UserError(f"no document is left of {summary.total['documents']['in']:,}, see above")
    print(f"documents in {output}, counts in {output / engine.STATS}")


def _recipe(argv: list[str]) -> str:
    """The recipe that the last --config or --recipe names: its options are needed for parsing."""
    name = None
    for option, value in zip(argv, [*argv[1:], ""], strict=True):
        option, equals, inline = option.partition("=")
        value = inline if equals else value
        if option == "--recipe":
            name = value
        elif option == "--config":
            try:
                loaded = yaml.safe_load(Path(value).read_text())
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"--config {value} cannot be read: {reason}") from error
            name = (loaded if isinstance(loaded, dict) else {}).get("recipe", name)
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise UserError(f"recipe is {name!r}: --config names a YAML with recipe: one of {known}")
    return name


if __name__ == "__main__":
    cli.run(main)
