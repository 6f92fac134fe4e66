"""What runs were configured to do, logged and read, as a report shows it.

In: run folders as `train.py` leaves them, also while they are still written. Out: plain values, or
a `UserError` whose sentence the page shows in the place of what is missing. Torch is imported for
samples only.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from llama import config, costs, files
from llama.cli import UserError, show_count
from llama.data import ledger, shards
from llama.data.order import Order, from_json
from tokenizer.tokenizer import Tokenizer

# One colour per run everywhere, told apart by colour-blind readers (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
DASHES = ("-", (0, (6, 2)), (0, (2, 2)))
LOOKS = [{"color": colour, "linestyle": dashes} for dashes in DASHES for colour in COLOURS]
# Rows of a batch shown per step, tokens of each as text, and what is drawn for a sample.
LEDGER_ROWS, LEDGER_TOKENS = 4, 40
PROMPT_TOKENS, SAMPLE_TOKENS, TEMPERATURE, TOP_P = 24, 64, 0.8, 0.95
# Beyond this a CPU takes minutes for a few lines of text.
LARGEST_SAMPLED_ON_CPU = 1_000_000_000
NUMBERS = {int, float, type(None)}
Points = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Run:
    """A run folder, read; `config` has dotted keys, `look` is how its lines are drawn."""

    folder: Path
    label: str
    look: dict[str, Any]
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    env: dict[str, Any]
    verdict: dict[str, Any]

    def series(self, key: str) -> Points:
        """(tokens, values) of the rows that have a key; a number that was not finite is NaN."""
        rows = [row for row in self.rows if key in row and row.get("tokens")]
        return [row["tokens"] for row in rows], [_number(row[key]) for row in rows]

    def last(self, key: str) -> Any:
        """The newest value of a key, or None."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)

    def sources(self, *kinds: str) -> list[str]:
        """Sources with rows of these kinds, `loss` or `val`; the heaviest of the mixture first."""
        weights, keys = self.weights(), {key.partition("/") for row in self.rows for key in row}
        names = {name for kind, slash, name in keys if slash and kind in kinds}
        return sorted(names, key=lambda name: (-weights.get(name, 0), name))

    def part(self, prefix: str) -> dict[str, Any]:
        """Settings below a dotted key, as `model` or `data.mixture`."""
        start = prefix + "."
        return {k.removeprefix(start): v for k, v in self.config.items() if k.startswith(start)}

    def weights(self) -> dict[str, float]:
        """The mixture that the configuration asks for."""
        mixture = self.part("data.mixture")
        return {name: float(w) for name, w in mixture.items() if isinstance(w, int | float)}

    def validation(self, weights: Mapping[str, float]) -> Points:
        """(tokens, mean of the sources' validation losses by these weights)."""
        keys = {f"val/{name}": weight / sum(weights.values()) for name, weight in weights.items()}
        rows = [row for row in self.rows if row.get("tokens") and keys.keys() & row.keys()]
        means = [sum(w * _number(row.get(key)) for key, w in keys.items()) for row in rows]
        return [row["tokens"] for row in rows], means

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


def _number(value: float | None) -> float:
    """JSON has null for a number that is not finite."""
    return math.nan if value is None else value


def read(paths: Sequence[str]) -> list[Run]:
    """Every run folder, with labels and lines that tell them apart."""
    if len(paths) > len(LOOKS):
        raise UserError(f"{len(paths)} runs are given, {len(LOOKS)} can be told apart in a picture")
    folders = [Path(path) for path in paths]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"a run is named twice among {', '.join(paths)}")
    labels = [folder.resolve().name for folder in folders]
    if len(set(labels)) < len(labels):
        labels = [str(folder) for folder in folders]
    return [_read(*each) for each in zip(folders, labels, LOOKS, strict=False)]


def _read(folder: Path, label: str, look: dict[str, Any]) -> Run:
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml")
    settings = flat(files.read_yaml(folder / "config.yaml"))
    rows = list(_read_rows(folder / "metrics.jsonl"))
    env, verdict = _read_object(folder / "env.json"), _read_object(folder / "EXIT_REASON")
    return Run(folder, label, look, settings, rows, env, verdict)


def _read_object(path: Path) -> dict[str, Any]:
    found = files.read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path} is not what train.py writes: expected a JSON object")
    return found


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that is still being written is left out."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}:{number} is not valid JSON: {error}") from error
            return
        if not isinstance(row, dict) or set(map(type, row.values())) - NUMBERS:
            raise UserError(f"{path}:{number} is no row of numbers")
        yield row


