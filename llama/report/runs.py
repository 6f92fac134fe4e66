"""The configuration and the numbers of runs, as a report needs them.

In: run folders as `train.py` leaves them, also while they are still written. Out: plain values.
Nothing is written and torch is not imported.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from llama import config, costs, files
from llama.cli import UserError


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    folder: Path
    label: str
    # by dotted key, as on the command line
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    env: dict[str, Any]
    verdict: dict[str, Any]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(tokens, values) of the rows that have a key; a number that was not finite is NaN."""
        pairs = [
            (row["tokens"], math.nan if row[key] is None else row[key])
            for row in self.rows
            if key in row and row.get("tokens")
        ]
        return [x for x, _ in pairs], [y for _, y in pairs]

    def last(self, key: str) -> Any:
        """The newest value of a key, or None."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)

    def sources(self) -> list[str]:
        """Sources with a loss, the heaviest of the mixture first."""
        weights = self.weights()
        keys = {key for row in self.rows for key in row}
        names = {key.partition("/")[2] for key in keys if key.startswith(("loss/", "val/"))}
        return sorted(names, key=lambda name: (-weights.get(name, 0), name))

    def part(self, prefix: str) -> dict[str, Any]:
        """Settings below a dotted key, as `model` or `data.mixture`."""
        start = prefix + "."
        return {k.removeprefix(start): v for k, v in self.config.items() if k.startswith(start)}

    def weights(self) -> dict[str, float]:
        """The mixture that the configuration asks for."""
        mixture = self.part("data.mixture")
        return {name: float(w) for name, w in mixture.items() if isinstance(w, int | float)}

    def validation(self, weights: Mapping[str, float]) -> tuple[list[float], list[float]]:
        """(tokens, mean of the sources' validation losses by these weights)."""
        tokens, means = [], []
        for row in self.rows:
            losses = {name: row.get(f"val/{name}", math.nan) for name in weights}
            if row.get("tokens") and any(f"val/{name}" in row for name in weights):
                values = [math.nan if v is None else v for v in losses.values()]
                pairs = zip(weights.values(), values, strict=True)
                means.append(sum(w * v for w, v in pairs) / sum(weights.values()))
                tokens.append(row["tokens"])
        return tokens, means

    def parameters(self) -> int | None:
        """Weights of the model; None while the vocabulary is not known."""
        try:
            return costs.parameters(config.ModelConfig(**self.part("model")))
        except (TypeError, AssertionError):
            return None

    def steps(self) -> int | None:
        """Steps of the whole run, as configured."""
        try:
            return config.total_steps(config.TrainConfig(**self.part("train")))
        except (TypeError, ValueError, ArithmeticError):
            return None


def read(paths: list[str]) -> list[Run]:
    """Every run folder, with labels that tell them apart."""
    folders = [Path(path) for path in paths]
    names = [folder.resolve().name for folder in folders]
    same = len({folder.resolve() for folder in folders}) < len(folders)
    if same:
        raise UserError(f"a run is named twice among {', '.join(paths)}")
    unique = len(set(names)) == len(names)
    labels = names if unique else [str(folder) for folder in folders]
    return [_read(folder, label) for folder, label in zip(folders, labels, strict=True)]


def _read(folder: Path, label: str) -> Run:
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml")
    settings = flat(files.read_yaml(folder / "config.yaml"))

    def optional(name: str) -> dict[str, Any]:
        path = folder / name
        found = files.read_json(path) if path.exists() else {}
        if not isinstance(found, dict):
            raise UserError(f"{path} is not what train.py writes: expected a JSON object")
        return found

    rows = _read_rows(folder / "metrics.jsonl")
    return Run(folder, label, settings, rows, optional("env.json"), optional("EXIT_REASON"))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that is still being written is left out."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = orjson.loads(line)
            if not isinstance(row, dict) or not _numbers(row):
                raise UserError(f"{path}:{number} is no row of numbers")
            rows.append(row)
        except orjson.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}:{number} is not valid JSON: {error}") from error
    return rows


def _numbers(row: Mapping[str, Any]) -> bool:
    return all(value is None or isinstance(value, int | float) for value in row.values())


def validation_weights(runs: Sequence[Run]) -> tuple[dict[str, float], bool]:
    """How validation losses of sources are averaged, the same for all runs, and if as in a mixture.

    Over the sources that all validated runs have, with the weights of their mixture; equal weights
    where the mixtures differ, or the means could not be compared.
    """
    validated = [
        {key.partition("/")[2] for row in run.rows for key in row if key.startswith("val/")}
        for run in runs
    ]
    common = set.intersection(*filter(None, validated)) if any(validated) else set()
    mixture = runs[0].weights()
    alike = all(run.weights() == mixture for run in runs) and common <= mixture.keys()
    return {name: mixture[name] if alike else 1.0 for name in sorted(common)}, alike


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as one level of dotted ones."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def shorter(text: str, most: int) -> str:
    """A text cut in the middle, where paths and names say least."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"


def config_differences(runs: list[Run]) -> tuple[list[str], list[tuple[str, list[Any]]]]:
    """(columns, (key, value per column)) of what differs between runs.

    A single run is held against the defaults. Hardware and versions count like settings.
    """
    if len(runs) == 1:
        defaults = flat(config.to_dict(config.Config()))
        columns = ["default", runs[0].label]
        tables = [defaults, runs[0].config]
        keys = list(runs[0].config)
    else:
        columns = [run.label for run in runs]
        tables = [run.config | {f"env: {k}": v for k, v in run.env.items()} for run in runs]
        keys = list(dict.fromkeys(key for table in tables for key in table))
    rows = [(key, [table.get(key, "–") for table in tables]) for key in keys if key != "name"]
    return columns, [row for row in rows if any(value != row[1][0] for value in row[1])]
