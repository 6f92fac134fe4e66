"""Which window of which source is sample i of step s: integers in, integers out, nothing read.

In: the run's seed and a list of segments (batch size, sequence length, integer weights, windows
per source). Out: the windows of any step, and the steps of any window. World size, micro-batch and
workers do not enter, so resuming is setting the step. The weights are Table 1 of §2.1; a source is
drawn epoch by epoch, every window once per epoch, each epoch in an order of its own.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llama.cli import UserError
from llama.data.layout import WEIGHT_LIMIT, Ints, epoch_key, layout, permute, source_key
from llama.data.layout import integer_weights as integer_weights

Ranges = tuple[tuple[int, int], ...]

EPOCHS_AT_ONCE = 1024


class Batch(NamedTuple):
    """One global batch, a row per sample: index into ``Order.names``, epoch, window."""

    sources: Ints
    epochs: Ints
    windows: Ints


@dataclass(frozen=True)
class Segment:
    """A stretch of steps drawn under one layout; a run is a list of them that only grows.

    ``starts`` is (epoch, visits made within it) of every source at ``first_sample``; ``skipped``
    are [first, end) ranges of the run's samples, added by this segment, that no step trains on.
    Sources that left the mixture stay in ``windows`` and ``starts``, so that they can come back.
    """

    first_step: int
    first_sample: int
    batch_windows: int
    seq_len: int
    weights: dict[str, int]
    windows: dict[str, int]
    starts: dict[str, tuple[int, int]]
    skipped: Ranges = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Segment:
        starts = {name: (int(epoch), int(n)) for name, (epoch, n) in fields["starts"].items()}
        skipped = tuple((int(first), int(end)) for first, end in fields["skipped"])
        return cls(**{**fields, "starts": starts, "skipped": skipped})


def to_json(segments: Iterable[Segment]) -> list[dict[str, Any]]:
    return [segment.to_json() for segment in segments]


def from_json(segments: Iterable[Mapping[str, Any]]) -> tuple[Segment, ...]:
    return tuple(Segment.from_json(fields) for fields in segments)


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same set of samples as sorted, disjoint, non-empty [first, end) ranges."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted((first, end) for first, end in ranges if first < end):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return tuple(merged)


class _Gaps:
    """Skipped samples of a run: sample <-> number among the samples that are trained."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges
        self.first, self.end = np.array(ranges, np.int64).reshape(-1, 2).T
        self.before = np.concatenate([[0], np.cumsum(self.end - self.first)])

    def sample(self, number: ArrayLike) -> Ints:
        gaps = np.searchsorted(self.first - self.before[:-1], number, side="right")
        return np.asarray(number) + self.before[gaps]

    def number(self, sample: ArrayLike) -> tuple[Ints, NDArray[np.bool_]]:
        """(number, whether it is trained at all)."""
        gaps = np.searchsorted(self.end, sample, side="right")
        starts = np.append(self.first, np.iinfo(np.int64).max)
        return np.asarray(sample) - self.before[gaps], np.asarray(sample) < starts[gaps]


class _Plan:
    """A segment as arrays over ``Order.names`` (sources outside its mixture have weight 0)."""

    def __init__(self, segment: Segment, names: Sequence[str]) -> None:
        self.weights = np.array([segment.weights.get(name, 0) for name in names], np.int64)
        self.windows = np.array([segment.windows.get(name, 1) for name in names], np.int64)
        starts = [segment.starts.get(name, (0, 0)) for name in names]
        self.epoch, self.visit = np.array(starts, np.int64).T
        present = np.flatnonzero(self.weights)
        table, self.rank = layout(tuple(self.weights[present].tolist()))
        self.table: Ints = present[table]
        self.period = len(self.table)

    def counts(self, samples: int) -> Ints:
        """Visits of each source among the first ``samples`` samples of the segment."""
        blocks, rest = divmod(samples, self.period)
        return blocks * self.weights + np.bincount(self.table[:rest], minlength=len(self.weights))


