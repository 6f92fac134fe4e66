"""Speed of the data order and the loader: `python -m benchmarks.loader`.

In: random token shards written for the occasion. Out: tokens/s of one process, beside random
windows from `np.memmap` in the same run, the share of a step spent
waiting, and the start of an order over 1,000 sources and 10^12 tokens. Files are in the page cache.
"""

import itertools
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from benchmarks.harness import Comparison
from llama import cli
from llama.data.loader import Loader
from llama.data.order import Order, integer_weights
from llama.data.shards import Source, open_sources
from llama.data.writer import ShardWriter, Vocabulary, write_manifest

VOCABULARY = Vocabulary("0" * 64, 32_000, 1, 2)
TURN_TOKENS = 2**22
WEIGHTS = {"web": 0.67, "code": 0.2, "books": 0.1, "rare": 0.03}


def write_sources(folder: Path, tokens: int, document_tokens: int = 1000) -> dict[str, Source]:
    """Sources of random ids, each of `tokens` in four shards."""
    rng = np.random.default_rng()
    for name in WEIGHTS:
        shards = []
        for k in range(4):
            with ShardWriter(folder / name, f"{k:05d}", VOCABULARY, valid_per_10k=0) as writer:
                for i in range(tokens // 4 // document_tokens):
                    ids = rng.integers(3, 32_000, document_tokens).astype(np.uint16)
                    ids[0], ids[-1] = 1, 2
                    writer.add(f"{name}/{k}/{i}", ids, 0)
                made = writer.finish()["train"]
                assert made is not None
                shards.append(made)
        write_manifest(folder / name, "train", VOCABULARY, shards, {})
    return open_sources(folder, WEIGHTS)


def make_order(sources: dict[str, Source], batch: int, seq_len: int) -> Order:
    return Order.start(
        0,
        batch_windows=batch,
        seq_len=seq_len,
        weights=integer_weights(WEIGHTS),
        windows={name: source.n_windows(seq_len) for name, source in sources.items()},
    )


def memmap_batches(sources: dict[str, Source], batch: int, seq_len: int) -> Callable[[], None]:
    """The usual small loader: a memory map, windows at random places, a tensor per window."""
    maps = [np.memmap(s.path(k), np.uint16, "r") for s in sources.values() for k in range(4)]

    def one() -> None:
        rows = []
        for _ in range(batch):
            tokens = random.choice(maps)
            first = random.randrange(len(tokens) - seq_len)
            rows.append(torch.from_numpy(tokens[first : first + seq_len + 1].astype(np.int64)))
        torch.stack(rows)

    return one


def speed(sources: dict[str, Source], batch: int, seq_len: int) -> Comparison:
    """Of the loader beside the usual one; a turn is as many batches as make 4 million tokens."""
    loader, step = (
        Loader(sources, make_order(sources, batch, seq_len), pin=False),
        itertools.count(),
    )
    one, n = memmap_batches(sources, batch, seq_len), TURN_TOKENS // (batch * seq_len)

    def ours() -> None:
        for _ in range(n):
            loader.batch(next(step), 0, batch)

    def theirs() -> None:
        for _ in range(n):
            one()

    return Comparison.of(harness.rounds(15, ours, theirs))


def waiting(sources: dict[str, Source], batch: int, seq_len: int, step_s: float = 0.5) -> float:
    """Seconds a step waits for its batch; the step itself is slept, as a GPU would have it."""
    loader, steps = Loader(sources, make_order(sources, batch, seq_len), pin=False), 21
    reader = loader.steps(0, steps, lambda step: (0, batch))
    next(reader)  # the first batch cannot have been read ahead
    loader.waited_s = 0.0
    for _ in reader:
        time.sleep(step_s)
    return loader.waited_s / (steps - 1)


def start_of_many_sources() -> tuple[float, float]:
    """Seconds to the first batch of 1,000 heavy-tailed sources of 10^12 tokens, and per batch."""
    rng = random.Random()
    weights = {f"source-{i}": rng.paretovariate(0.5) for i in range(1000)}
    windows = {name: 10**12 // 2048 // 1000 for name in weights}
    began = time.perf_counter()
    order = Order.start(
        0, batch_windows=2048, seq_len=2048, weights=integer_weights(weights), windows=windows
    )
    order.batch(0)
    first = time.perf_counter()
    for step in range(1, 21):
        order.batch(step * 10_000)
    return first - began, (time.perf_counter() - first) / 20


def main(argv: list[str]) -> None:
    p = cli.parser("python -m benchmarks.loader", "Speed of the data order and the loader.")
    p.add_argument("--tokens", type=str, default="16M", help="per source, four of them")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sources = write_sources(Path(folder), cli.count(args.tokens))
        rows = []
        for seq_len, batch in ((256, 512), (2048, 64), (8192, 16)):
            found = speed(sources, batch, seq_len)
            rates = (f"{TURN_TOKENS / x.median / 1e6:.0f}" for x in (found.ours_s, found.theirs_s))
            rows.append((seq_len, batch, *rates, found.ratio.show()))
        print("million tokens/s in one process")
        print(cli.table(("T", "windows", "loader", "np.memmap", "ratio"), rows))
        step_s = 0.5
        waited = waiting(sources, 64, 2048, step_s)
        print(
            f"\nwaiting for data: {waited * 1e6:.0f} us a step of 131,072 tokens,"
            f" {waited / step_s:.3%} of one of {step_s} s"
        )
    first, each = start_of_many_sources()
    print(f"1,000 sources, 10^12 tokens: first batch after {first:.2f} s, then {each * 1e3:.1f} ms")


if __name__ == "__main__":
    cli.run(main)
