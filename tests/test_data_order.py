"""The data order against a slow re-enactment, sample by sample, over thousands of random runs."""

import copy
import random
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import orjson
import pytest

from llama.cli import UserError
from llama.data.layout import WEIGHT_LIMIT, epoch_key, integer_weights, layout, permute, source_key
from llama.data.order import Order, from_json, merge_ranges

LLAMA1 = {
    "commoncrawl": 0.67,
    "c4": 0.15,
    "github": 0.045,
    "wikipedia": 0.045,
    "books": 0.045,
    "arxiv": 0.025,
    "stackexchange": 0.02,
}


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def heavy_tailed(rng: random.Random, n: int) -> list[float]:
    values = [rng.paretovariate(rng.choice([0.3, 1, 3])) for _ in range(n)]
    return [value / sum(values) for value in values]


def worst_lag(table: np.ndarray, weights: list[int]) -> Fraction:
    """Largest |count_i(n) - n·w_i/P| over all sources and prefixes n, exactly."""
    total, worst = sum(weights), 0
    assert len(table) == total
    for source, weight in enumerate(weights):
        slots = np.flatnonzero(table == source)
        assert len(slots) == weight
        earlier = np.arange(weight)
        # a lag is most negative just before a visit and most positive just after it
        worst = max(worst, int((slots * weight - earlier * total).max()))
        worst = max(worst, int(((earlier + 1) * total - (slots + 1) * weight).max()))
    return Fraction(worst, total)


def test_table_1_is_exact() -> None:
    assert integer_weights(LLAMA1) == dict(zip(LLAMA1, [134, 30, 9, 9, 9, 5, 4], strict=True))


def test_integer_weights_are_the_nearest(rng: random.Random) -> None:
    for _ in range(200):
        n = rng.choice([1, 2, 7, 50])
        weights = {f"s{i}": w for i, w in enumerate(heavy_tailed(rng, n))}
        integers = integer_weights(weights)
        total = sum(integers.values())
        assert total <= WEIGHT_LIMIT and min(integers.values()) >= 1
        lifted = sum(1 for w in weights.values() if w * WEIGHT_LIMIT < 1)
        for name, weight in weights.items():
            allowed = (1 + lifted) / WEIGHT_LIMIT
            assert abs(integers[name] / total - weight) <= allowed, (name, weight, integers)


@pytest.mark.parametrize("weight", [0, -0.5, float("nan"), float("inf")])
def test_weights_that_cannot_be_drawn_are_refused(weight: float) -> None:
    with pytest.raises(UserError, match="'b'"):
        integer_weights({"a": 0.5, "b": weight})


def test_more_sources_than_slots_are_refused() -> None:
    with pytest.raises(UserError, match="5 sources|not 5"):
        integer_weights({f"s{i}": 0.2 for i in range(5)}, limit=4)


def test_no_prefix_is_a_whole_sample_off(rng: random.Random) -> None:
    for case in range(300):
        n = rng.choice([1, 2, 3, 7, 20, 100, 1000 if case % 50 == 0 else 5])
        weights = {f"s{i:04}": w for i, w in enumerate(heavy_tailed(rng, n))}
        limit = rng.choice(
            [max(n, 20), max(n, 997), 4096, WEIGHT_LIMIT if case % 20 == 0 else 3000]
        )
        integers = list(integer_weights(weights, limit).values())
        table, rank = layout(tuple(integers))
        assert worst_lag(table, integers) < 1
        for source in range(n):
            assert (rank[table == source] == np.arange(integers[source])).all()


def test_permutations_are_one_to_one_and_invert(rng: random.Random) -> None:
    for size in [*range(1, 200), *(rng.randrange(200, 50_000) for _ in range(20))]:
        key = epoch_key(rng.getrandbits(64), rng.randrange(2**40))
        images = permute(np.arange(size), size, key)
        assert (np.sort(images) == np.arange(size)).all()
        assert (permute(images, size, key, inverse=True) == np.arange(size)).all()
    huge = 10**12 + rng.randrange(10**9)
    index = np.array([rng.randrange(huge) for _ in range(1000)])
    key = epoch_key(source_key(rng.getrandbits(30), "c4"), 3)
    images = permute(index, huge, key)
    assert images.max() < huge and len(set(images.tolist())) == len(set(index.tolist()))
    assert (permute(images, huge, key, inverse=True) == index).all()