def validation_weights(runs: Sequence[Run]) -> tuple[dict[str, float], bool]:
    """How validation losses of sources are averaged, the same for all runs, and if as in a mixture.

    Over the sources that all validated runs have, with the weights of their mixture; equal weights
    where the mixtures differ, or the means could not be compared.
    """
    validated = [set(names) for run in runs if (names := run.sources("val"))]
    common = set.intersection(*validated) if validated else set()
    mixture = runs[0].weights()
    alike = all(run.weights() == mixture for run in runs) and common <= mixture.keys()
    return {name: mixture[name] if alike else 1.0 for name in sorted(common)}, alike


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as one level of dotted ones."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def shorter(text: str, most: int) -> str:
    """A text cut in the middle, where paths and names say least."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"


def config_differences(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[Any]]]]:
    """(columns, (key, value per column)) of what differs between runs.

    A single run is held against the defaults. Hardware and versions count like settings.
    """
    if len(runs) == 1:
        tables = [flat(config.to_dict(config.Config())), runs[0].config]
        columns, keys = ["default", runs[0].label], list(runs[0].config)
    else:
        tables = [run.config | {f"env: {k}": v for k, v in run.env.items()} for run in runs]
        columns = [run.label for run in runs]
        keys = list(dict.fromkeys(key for table in tables for key in table))
    rows = [(key, [table.get(key, "–") for table in tables]) for key in keys if key != "name"]
    return columns, [row for row in rows if any(value != row[1][0] for value in row[1])]


# -- what was read ---------------------------------------------------------------------------------


class Mixture(NamedTuple):
    """Tokens of a source so far: what the weights give, and what was drawn."""

    source: str
    target: float
    realised: float
    target_tokens: float
    tokens: int
    epochs: float


def mixture(run: Run) -> tuple[int, list[Mixture]]:
    """(steps counted, a line per source) of the segments in the newest checkpoint."""
    order, step = _order(run)
    planned, drawn = ledger.planned(order, step), order.source_tokens(step)
    total = max(sum(drawn.values()), 1)
    last = order.segment(max(step - 1, 0))
    found = []
    for name, tokens in drawn.items():
        target, epoch = float(planned[name]), last.windows.get(name, 0) * last.seq_len
        epochs = tokens / max(epoch, 1)
        found.append(Mixture(name, target / total, tokens / total, target, tokens, epochs))
    return step, sorted(found, key=lambda line: (-line.target, line.source))


def _order(run: Run) -> tuple[Order, int]:
    """(data order, steps trained) as the newest checkpoint has them."""
    states = sorted(run.folder.glob("ckpt/step-*/state.json"))
    if not states:
        raise UserError(f"{run.folder} has no checkpoint yet, which says what was drawn")
    state = files.read_json(states[-1])
    try:
        return Order(run.config["seed"], from_json(state["segments"])), int(state["step"])
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{states[-1]} is not what train.py writes: {error!r}") from error


def extracts(run: Run) -> Iterator[tuple[int, ledger.Passage, str]]:
    """(step, passage, its text) of some rows of the first, a middle and the last step so far.

    Steps count from 1, what is in a passage as in the ledger.
    """
    order, done = _order(run)
    folder = Path(str(run.config.get("data.path")))
    sources = shards.open_sources(folder, order.names)
    # opening them has compared it with the one they were made with
    model = folder / "tokenizer.model"
    pieces = Tokenizer(model) if model.is_file() else None
    for step in sorted({1, (done + 1) // 2, done} & set(range(1, done + 1))):
        segment, batch = order.segment(step - 1), order.batch(step - 1)
        for row in range(min(LEDGER_ROWS, segment.batch_windows)):
            source = sources[order.names[batch.sources[row]]]
            epoch, window = int(batch.epochs[row]), int(batch.windows[row])
            if source.n_windows(segment.seq_len) != segment.windows[source.name]:
                raise UserError(f"{source.folder}: its shards are not those that were trained on")
            at = window * segment.seq_len
            for shard, n, *place in ledger.stretches(source, at, at + segment.seq_len + 1):
                document = ledger.document_ids(source, shard, {n})[n]
                passage = ledger.Passage(row, source.name, epoch, window, document, *place)
                length = passage.end - passage.first
                tokens = source.read(at, min(length, LEDGER_TOKENS))
                at += length
                yield step, passage, pieces.decode(tokens.tolist()) if pieces else ""


# -- samples ---------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """The beginning of a held-out document and how the model goes on."""

    source: str
    prompt: str
    text: str


def samples(run: Run, count: int) -> list[Sample]:
    """Short generations of the newest checkpoint, after beginnings of held-out documents.

    Raises `UserError` where checkpoint or tokenizer are missing or damaged, or it would take long.
    """
    _order(run)
    # imported here: torch takes seconds
    import torch

    from llama import generate

    size = run.parameters() or 0
    if size > LARGEST_SAMPLED_ON_CPU and not torch.cuda.is_available():
        raise UserError(
            f"{show_count(size)} parameters take long on a CPU: `python -m llama.generate "
            f"{run.folder}` draws text where a GPU is"
        )
    model, pieces, context = generate.load(run.folder)
    beginnings = list(_prompts(run, pieces.bos_id, count))
    prompts = [prompt[: context // 2] for _, prompt in beginnings]
    how: dict[str, Any] = {"temperature": TEMPERATURE, "top_p": TOP_P, "eos_id": pieces.eos_id}
    most = min(SAMPLE_TOKENS, context - max(map(len, prompts)))
    drawn = zip(*generate.generate(model, prompts, most, **how), strict=True)
    found = []
    for (source, _), prompt, ids in zip(beginnings, prompts, drawn, strict=True):
        start = pieces.decode(prompt[1:]).rstrip("\ufffd")
        whole = pieces.decode([*prompt[1:], *(i for i in ids if i is not None)])
        found.append(Sample(source, start, whole.removeprefix(start).rstrip()))
    return found


def _prompts(run: Run, bos_id: int, count: int) -> Iterator[tuple[str, list[int]]]:
    """Beginnings of held-out documents, the sources in turn; without shards, BOS alone."""
    try:
        held_out = shards.open_sources(run.config["data.path"], sorted(run.weights()), "valid")
    except (UserError, KeyError):
        held_out = {}
    sources = [source for source in held_out.values() if source.n_tokens]
    if not sources:
        yield from [("nothing", [bos_id])] * count
    for i, source in zip(range(count), itertools.cycle(sources)):
        tokens = source.read(0, min(source.n_tokens, 1 << 16))
        starts = np.flatnonzero(tokens == source.bos_id)
        first = int(starts[i // len(sources) % len(starts)])
        prompt = tokens[first : first + PROMPT_TOKENS].tolist()
        yield source.name, list(itertools.takewhile(source.eos_id.__ne__, prompt))
