"""What a run has read: documents of a step, steps of a document, tokens per source so far.

In: a run folder, that is its newest checkpoint and its shards. Out: text. Nothing was logged to
know this: it is the data order (llama.data.order) asked forwards and backwards. The command counts
steps as metrics.jsonl does, from 1; the functions count like the order, from 0. The data of §2.1.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from llama import cli, config, files
from llama.cli import UserError
from llama.data import schedule
from llama.data.indexed import read_index
from llama.data.order import Order, Segment, from_json
from llama.data.shards import Source, open_sources
from llama.data.writer import id_hash


class Passage(NamedTuple):
    """A stretch of one document inside one row of a batch; tokens count within the document.

    `at` is its first token in the concatenation of the source.
    """

    row: int
    source: str
    epoch: int
    window: int
    document: str
    first: int
    end: int
    of: int
    at: int


class Place(NamedTuple):
    """Where a document lies; tokens count within the concatenation of its split."""

    source: Source
    shard: int
    number: int
    first: int
    end: int


class Spent(NamedTuple):
    """Tokens of a source so far: what was drawn, and what the weights give."""

    source: str
    tokens: int
    planned: float
    epochs: float
    total: int  # of all sources

    def shown(self) -> tuple[str, str, str, str]:
        """Tokens, how many more than planned, their share, and epochs, as tables have them."""
        off, share = f"{self.tokens - self.planned:+,.0f}", f"{self.tokens / self.total:.3%}"
        return f"{self.tokens:,}", off, share, f"{self.epochs:.3f}"


def documents_of_step(
    order: Order, sources: Mapping[str, Source], step: int, rows: int | None = None
) -> list[Passage]:
    """Every document in the batch of ``step`` (from 0), row by row, or in its first rows."""
    segment, drawn = order.segment(step), order.batch(step)
    found = []
    wanted: dict[tuple[str, int], set[int]] = defaultdict(set)
    columns = (column[:rows].tolist() for column in drawn)
    for row, (index, epoch, window) in enumerate(zip(*columns, strict=True)):
        source = sources[order.names[index]]
        _refuse_other_shards(source, segment)
        first = window * segment.seq_len
        for shard, number, *tokens in stretches(source, first, first + segment.seq_len + 1):
            wanted[source.name, shard].add(number)
            found.append((row, source.name, epoch, window, shard, number, *tokens, first))
            first += tokens[1] - tokens[0]
    ids = {key: document_ids(sources[key[0]], key[1], numbers) for key, numbers in wanted.items()}
    return [
        Passage(row, name, epoch, window, ids[name, shard][number], *tokens)
        for row, name, epoch, window, shard, number, *tokens in found
    ]


def stretches(source: Source, first: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(shard, document, first, end, length) of what tokens [first, end) hold of each document."""
    for shard in range(source.shard_at(first), source.shard_at(end - 1) + 1):
        starts = _starts(source.path(shard, ".idx"))
        a, b = first - source.shards[shard].start, end - source.shards[shard].start
        low = max(0, int(np.searchsorted(starts, a, side="right")) - 1)
        high = int(np.searchsorted(starts, b))
        borders = starts[low : high + 1].tolist()
        for number, (begin, after) in enumerate(pairwise(borders), low):
            if begin < after:
                yield shard, number, max(a, begin) - begin, min(b, after) - begin, after - begin


def document_ids(source: Source, shard: int, numbers: set[int]) -> dict[int, str]:
    """Ids of some documents of a shard."""
    lines = islice(files.read_lines(source.path(shard, ".ids.zst")), max(numbers) + 1)
    return {n: orjson.loads(line) for n, line in enumerate(lines) if n in numbers}


@lru_cache(maxsize=64)
def _starts(path: Path) -> NDArray[np.int64]:
    return read_index(path).starts


def _refuse_other_shards(source: Source, segment: Segment) -> None:
    now, then = source.n_windows(segment.seq_len), segment.windows[source.name]
    if now != then:
        raise UserError(
            f"{source.folder} holds {now} windows of {segment.seq_len} tokens, but the run drew"
            f" from {then}: its shards were replaced"
        )


def locate(source: Source, document: str) -> Place | None:
    """Where a document lies in a split, if it is there."""
    key = id_hash(document)
    for shard, line in enumerate(source.shards):
        # sorted, and mapped: a few bytes of it are read
        hashes = np.memmap(source.path(shard, ".hash"), "<u8", "r")
        number = int(np.searchsorted(hashes, np.uint64(key)))
        if number < len(hashes) and hashes[number] == key:
            first, end = _starts(source.path(shard, ".idx"))[number : number + 2].tolist()
            return Place(source, shard, number, line.start + first, line.start + end)
    return None