def test_permutations_have_no_favourites(rng: random.Random) -> None:
    """Every index goes everywhere equally often over keys (6 sigma), and neighbours part."""
    keys = epoch_key(rng.getrandbits(64), np.arange(40_000))
    for size in (2, 3, 5, 7, 12):
        for index in range(size):
            counts = np.bincount(permute(index, size, keys), minlength=size)
            sigma = (len(keys) / size * (1 - 1 / size)) ** 0.5
            assert abs(counts - len(keys) / size).max() < 6 * sigma, (size, index, counts)
    steps = np.diff(permute(np.arange(10_000), 10_000, keys[0]))
    assert np.unique(steps).size > 5000


def test_seed_name_and_epoch_each_change_the_order() -> None:
    images = {
        tuple(permute(np.arange(100), 100, epoch_key(source_key(seed, name), epoch)).tolist())
        for seed in (0, 1)
        for name in ("a", "b")
        for epoch in (0, 1, 2)
    }
    assert len(images) == 12


def plain_table(weights: dict[str, int]) -> list[str]:
    """Earliest deadline first as the design words it, slot by slot, in fractions."""
    total = sum(weights.values())
    done = dict.fromkeys(sorted(weights), 0)
    table = []
    for slot in range(total):
        due = {
            name: Fraction((j + 1) * total, weights[name])
            for name, j in done.items()
            if j < weights[name] and j * total // weights[name] <= slot
        }
        table.append(min(due, key=lambda name: (due[name], name)))
        done[table[-1]] += 1
    return table


