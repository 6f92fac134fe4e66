"""What a run was trained on and what it writes: mixture, documents of some steps, samples.

In: a run whose numbers are read. Out: plain values, or a `UserError` whose sentence the page shows
in the place of what is missing. Torch is imported for samples only.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama import files
from llama.cli import UserError, show_count
from llama.data import ledger, shards
from llama.data.order import Order, from_json
from llama.report.runs import Run
from tokenizer.tokenizer import Tokenizer

# Rows of a batch shown per step, tokens of each as text, and what is drawn for a sample.
LEDGER_ROWS, LEDGER_TOKENS = 4, 40
PROMPT_TOKENS, SAMPLE_TOKENS, TEMPERATURE, TOP_P = 24, 64, 0.8, 0.95
# Beyond this a CPU takes minutes for a few lines of text.
LARGEST_SAMPLED_ON_CPU = 1_000_000_000


class Mixture(NamedTuple):
    """Tokens of a source in the steps before `step`: what the weights give, and what was drawn."""

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
    found = [
        Mixture(
            source=name,
            target=float(planned[name] / total),
            realised=drawn[name] / total,
            target_tokens=float(planned[name]),
            tokens=drawn[name],
            epochs=drawn[name] / max(last.windows.get(name, 0) * last.seq_len, 1),
        )
        for name in order.names
    ]
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


class Extract(NamedTuple):
    """A stretch of a document in a row of a batch; steps and epochs count from 1."""

    step: int
    row: int
    source: str
    epoch: int
    window: int
    place: str
    document: str
    text: str


def extracts(run: Run) -> list[Extract]:
    """What stood in the first rows of the first, a middle and the last step trained so far."""
    order, done = _order(run)
    tokens_folder = str(run.config.get("data.path"))
    sources = shards.open_sources(tokens_folder, order.names)
    pieces = _tokenizer(tokens_folder, sources)
    return [
        extract
        for step in sorted({1, (done + 1) // 2, done} & set(range(1, done + 1)))
        for row in range(min(LEDGER_ROWS, order.segment(step - 1).batch_windows))
        for extract in _passages(order, sources, pieces, step, row)
    ]


def _passages(
    order: Order,
    sources: Mapping[str, shards.Source],
    pieces: Tokenizer | None,
    step: int,
    row: int,
) -> Iterator[Extract]:
    """The documents in one row of the batch of a step counted from 1."""
    segment, batch = order.segment(step - 1), order.batch(step - 1)
    source, window = sources[order.names[batch.sources[row]]], int(batch.windows[row])
    if source.n_windows(segment.seq_len) != segment.windows[source.name]:
        raise UserError(f"{source.folder}: its shards are not those that were trained on")
    at = window * segment.seq_len
    passages = ledger.stretches(source, at, at + segment.seq_len + 1)
    for shard, number, first, end, of in passages:
        tokens = source.read(at, min(end - first, LEDGER_TOKENS))
        at += end - first
        yield Extract(
            step=step,
            row=row,
            source=source.name,
            epoch=int(batch.epochs[row]) + 1,
            window=window,
            place=f"{first:,}–{end - 1:,} of {of:,}",
            document=ledger.document_ids(source, shard, {number})[number],
            text=pieces.decode(tokens.tolist()) if pieces else "",
        )


def _tokenizer(tokens_folder: str, sources: Mapping[str, shards.Source]) -> Tokenizer | None:
    """The tokenizer beside the shards, when it is there and the one they were made with."""
    folder = Path(tokens_folder)
    for path in (folder / "tokenizer.model", folder.parent / "tokenizer" / "tokenizer.model"):
        try:
            pieces = Tokenizer(path)
        except ValueError:
            continue
        if all(source.tokenizer_sha256 == pieces.sha256 for source in sources.values()):
            return pieces
    return None


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
    model, tokenizer, context = generate.load(run.folder)
    found = []
    for i, (source, prompt) in enumerate(_prompts(run, tokenizer, count)):
        prompt = prompt[: context // 2]
        steps = generate.generate(
            model,
            [prompt],
            min(SAMPLE_TOKENS, context - len(prompt)),
            temperature=TEMPERATURE,
            top_p=TOP_P,
            seed=i,
            eos_id=tokenizer.eos_id,
        )
        drawn = [ids[0] for ids in steps if ids[0] is not None]
        start = tokenizer.decode(prompt[1:]).rstrip("\ufffd")
        whole = tokenizer.decode([*prompt[1:], *drawn])
        found.append(Sample(source, start, whole.removeprefix(start).rstrip()))
    return found


def _prompts(run: Run, tokenizer: Tokenizer, count: int) -> list[tuple[str, list[int]]]:
    """Beginnings of held-out documents, the sources in turn; without shards, BOS alone."""
    try:
        held_out = shards.open_sources(run.config["data.path"], sorted(run.weights()), "valid")
    except (UserError, KeyError):
        held_out = {}
    sources = [source for source in held_out.values() if source.n_tokens]
    found: list[tuple[str, list[int]]] = []
    for i in range(count):
        if not sources:
            found.append(("nothing", [tokenizer.bos_id]))
            continue
        source = sources[i % len(sources)]
        tokens = source.read(0, min(source.n_tokens, 1 << 16))
        starts = np.flatnonzero(tokens == source.bos_id)
        first = int(starts[i // len(sources) % len(starts)])
        prompt = tokens[first : first + PROMPT_TOKENS].tolist()
        end = prompt.index(source.eos_id) if source.eos_id in prompt else None
        found.append((source.name, prompt[:end]))
    return found
