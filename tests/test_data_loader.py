"""Batches: the same for every world, micro-batch and thread, and loud when a file is not."""

import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from made_data import make_source, make_sources, random_documents

from llama.cli import UserError
from llama.data import loader as module
from llama.data import shards
from llama.data.loader import Loader, document_ids, drop_boundary_targets, validation_windows
from llama.data.order import Order, integer_weights
from llama.data.shards import Source, open_sources

SIZES = {"web": 300, "code": 80, "books": 25}
LENGTH = 16


def make_order(rng: random.Random, sources: dict[str, Source], batch: int = 12) -> Order:
    return Order.start(
        rng.randrange(100),
        batch_windows=batch,
        seq_len=LENGTH,
        weights=integer_weights({"web": 0.7, "code": 0.2, "books": 0.1}),
        windows={name: source.n_windows(LENGTH) for name, source in sources.items()},
    )


def expected(sources: dict[str, Source], order: Order, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch from whole concatenations read by numpy."""
    drawn, rows = order.batch(step), []
    for index, window in zip(drawn.sources.tolist(), drawn.windows.tolist(), strict=True):
        source = sources[order.names[index]]
        parts = [np.fromfile(source.path(k), source.dtype) for k in range(len(source.shards))]
        length = order.segment(step).seq_len
        rows.append(np.concatenate(parts)[window * length : window * length + length + 1])
    return np.array(rows, np.int64), drawn.sources


def test_batches_hold_the_windows_of_the_order(rng: random.Random, tmp_path: Path) -> None:
    sources = make_sources(rng, tmp_path, SIZES)
    order = make_order(rng, sources)
    longer = {name: source.n_windows(40) for name, source in sources.items()}
    order, _ = order.append(5, batch_windows=4, seq_len=40, windows=longer)
    loader = Loader(sources, order)
    for step in (0, 1, 4, 5, 20):
        tokens, source = loader.batch(step, 0, order.segment(step).batch_windows)
        rows, picked = expected(sources, order, step)
        assert tokens.dtype == torch.int64 and tokens.shape == rows.shape
        assert (tokens.numpy() == rows).all() and (source.numpy() == picked).all()


def test_world_micro_batch_and_threads_do_not_matter(
    rng: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares of any world, cut into any micro-batches, read ahead or not, are one batch."""
    sources = make_sources(rng, tmp_path, SIZES)
    order = make_order(rng, sources)
    for step in range(6):
        whole, picked = Loader(sources, order).batch(step, 0, 12)
        for world in (1, 2, 3, 4, 6, 12):
            share = 12 // world
            parts = [
                Loader(open_sources(tmp_path, SIZES), order).batch(step, r * share, (r + 1) * share)
                for r in range(world)
            ]
            assert torch.equal(torch.cat([p[0] for p in parts]), whole)
            assert torch.equal(torch.cat([p[1] for p in parts]), picked)
            micro = rng.choice([1, 2, 5])
            assert torch.equal(torch.cat([m for p in parts for m in p[0].split(micro)]), whole)
    for ahead in (1, 2, 7):
        monkeypatch.setattr(module, "AHEAD", ahead)
        for first in (0, 3):
            loader = Loader(sources, order)
            found = list(loader.steps(first, 9, lambda step: (step % 3, 12)))
            assert [step for step, _, _ in found] == list(range(first, 9))
            for step, tokens, source in found:
                rows, picked_rows = loader.batch(step, step % 3, 12)
                assert torch.equal(tokens, rows) and torch.equal(source, picked_rows)


def test_several_threads_may_read_one_source(rng: random.Random, tmp_path: Path) -> None:
    sources = make_sources(rng, tmp_path, SIZES)
    order = make_order(rng, sources)
    loaders = [Loader(sources, order) for _ in range(4)]
    readers = [loader.steps(0, 30, lambda step: (0, 12)) for loader in loaders]
    for found in zip(*readers, strict=True):
        assert all(torch.equal(tokens, found[0][1]) for _, tokens, _ in found)


def test_shard_that_shrinks_under_a_run_surfaces_by_name(
    rng: random.Random, tmp_path: Path
) -> None:
    sources = make_sources(rng, tmp_path, SIZES)
    loader = Loader(sources, make_order(rng, sources))
    reader = loader.steps(0, 10_000, lambda step: (0, 12))
    next(reader)
    path = sources["web"].path(1)
    os.truncate(path, 10)
    with pytest.raises(UserError, match=f"{path} ends at byte 10, "):
        for _ in reader:
            pass
    thread = loader._thread
    loader.close()
    assert thread is None or not thread.is_alive()


def test_id_beyond_the_vocabulary_is_found_when_read(
    rng: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large source is only looked at in places when opened; the batch is looked at in full."""
    monkeypatch.setattr(shards, "READ_AT_OPEN", 0)
    make_source(tmp_path / "web", [random_documents(rng, "web", 1000)])
    path = tmp_path / "web/train/00000.bin"
    tokens = np.fromfile(path, np.uint16)
    at = len(tokens) // 2
    tokens[at] = 60_000
    tokens.tofile(path)
    sources = open_sources(tmp_path, ["web"])
    windows = {"web": sources["web"].n_windows(LENGTH)}
    order = Order.start(0, batch_windows=8, seq_len=LENGTH, weights={"web": 1}, windows=windows)
    reader = Loader(sources, order).steps(0, windows["web"] // 8 + 1, lambda step: (0, 8))
    with pytest.raises(UserError, match=f"{path}: token id 60000 at byte {2 * at} "):
        for _ in reader:
            pass


def test_order_made_for_other_shards_is_refused(rng: random.Random, tmp_path: Path) -> None:
    sources = make_sources(rng, tmp_path, SIZES)
    order = make_order(rng, sources)
    make_source(tmp_path / "web", [random_documents(rng, "web", 50)])
    again = open_sources(tmp_path, SIZES)
    with pytest.raises(AssertionError, match=f"{tmp_path}/web/train"):
        for step in range(10):
            Loader(again, order).batch(step, 0, 12)


def test_read_that_hangs_is_named(
    rng: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = make_sources(rng, tmp_path, SIZES)
    release = threading.Event()

    def hang(offset: int, count: int) -> None:
        release.wait()

    monkeypatch.setattr(sources["books"], "read", hang)
    loader = Loader(sources, make_order(rng, sources))
    loader.stalled_after_s = 0.1
    with pytest.raises(TimeoutError, match="still reading window .*books/train"):
        for _ in loader.steps(0, 1000, lambda step: (0, 12)):
            pass
    release.set()


def test_waiting_is_measured(rng: random.Random, tmp_path: Path) -> None:
    sources = make_sources(rng, tmp_path, SIZES)
    loader = Loader(sources, make_order(rng, sources))
    slow = loader.batch

    def batch(step: int, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(0.05)
        return slow(step, lo, hi)

    loader.batch = batch  # type: ignore[method-assign]
    assert len(list(loader.steps(0, 4, lambda step: (0, 12)))) == 4
    assert 0.15 < loader.waited_s


def test_leaving_the_loop_ends_the_thread(rng: random.Random, tmp_path: Path) -> None:
    sources = make_sources(rng, tmp_path, SIZES)
    before = threading.active_count()
    loader = Loader(sources, make_order(rng, sources))
    for step, _, _ in loader.steps(0, 1000, lambda step: (0, 12)):
        if step == 3:
            break
    loader.close()
    assert threading.active_count() == before


def test_validation_takes_the_first_windows(rng: random.Random, tmp_path: Path) -> None:
    make_sources(rng, tmp_path, {"web": 400}, valid_per_10k=3000)
    source = open_sources(tmp_path, ["web"], "valid")["web"]
    whole = source.read(0, source.n_tokens).astype(np.int64)
    n = source.n_windows(LENGTH)
    for budget, windows in ((0, 0), (15, 0), (16, 1), (5 * 16 + 3, 5), (10**9, n)):
        found = validation_windows(source, LENGTH, budget).numpy()
        assert found.shape == (windows, LENGTH + 1)
        for window, row in enumerate(found):
            assert (row == whole[window * LENGTH : window * LENGTH + LENGTH + 1]).all()


def test_documents_end_with_their_eos() -> None:
    tokens = torch.tensor([[7, 2, 1, 5, 2, 1, 9], [2, 2, 1, 3, 4, 5, 6]])
    assert document_ids(tokens, eos_id=2).tolist() == [[0, 0, 1, 1, 1, 2, 2], [0, 1, 2, 2, 2, 2, 2]]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    dropped = drop_boundary_targets(inputs, targets, eos_id=2)
    assert dropped.tolist() == [[2, -100, 5, 2, -100, 9], [-100, -100, 3, 4, 5, 6]]
    assert targets[0, 1] == 1
    rows = torch.randint(0, 5, (20, 50))
    plain = [[sum(t == 2 for t in row[:i]) for i in range(50)] for row in rows.tolist()]
    assert document_ids(rows, 2).tolist() == plain