class Reenactment:
    """A run one sample at a time: slow, plain, and without the code under test.

    Only the permutation is borrowed; it has tests of its own.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.at: dict[str, tuple[int, int]] = {}
        self.sample = 0
        self.skipped: list[tuple[int, int]] = []
        self.trained_tokens: Counter[str] = Counter()
        self.passed_over: Counter[str] = Counter()
        self._orders: dict[tuple[str, int, int], list[int]] = {}

    def begin(self, weights: dict[str, int], windows: dict[str, int]) -> None:
        self.table, self.windows, self.drawn = plain_table(weights), windows, 0

    def draw(self) -> tuple[bool, str, int, int]:
        """(whether it is trained, source, epoch, window) of the next sample."""
        name = self.table[self.drawn % len(self.table)]
        epoch, visit = self.at.get(name, (0, 0))
        size = self.windows[name]
        if (name, epoch, size) not in self._orders:
            key = epoch_key(source_key(self.seed, name), epoch)
            self._orders[name, epoch, size] = permute(np.arange(size), size, key).tolist()
        self.at[name] = (epoch, visit + 1) if visit + 1 < size else (epoch + 1, 0)
        trained = not self.next_is_skipped()
        self.drawn += 1
        self.sample += 1
        self.passed_over[name] += not trained
        return trained, name, epoch, self._orders[name, epoch, size][visit]

    def next_is_skipped(self) -> bool:
        return any(a <= self.sample < b for a, b in self.skipped)

    def behind_the_gap(self) -> "Reenactment":
        """This run once it has passed over the skipped samples that come next."""
        other = copy.deepcopy(self)
        while other.next_is_skipped():
            other.draw()
        return other


def random_run(rng: random.Random) -> None:
    """One run of a few segments, compared at every step; then searched backwards."""
    seed = rng.randrange(100)
    pool = [f"s{i}" for i in range(rng.choice([1, 2, 3, 6]))]
    slow = Reenactment(seed)
    order: Order | None = None
    step, seq_len, windows = 0, 1, dict[str, int]()
    seen: dict[tuple[int, str, int], list[tuple[int, int]]] = defaultdict(list)
    once: dict[tuple[str, int], list[int]] = defaultdict(list)
    for number in range(rng.randrange(1, 5)):
        change = rng.choice(["weights", "sizes", "length", "batch", "skip"]) if order else "start"
        batch = rng.choice([1, 2, 5, 16])
        names = pool
        if change in ("start", "weights"):
            names = rng.sample(pool, rng.randrange(1, len(pool) + 1))
            weights = integer_weights(
                dict(zip(names, heavy_tailed(rng, len(names)), strict=True)), rng.choice([8, 37])
            )
        if change in ("start", "sizes"):
            windows = {name: rng.choice([1, 2, 3, 7, 20, 100]) for name in pool}
        sizes = {name: windows[name] for name in weights}
        if order is None:
            order = Order.start(
                seed, batch_windows=batch, seq_len=seq_len, weights=weights, windows=sizes
            )
        else:
            old, old_length = order, seq_len
            here = order.position(step)
            skipped = []
            if change == "length":
                seq_len += 1
            if change == "skip":
                first = here + rng.choice([0, 0, 3])
                skipped = [(first, first + rng.randrange(1, 40)), (here + 60, here + 61)]
            restart = [rng.choice(list(weights))] if rng.random() < 0.2 else []
            order, unread = order.append(
                step,
                batch_windows=batch,
                seq_len=seq_len,
                weights=weights,
                windows=sizes,
                skipped=skipped,
                restart=restart,
            )
            slow.skipped += skipped
            while slow.next_is_skipped():  # in the old layout, which the segment leaves behind
                trained, name, epoch, window = slow.draw()
                assert not trained
                once[name, epoch].append(window)
            known = {name: n for s in old.segments for name, n in s.windows.items()}
            expected = {}
            for name, (epoch, visit) in slow.at.items():
                other = seq_len != old_length or name in restart
                other |= sizes.get(name, known[name]) != known[name]
                if visit and other:
                    expected[name] = known[name] - visit
                    slow.at[name] = (epoch + 1, 0)
            assert unread == expected
        order = Order(seed, from_json(orjson.loads(orjson.dumps(order.segments))))
        slow.begin(weights, sizes)
        counts: dict[str, int] = defaultdict(int)
        total = sum(weights.values())
        for _ in range(rng.randrange(0, 12)):
            past = slow.behind_the_gap() if slow.next_is_skipped() else slow
            assert order.skipped(step) == {name: past.passed_over[name] for name in order.names}
            assert order.source_tokens(step) == {n: slow.trained_tokens[n] for n in order.names}
            assert order.tokens(step) == slow.trained_tokens.total()
            drawn = order.batch(step)
            assert len(drawn.windows) == batch
            for row in range(batch):
                while True:
                    trained, name, epoch, window = slow.draw()
                    once[name, epoch].append(window)
                    if slow.at[name][1] == 0:
                        assert sorted(once[name, epoch]) == list(range(sizes[name]))
                    counts[name] += 1
                    prefix = sum(counts.values())
                    for each, weight in weights.items():
                        assert abs(counts[each] * total - prefix * weight) < total
                    if trained:
                        break
                got = (drawn.sources[row], drawn.epochs[row], drawn.windows[row])
                assert got == (order.names.index(name), epoch, window), (number, step, row)
                seen[len(order.segments) - 1, name, window].append((step, row))
                slow.trained_tokens[name] += seq_len
            step += 1
    for drawn_windows in once.values():
        assert len(set(drawn_windows)) == len(drawn_windows)
    assert order is not None
    for segment, name, window in rng.sample(sorted(seen), min(10, len(seen))):
        expected_visits = seen[segment, name, window]
        assert order.find(segment, name, window, step - 1) == expected_visits
        last = rng.randrange(step)
        seen_so_far = [visit for visit in expected_visits if visit[0] <= last]
        assert order.find(segment, name, window, last) == seen_so_far


@pytest.mark.parametrize("runs", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_runs(rng: random.Random, runs: int) -> None:
    for _ in range(runs):
        random_run(rng)


def test_skipped_batches_are_exactly_those_that_were_drawn(rng: random.Random) -> None:
    """Rewind, pass over steps [a, b), and the rest of the run never sees their windows again."""
    for _ in range(50):
        weights = integer_weights(dict(zip("abc", heavy_tailed(rng, 3), strict=True)), 64)
        windows = dict.fromkeys("abc", 5000)
        order = Order.start(
            rng.randrange(99), batch_windows=7, seq_len=4, weights=weights, windows=windows
        )
        a = rng.randrange(1, 20)
        b = a + rng.randrange(1, 20)

        def drawn(order: Order, steps: range) -> set[tuple[int, int, int]]:
            batches = [order.batch(step) for step in steps]
            return {
                row for batch in batches for row in zip(*map(np.ndarray.tolist, batch), strict=True)
            }

        bad = drawn(order, range(a, b))
        after, unread = order.append(a, skipped=[(order.position(a), order.position(b))])
        assert not unread
        assert drawn(after, range(a)) == drawn(order, range(a))
        assert not bad & drawn(after, range(a + 60))
        assert sum(after.skipped(a).values()) == len(bad) == (b - a) * 7
        for source, _, window in list(bad)[:5]:
            for k in (0, 1):
                assert not after.find(k, after.names[source], window, a + 60)


def test_ramp_planned_ahead_is_dropped_by_a_later_change() -> None:
    weights, windows = {"a": 2, "b": 1}, {"a": 50, "b": 50}
    order = Order.start(0, batch_windows=2, seq_len=8, weights=weights, windows=windows)
    for first_step, batch in ((10, 4), (20, 8)):
        order, _ = order.append(first_step, batch_windows=batch)
    assert [len(order.batch(s).windows) for s in (9, 10, 19, 20)] == [2, 4, 4, 8]
    changed, _ = order.append(15, weights={"a": 1, "b": 2})
    assert [s.first_step for s in changed.segments] == [0, 10, 15]
    assert changed.source_tokens(15) == order.source_tokens(15)


def test_merge_ranges(rng: random.Random) -> None:
    for _ in range(300):
        ranges = [
            (a := rng.randrange(30), a + rng.randrange(0, 9)) for _ in range(rng.randrange(6))
        ]
        merged = merge_ranges(ranges)
        members = {i for a, b in ranges for i in range(a, b)}
        assert [i for a, b in merged for i in range(a, b)] == sorted(members)
        assert all(b < c for (_, b), (c, _) in zip(merged, merged[1:], strict=False))


def test_source_without_windows_is_refused() -> None:
    with pytest.raises(UserError, match="'b'.*512"):
        Order.start(
            0,
            batch_windows=2,
            seq_len=512,
            weights={"a": 1, "b": 1},
            windows={"a": 3, "b": 0},
        )


def test_a_thousand_sources_and_a_trillion_tokens(rng: random.Random) -> None:
    names = [f"source-{i}" for i in range(1000)]
    weights = integer_weights(dict(zip(names, heavy_tailed(rng, 1000), strict=True)))
    windows = {name: rng.randrange(1, 10**8) for name in names}
    order = Order.start(1, batch_windows=2048, seq_len=2048, weights=weights, windows=windows)
    last = 10**12 // (2048 * 2048)
    before, after = order.source_tokens(last), order.source_tokens(last + 1)
    drawn = order.batch(last)
    total, samples = sum(weights.values()), last * 2048
    for index, name in enumerate(order.names):
        assert abs(before[name] // 2048 * total - samples * weights[name]) < total
        assert after[name] - before[name] == 2048 * (drawn.sources == index).sum()
    row = rng.randrange(2048)
    name, window = order.names[drawn.sources[row]], int(drawn.windows[row])
    assert (last, row) in order.find(0, name, window, last)
