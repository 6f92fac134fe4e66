"""`python -m llama.corpus dedup`: a step over documents of one or more sources (paper §2.1).

In: folders of documents. Out: folders of the same names below --output. Of documents that are the
same, the one in the first folder stays.
"""

from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from llama.cli import UserError, expect, parser
from llama.corpus import executors, shuffle

# Name of a step, which is that of its module -> its class, a dataclass of its options.
_CLASSES = "Containment Decontaminate Exact Lines MinHash Personal".split()
STEPS = {name.lower(): name for name in _CLASSES}


def step_class(name: str) -> Any:
    """The class of a step."""
    expect(name in STEPS, f"step is {name!r}", f"one of {', '.join(STEPS)}")
    return getattr(import_module(f"llama.corpus.steps.{name}"), STEPS[name])


def options_of(step: Any) -> list[str]:
    """What a user may set of a step: what its class is made with."""
    return [each.name for each in fields(step) if each.init]


def main(argv: Sequence[str]) -> None:
    """Run one step."""
    place = list(argv).index("--step") + 1 if "--step" in argv else 0
    name = argv[place] if 0 < place < len(argv) else "exact"
    step = step_class(name)
    p = parser("python -m llama.corpus dedup", f"{step.__doc__}")
    p.add_argument("--step", default=name, help="One of " + ", ".join(STEPS) + ".")
    p.add_argument("--input", nargs="+", required=True, help="Folders of documents, best first.")
    p.add_argument("--output", required=True, help="Folder in which each gets its own.")
    p.add_argument("--partitions", type=int, default=0, help="0: by the size of the input.")
    executors.add_arguments(p)
    p.add_class_arguments(step)
    values = p.parse_args(list(argv))
    executor = executors.from_arguments(values)
    expect(values.partitions >= 0, f"--partitions is {values.partitions}", "0 or more")
    inputs = [Path(path).resolve() for path in values.input]
    outputs = [Path(values.output) / path.name for path in inputs]
    for path in inputs:
        if not path.is_dir():
            raise UserError(f"--input {path} is no folder")
        if path in [output.resolve() for output in outputs]:
            raise UserError(f"--output {values.output} would write over --input {path}")
    if len(set(outputs)) < len(outputs):
        raise UserError(f"--input holds two folders of one name among {', '.join(values.input)}")
    chosen = step(**{key: values[key] for key in options_of(step)})
    found = shuffle.run(chosen, inputs, outputs, executor, partitions=values.partitions)
    for output, summary in zip(outputs, found, strict=True):
        print(f"{output}\n{summary.table()}")
