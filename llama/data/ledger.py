"""What a run has read: documents of a step, steps of a document, tokens per source so far.

In: a run folder, that is its newest checkpoint and its shards. Out: text. Nothing was logged to
know this: it is the data order (llama.data.order) asked forwards and backwards. The command counts
steps as metrics.jsonl does, from 1; the functions count like the order, from 0. The data of §2.1.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
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
    """A stretch of one document inside one row of a batch; tokens count within the document."""

    row: int
    source: str
    epoch: int
    window: int
    document: str
    first: int
    end: int
    of: int


class Place(NamedTuple):
    """Where a document lies; tokens count within the concatenation of its split."""

    source: Source
    shard: int
    number: int
    first: int
    end: int


def documents_of_step(order: Order, sources: Mapping[str, Source], step: int) -> list[Passage]:
    """Every document in the batch of ``step`` (from 0), row by row."""
    segment, drawn = order.segment(step), order.batch(step)
    found = []
    wanted: dict[tuple[str, int], set[int]] = defaultdict(set)
    for row, (index, epoch, window) in enumerate(zip(*map(np.ndarray.tolist, drawn), strict=True)):
        source = sources[order.names[index]]
        _refuse_other_shards(source, segment)
        first = window * segment.seq_len
        for shard, number, *tokens in stretches(source, first, first + segment.seq_len + 1):
            wanted[source.name, shard].add(number)
            found.append((row, source.name, epoch, window, shard, number, *tokens))
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
        number = _find_hash(source.path(shard, ".hash"), key)
        if number is not None:
            first, end = _starts(source.path(shard, ".idx"))[number : number + 2].tolist()
            return Place(source, shard, number, line.start + first, line.start + end)
    return None


def _find_hash(path: Path, key: int) -> int | None:
    """The place of a hash in a sorted ``.hash`` file, of which a few bytes are read."""
    with open(path, "rb") as file:

        def hash_at(i: int) -> int:
            return int.from_bytes(os.pread(file.fileno(), 8, 8 * i), "little")

        number = bisect_left(range(path.stat().st_size // 8), key, key=hash_at)
        return number if hash_at(number) == key else None


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


def planned(order: Order, step: int) -> dict[str, Fraction]:
    """Tokens that the weights give each source before a step."""
    total = dict.fromkeys(order.names, Fraction(0))
    for segment, steps in order.steps_before(step):
        tokens = steps * segment.batch_windows * segment.seq_len
        for name, weight in segment.weights.items():
            total[name] += Fraction(tokens * weight, sum(segment.weights.values()))
    return total


def spent_table(order: Order, sources: Mapping[str, Source], step: int, steps: int) -> str:
    """Tokens per source in the first ``step`` steps, against the weights and the whole run."""
    now, plan, end = order.source_tokens(step), planned(order, step), order.source_tokens(steps)
    rows = [
        (
            name,
            f"{now[name]:,}",
            f"{float(now[name] - plan[name]):+,.0f}",
            f"{now[name] / max(1, sum(now.values())):.3%}",
            f"{now[name] / sources[name].n_tokens:.3f}",
            f"{end[name]:,}",
        )
        for name in order.names
    ]
    header = ("source", "tokens", "off the plan", "share", "epochs", f"at step {steps}")
    lines = [f"{order.tokens(step):,} tokens in {step} of {steps} steps", cli.table(header, rows)]
    skipped = {name: n for name, n in order.skipped(step).items() if n}
    if skipped:
        lines.append("windows passed over: " + ", ".join(f"{k} {n:,}" for k, n in skipped.items()))
    return "\n".join(lines)


def open_run(path: Path) -> tuple[config.Config, Order, dict[str, Source], int]:
    """(configuration, order, sources, steps done) of a run folder or one of its checkpoints."""
    run = path.parent.parent if re.fullmatch(r"step-\d+", path.name) else path
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run folder: it has no config.yaml")
    cfg = config.load(["--config", str(run / "config.yaml")])
    states = [path / "state.json"] if run != path else sorted(run.glob("ckpt/step-*/state.json"))
    if states:
        state = files.read_json(states[-1])
        try:
            order, step = Order(cfg.seed, from_json(state["segments"])), int(state["step"])
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise UserError(f"{states[-1]} is damaged: {error!r}") from error
        return cfg, order, open_sources(cfg.data.path, order.names), step
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
        print(spent_table(order, sources, done, steps))
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