class Order:
    """The order of a run. Immutable; its whole state is ``segments``."""

    def __init__(self, seed: int, segments: Iterable[Segment]) -> None:
        self.seed = seed
        self.segments = tuple(segments)
        assert self.segments, "an order needs a first segment"
        self.names = tuple(sorted({name for s in self.segments for name in s.windows}))
        keys = [source_key(seed, name) for name in self.names]
        self._keys = np.array(keys, np.uint64)
        self._gaps = _Gaps(merge_ranges(r for s in self.segments for r in s.skipped))
        self._plans: dict[int, _Plan] = {}

    @classmethod
    def start(
        cls,
        seed: int,
        *,
        batch_windows: int,
        seq_len: int,
        weights: Mapping[str, int],
        windows: Mapping[str, int],
    ) -> Order:
        """The order of a new run; ``weights`` from ``integer_weights``."""
        starts = dict.fromkeys(weights, (0, 0))
        sizes = {name: windows.get(name, 0) for name in weights}
        first = Segment(0, 0, batch_windows, seq_len, dict(weights), sizes, starts)
        _check(first)
        return cls(seed, [first])

    def segment(self, step: int) -> Segment:
        return self.segments[self._index(step)]

    def position(self, step: int) -> int:
        """The run's number of the first sample of a step (skipped samples are counted)."""
        return int(self._samples(step, 1)[0])

    def batch(self, step: int) -> Batch:
        """The whole global batch of a step."""
        k = self._index(step)
        plan, segment = self._plan(k), self.segments[k]
        samples = self._samples(step, segment.batch_windows) - segment.first_sample
        block, slot = np.divmod(samples, plan.period)
        source = plan.table[slot]
        visit = plan.visit[source] + block * plan.weights[source] + plan.rank[slot]
        epoch, place = np.divmod(visit, plan.windows[source])
        epoch += plan.epoch[source]
        key = epoch_key(self._keys[source], epoch)
        return Batch(source, epoch, permute(place, plan.windows[source], key))

    def tokens(self, step: int) -> int:
        """Tokens trained on before a step."""
        ends = [s.first_step for s in self.segments[1:]] + [step]
        return sum(
            max(0, min(end, step) - s.first_step) * s.batch_windows * s.seq_len
            for s, end in zip(self.segments, ends, strict=True)
        )

    def counts(self, step: int) -> dict[str, int]:
        """Windows of each source consumed before a step, the skipped ones among them."""
        return self._total([(0, self.position(step))])

    def skipped(self, step: int) -> dict[str, int]:
        """Windows of each source passed over, never trained on, before a step."""
        return self._total(self._gaps_before(step))

    def source_tokens(self, step: int) -> dict[str, int]:
        """Tokens of each source trained on before a step."""
        skipped = self._total(self._gaps_before(step), in_tokens=True)
        consumed = self._total([(0, self.position(step))], in_tokens=True)
        return {name: consumed[name] - skipped[name] for name in self.names}

    def find(
        self, name: str, window: int, last_step: int | None = None, segment: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """(step, index in its batch) of each time a window is trained on, up to ``last_step``.

        Without ``last_step`` it never ends. ``segment`` restricts the search to one: under another
        sequence length the same window number means other tokens.
        """
        for k, each in enumerate(self.segments):
            inside = 0 <= window < each.windows.get(name, 0) and name in each.weights
            if inside and segment in (None, k):
                yield from self._find_in(k, self.names.index(name), window, last_step)

    def append(
        self,
        first_step: int,
        *,
        batch_windows: int | None = None,
        seq_len: int | None = None,
        weights: Mapping[str, int] | None = None,
        windows: Mapping[str, int] | None = None,
        skipped: Iterable[tuple[int, int]] = (),
        restart: Collection[str] = (),
    ) -> tuple[Order, dict[str, int]]:
        """The order with a segment from ``first_step`` on, and the windows it leaves unread.

        What is not given stays. Sources go on where they stand, but begin a new epoch under a new
        ``seq_len``, with another number of windows, or when named in ``restart`` (other shards).
        Segments planned for later steps are dropped. To pass over the batches of steps [a, b),
        append at step a with ``skipped=[(position(a), position(b))]``: a range that begins where
        the segment does is passed over in the old layout, so just those windows are left out.
        """
        skipped = tuple(skipped)
        kept = [s for s in self.segments if s.first_step <= first_step]
        assert kept, f"step {first_step} lies before the first segment"
        old = Order(self.seed, kept)
        last, here = kept[-1], old.position(first_step)
        assert all(a >= here for a, _ in skipped), f"samples before {here} are already trained"
        gaps = _Gaps(merge_ranges((*old._gaps.ranges, *skipped)))
        sample = int(gaps.sample(old._gaps.number(here)[0]))
        visits = old._plan(len(kept) - 1).counts(sample - last.first_sample)
        sizes = dict(last.windows) | dict(windows or {})
        seq_len = last.seq_len if seq_len is None else seq_len
        starts, unread = {}, {}
        for name in sizes:
            epoch, visit = last.starts.get(name, (0, 0))
            if name in last.windows:
                ahead, visit = divmod(
                    visit + int(visits[old.names.index(name)]), last.windows[name]
                )
                epoch += ahead
            changed = seq_len != last.seq_len or sizes[name] != last.windows.get(name, sizes[name])
            if visit and (changed or name in restart):
                unread[name] = last.windows[name] - visit
                epoch, visit = epoch + 1, 0
            starts[name] = (epoch, visit)
        new = Segment(
            first_step=first_step,
            first_sample=sample,
            batch_windows=last.batch_windows if batch_windows is None else batch_windows,
            seq_len=seq_len,
            weights=dict(last.weights if weights is None else weights),
            windows=sizes,
            starts=starts,
            skipped=merge_ranges(skipped),
        )
        _check(new)
        return Order(self.seed, [*kept, new]), unread

    @cached_property
    def _first_steps(self) -> list[int]:
        return [segment.first_step for segment in self.segments]

    def _index(self, step: int) -> int:
        assert step >= self._first_steps[0], f"step {step} lies before the first segment"
        return bisect_right(self._first_steps, step) - 1

    def _plan(self, k: int) -> _Plan:
        if k not in self._plans:
            self._plans[k] = _Plan(self.segments[k], self.names)
        return self._plans[k]

    def _samples(self, step: int, n: int) -> Ints:
        segment = self.segments[self._index(step)]
        first = int(self._gaps.number(segment.first_sample)[0])
        first += (step - segment.first_step) * segment.batch_windows
        return self._gaps.sample(first + np.arange(n))

    def _gaps_before(self, step: int) -> list[tuple[int, int]]:
        end = self.position(step)
        return [(a, min(b, end)) for a, b in self._gaps.ranges if a < end]

    def _total(self, ranges: Iterable[tuple[int, int]], in_tokens: bool = False) -> dict[str, int]:
        """Visits of each source within ranges of the run's samples, each in its own layout."""
        total = np.zeros(len(self.names), np.int64)
        ends: list[float] = [s.first_sample for s in self.segments[1:]] + [math.inf]
        for first, end in ranges:
            for k, (segment, last) in enumerate(zip(self.segments, ends, strict=True)):
                a, b = max(first, segment.first_sample), min(end, last)
                if a < b:
                    plan, origin = self._plan(k), segment.first_sample
                    visits = plan.counts(int(b) - origin) - plan.counts(a - origin)
                    total += visits * (segment.seq_len if in_tokens else 1)
        return dict(zip(self.names, total.tolist(), strict=True))

    def _find_in(
        self, k: int, source: int, window: int, last_step: int | None
    ) -> Iterator[tuple[int, int]]:
        segment, plan = self.segments[k], self._plan(k)
        size, weight = int(plan.windows[source]), int(plan.weights[source])
        ends = [s.first_sample for s in self.segments[k + 1 : k + 2]]
        if last_step is not None:
            ends.append(self.position(max(last_step + 1, segment.first_step)))
        samples = min(ends) - segment.first_sample if ends else None
        visits = math.inf if samples is None else int(plan.counts(samples)[source])
        slots = np.flatnonzero(plan.table == source)
        first = self._gaps.number(segment.first_sample)[0]
        epochs = math.inf if samples is None else (visits + int(plan.visit[source]) - 1) // size + 1
        begin = 0
        while begin < epochs:
            ahead = np.arange(begin, min(begin + EPOCHS_AT_ONCE, epochs), dtype=np.int64)
            key = epoch_key(self._keys[source], plan.epoch[source] + ahead)
            visit = ahead * size + permute(window, size, key, inverse=True) - plan.visit[source]
            visit = visit[(visit >= 0) & (visit < visits)]
            sample = visit // weight * plan.period + slots[visit % weight]
            number, trained = self._gaps.number(sample + segment.first_sample)
            steps, rows = np.divmod(number[trained] - first, segment.batch_windows)
            yield from zip((steps + segment.first_step).tolist(), rows.tolist(), strict=True)
            begin += EPOCHS_AT_ONCE


def _check(segment: Segment) -> None:
    """Refuse a segment that cannot be drawn."""
    total = sum(segment.weights.values())
    assert 0 < total <= WEIGHT_LIMIT and min(segment.weights.values()) > 0, segment.weights
    for name in segment.weights:
        if segment.windows.get(name, 0) <= 0:
            raise UserError(f"source {name!r} holds no window of {segment.seq_len} tokens")
    for key in ("batch_windows", "seq_len"):
        if getattr(segment, key) <= 0:
            raise UserError(f"{key} must be above 0, not {getattr(segment, key)}")