def steps_of_document(order: Order, place: Place, last_step: int) -> list[tuple[int, int, int]]:
    """(step, row, window) wherever a train document is in a batch up to ``last_step`` (from 0).

    Its tokens count as targets too.
    """
    visits = []
    for k, segment in enumerate(order.segments):
        if place.source.name not in segment.weights or segment.first_step > last_step:
            continue
        _refuse_other_shards(place.source, segment)
        # window w holds tokens [w·T, w·T + T], both ends included
        length = segment.seq_len
        first = max(0, -(-place.first // length) - 1)
        for window in range(first, (place.end - 1) // length + 1):
            found = order.find(k, place.source.name, window, last_step)
            visits += [(step, row, window) for step, row in found]
    return sorted(visits)


def spent(order: Order, step: int) -> list[Spent]:
    """Tokens of every source before a step, beside what the weights give it."""
    drawn, plan = order.source_tokens(step), dict.fromkeys(order.names, Fraction(0))
    for segment, steps in order.steps_before(step):
        tokens = steps * segment.batch_windows * segment.seq_len
        for name, weight in segment.weights.items():
            plan[name] += Fraction(tokens * weight, sum(segment.weights.values()))
    last = order.segment(max(step - 1, 0))
    epoch = {name: last.windows.get(name, 0) * last.seq_len for name in order.names}
    total = max(sum(drawn.values()), 1)
    return [
        Spent(name, n, float(plan[name]), n / max(epoch[name], 1), total)
        for name, n in drawn.items()
    ]


def spent_table(order: Order, step: int, steps: int) -> str:
    """Tokens per source in the first ``step`` steps, against the weights and the whole run."""
    end = order.source_tokens(steps)
    sources = spent(order, step)
    rows = [(line.source, *line.shown(), f"{end[line.source]:,}") for line in sources]
    header = ("source", "tokens", "off the plan", "share", "epochs", f"at step {steps}")
    lines = [f"{order.tokens(step):,} tokens in {step} of {steps} steps", cli.table(header, rows)]
    skipped = {name: n for name, n in order.skipped(step).items() if n}
    if skipped:
        lines.append("windows passed over: " + ", ".join(f"{k} {n:,}" for k, n in skipped.items()))
    return "\n".join(lines)


def newest_order(run: Path, cfg: config.Config) -> tuple[Order, int] | None:
    """(order, steps done) as the newest checkpoint of a run, or one of its own, has them."""
    states = [run / "state.json", *sorted(run.glob("ckpt/step-*/state.json"))]
    path = next((path for path in reversed(states) if path.is_file()), None)
    if path is None:
        return None
    state = files.read_json(path)
    kinds = KeyError, TypeError, ValueError, AssertionError
    with cli.as_user_error(f"{path} is not what train.py writes", *kinds, show=repr):
        state = schedule.rewound(state, schedule.rewinds(run))
        return Order(cfg.seed, from_json(state["segments"])), int(state["step"])


def open_run(path: Path) -> tuple[config.Config, Order, dict[str, Source], int]:
    """(configuration, order, sources, steps done) of a run folder or one of its checkpoints."""
    run = path.parent.parent if re.fullmatch(r"step-\d+", path.name) else path
    cfg = config.of_run(run)
    if found := newest_order(path, cfg):
        return cfg, found[0], open_sources(cfg.data.path, found[0].names), found[1]
    assert isinstance(cfg.data.mixture, dict)
    sources = open_sources(cfg.data.path, cfg.data.mixture)
    return cfg, schedule.plan(cfg, sources), sources, 0


def print_step(order: Order, sources: Mapping[str, Source], step: int, done: int) -> None:
    rows = [
        (p.row, p.source, p.epoch + 1, p.window, f"{p.first}-{p.end - 1} of {p.of}", p.document)
        for p in documents_of_step(order, sources, step - 1)
    ]
    print(f"step {step}, {'trained' if step <= done else 'not trained yet'}")
    print(cli.table(("row", "source", "epoch", "window", "its tokens", "document"), rows))


def print_place(order: Order, place: Place, document: str, done: int, steps: int) -> None:
    where = place.source.path(place.shard)
    print(f"{document}: {place.end - place.first} tokens, document {place.number} of {where}")
    if place.source.split == "valid":
        print("held out for validation: no step trains on it")
        return
    rows = [
        (step + 1, row, window, "trained" if step < done else "planned")
        for step, row, window in steps_of_document(order, place, steps - 1)
    ]
    header = ("step", "row", "window", "")
    print(cli.table(header, rows) if rows else f"in none of {steps} steps")


def main(argv: list[str]) -> None:
    p = cli.parser("python -m llama.data.ledger", "What a run has read and will read.")
    p.add_argument("run", type=str, help="a run folder, or one of its checkpoints")
    p.add_argument("--step", type=int, help="list the documents of this step")
    p.add_argument("--document", type=str, help="list the steps that see the document of this id")
    p.add_argument("--spent", action="store_true", help="tokens per source so far")
    args = p.parse_args(argv)
    if (args.step is not None) + (args.document is not None) + args.spent != 1:
        raise UserError("give one of --step N, --document ID and --spent")
    cfg, order, sources, done = open_run(Path(args.run))
    steps = config.total_steps(cfg.train)
    if args.spent:
        print(spent_table(order, done, steps))
    elif args.step is not None:
        if not 1 <= args.step <= steps:
            raise UserError(f"--step is {args.step}, the run has the steps 1 to {steps}")
        print_step(order, sources, args.step, done)
    else:
        valid = open_sources(cfg.data.path, sources, "valid")
        places = [locate(source, args.document) for source in (*sources.values(), *valid.values())]
        if not any(places):
            raise UserError(f"no document {args.document!r} in {', '.join(sources)}")
        for place in filter(None, places):
            print_place(order, place, args.document, done, steps)


if __name__ == "__main__":
    cli.run(main)
