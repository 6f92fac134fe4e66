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
from typing import Any

import numpy as np
import orjson

from llama import config, costs, files
from llama.cli import UserError, show_count
from llama.data import ledger, shards
from llama.data.ledger import Passage, Spent
from llama.data.order import Order
from llama.runtime.metrics import lineage
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
    """A run folder, read; `look` is how its lines are drawn."""

    folder: Path
    label: str
    look: dict[str, Any]
    cfg: config.Config
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
        keys = {key.partition("/") for row in self.rows for key in row}
        names = {name for kind, slash, name in keys if slash and kind in kinds}
        return sorted(names, key=lambda name: (-self.weights.get(name, 0), name))

    @property
    def weights(self) -> dict[str, float]:
        """The mixture that the configuration asks for."""
        assert isinstance(self.cfg.data.mixture, dict)
        return self.cfg.data.mixture

    def validation(self, weights: Mapping[str, float]) -> Points:
        """(tokens, mean of the sources' validation losses by these weights)."""
        keys = {f"val/{name}": weight / sum(weights.values()) for name, weight in weights.items()}
        rows = [row for row in self.rows if row.get("tokens") and keys.keys() & row.keys()]
        means = [sum(w * _number(row.get(key)) for key, w in keys.items()) for row in rows]
        return [row["tokens"] for row in rows], means

    @property
    def parameters(self) -> int:
        """Weights of the model; 0 while the vocabulary is not known."""
        return costs.parameters(self.cfg.model) if self.cfg.model.vocab_size else 0


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
    runs = []
    for folder, label, look in zip(folders, labels, LOOKS, strict=False):
        cfg, rows = config.of_run(folder), lineage(_read_rows(folder / "metrics.jsonl"))
        env, verdict = _object(folder / "env.json"), _object(folder / "EXIT_REASON")
        runs.append(Run(folder, label, look, cfg, rows, env, verdict))
    return runs


def _object(path: Path) -> dict[str, Any]:
    return files.read_object(path) if path.exists() else {}


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
    mixture = runs[0].weights
    alike = all(run.weights == mixture for run in runs) and common <= mixture.keys()
    return {name: mixture[name] if alike else 1.0 for name in sorted(common)}, alike


def config_differences(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[Any]]]]:
    """(columns, (key, value per column)) of what differs between runs.

    A single run is held against the defaults. Hardware and versions count like settings.
    """
    columns = [run.label for run in runs]
    tables = [config.flat(config.to_dict(run.cfg)) for run in runs]
    if len(runs) == 1:
        columns = ["default", *columns]
        default = config.flat(config.to_dict(config.Config()))
        # the name of a file, where a run has its weights
        del default["data.mixture"]
        tables.insert(0, default)
    else:
        tables = [t | config.flat(run.env, "env: ") for t, run in zip(tables, runs, strict=True)]
    keys = dict.fromkeys(key for table in tables for key in table if key != "name")
    rows = [(key, [table.get(key, "–") for table in tables]) for key in keys]
    return columns, [row for row in rows if any(value != row[1][0] for value in row[1])]


# -- what was read ---------------------------------------------------------------------------------


def _order(run: Run) -> tuple[Order, int]:
    """(data order, steps trained) as the newest checkpoint has them."""
    found = ledger.newest_order(run.folder, run.cfg)
    if not found:
        raise UserError(f"{run.folder} has no checkpoint yet, which says what was drawn")
    return found


def mixture(run: Run) -> tuple[int, list[Spent]]:
    """(steps counted, a line per source, the heaviest first) of the newest checkpoint."""
    order, step = _order(run)
    return step, sorted(ledger.spent(order, step), key=lambda line: (-line.planned, line.source))


def extracts(run: Run) -> Iterator[tuple[int, Passage, str]]:
    """(step, passage, its text) of some rows of the first, a middle and the last step so far.

    Steps count from 1, what is in a passage as in the ledger.
    """
    order, done = _order(run)
    sources = shards.open_sources(run.cfg.data.path, order.names)
    # opening them has compared it with the one they were made with
    model = Path(run.cfg.data.path, "tokenizer.model")
    pieces = Tokenizer(model) if model.is_file() else None
    for step in sorted({1, (done + 1) // 2, done} & set(range(1, done + 1))):
        for passage in ledger.documents_of_step(order, sources, step - 1, LEDGER_ROWS):
            count = min(passage.end - passage.first, LEDGER_TOKENS)
            tokens = sources[passage.source].read(passage.at, count)
            yield step, passage, pieces.decode(tokens) if pieces else ""


# -- samples ---------------------------------------------------------------------------------------


def samples(run: Run, count: int) -> Iterator[tuple[str, str, str]]:
    """(source, beginning of a held-out document, how the newest checkpoint goes on), short ones.

    Raises `UserError` where checkpoint or tokenizer are missing or damaged, or it would take long.
    """
    _order(run)
    # imported here: torch takes seconds
    import torch

    from llama import generate

    if run.parameters > LARGEST_SAMPLED_ON_CPU and not torch.cuda.is_available():
        raise UserError(
            f"{show_count(run.parameters)} parameters take long on a CPU: `python -m "
            f"llama.generate {run.folder}` draws text where a GPU is"
        )
    model, pieces, context = generate.load(run.folder)
    beginnings = list(_prompts(run, pieces.bos_id, count))
    prompts = [prompt[: context // 2] for _, prompt in beginnings]
    how: dict[str, Any] = {"temperature": TEMPERATURE, "top_p": TOP_P, "eos_id": pieces.eos_id}
    most = min(SAMPLE_TOKENS, context - max(map(len, prompts)))
    drawn = zip(*generate.generate(model, prompts, most, **how), strict=True)
    for (source, _), prompt, ids in zip(beginnings, prompts, drawn, strict=True):
        text = generate.Text(pieces, prompt[1:], ())
        yield source, text.prompt, "".join(map(text.add, (*ids, None))).rstrip()


def _prompts(run: Run, bos_id: int, count: int) -> Iterator[tuple[str, list[int]]]:
    """Beginnings of held-out documents, the sources in turn; without shards, BOS alone."""
    try:
        held_out = shards.open_sources(run.cfg.data.path, sorted(run.weights), "valid")
    except UserError:
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
