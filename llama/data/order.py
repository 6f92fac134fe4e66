"""Which window of which source is sample i of step s: integers in, integers out, nothing read.

In: the run's seed and a list of segments (batch size, sequence length, integer weights, windows
per source). Out: the windows of any step, and the steps of any window. World size, micro-batch and
workers do not enter, so resuming is setting the step. The weights are Table 1 of §2.1; a source is
drawn epoch by epoch, every window once per epoch, each epoch in an order of its own.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llama.cli import UserError
from llama.data.layout import WEIGHT_LIMIT, Ints, epoch_key, layout, permute, source_key
from llama.data.layout import integer_weights as integer_weights

Ranges = tuple[tuple[int, int], ...]


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
    A checkpoint has it as JSON; see ``from_json``.
    """

    first_step: int
    first_sample: int
    batch_windows: int
    seq_len: int
    weights: dict[str, int]
    windows: dict[str, int]
    starts: dict[str, tuple[int, int]]
    skipped: Ranges = ()


def from_json(segments: Iterable[Mapping[str, Any]]) -> tuple[Segment, ...]:
    """Segments as a checkpoint has them: JSON knows lists only."""
    found = []
    for fields in segments:
        starts = {name: (int(epoch), int(n)) for name, (epoch, n) in fields["starts"].items()}
        skipped = tuple((int(first), int(end)) for first, end in fields["skipped"])
        found.append(Segment(**{**fields, "starts": starts, "skipped": skipped}))
    return tuple(found)


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
        begun = np.searchsorted(self.first, sample, side="right")
        over = np.searchsorted(self.end, sample, side="right")
        return np.asarray(sample) - self.before[over], begun == over


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
        self._first_steps = [segment.first_step for segment in self.segments]
        self._keys = np.array([source_key(seed, name) for name in self.names], np.uint64)
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
    ) -> "Order":
        """The order of a new run; ``weights`` from ``integer_weights``."""
        sizes, starts = {name: windows[name] for name in weights}, dict.fromkeys(weights, (0, 0))
        first = Segment(0, 0, batch_windows, seq_len, dict(weights), sizes, starts)
        return cls(seed, [_checked(first)])

    def segment(self, step: int) -> Segment:
        return self.segments[self._index(step)]

    def position(self, step: int) -> int:
        """The run's number of the first sample of a step (skipped samples are counted)."""
        return int(self._samples(step, 1)[0])

    def batch(self, step: int) -> Batch:
        """The whole global batch of a step."""
        plan, segment = self._plan(self._index(step)), self.segment(step)
        samples = self._samples(step, segment.batch_windows) - segment.first_sample
        block, slot = np.divmod(samples, plan.period)
        source = plan.table[slot]
        visit = plan.visit[source] + block * plan.weights[source] + plan.rank[slot]
        epoch, place = np.divmod(visit, plan.windows[source])
        epoch += plan.epoch[source]
        key = epoch_key(self._keys[source], epoch)
        return Batch(source, epoch, permute(place, plan.windows[source], key))

    def steps_before(self, step: int) -> list[tuple[Segment, int]]:
        """(segment, how many of its steps come before this one)."""
        ends = [*self._first_steps[1:], step]
        return [
            (segment, max(0, min(end, step) - segment.first_step))
            for segment, end in zip(self.segments, ends, strict=True)
        ]

    def tokens(self, step: int) -> int:
        """Tokens trained on before a step."""
        return sum(n * s.batch_windows * s.seq_len for s, n in self.steps_before(step))

    def skipped(self, step: int) -> dict[str, int]:
        """Windows of each source passed over, never trained on, before a step."""
        windows = self._skipped(self.position(step)).sum(axis=0)
        return dict(zip(self.names, windows.tolist(), strict=True))

    def source_tokens(self, step: int) -> dict[str, int]:
        """Tokens of each source trained on before a step."""
        here = self.position(step)
        trained = self._visits(here) - self._skipped(here)
        tokens = np.array([segment.seq_len for segment in self.segments]) @ trained
        return dict(zip(self.names, tokens.tolist(), strict=True))

    def find(self, k: int, name: str, window: int, last_step: int) -> list[tuple[int, int]]:
        """(step, row of its batch) of each time segment ``k`` trains on a window, in order.

        One segment at a time: under another sequence length a window holds other tokens.
        """
        segment, plan, source = self.segments[k], self._plan(k), self.names.index(name)
        size, weight = segment.windows.get(name, 0), segment.weights.get(name, 0)
        end_step = min([last_step + 1, *self._first_steps[k + 1 : k + 2]])
        if not weight or window >= size or end_step <= segment.first_step:
            return []
        visits = plan.counts(self.position(end_step) - segment.first_sample)[source]
        epochs = np.arange((visits + plan.visit[source] - 1) // size + 1)
        key = epoch_key(self._keys[source], plan.epoch[source] + epochs)
        visit = epochs * size + permute(window, size, key, inverse=True) - plan.visit[source]
        visit = visit[(visit >= 0) & (visit < visits)]
        slots = np.flatnonzero(plan.table == source)
        sample = visit // weight * plan.period + slots[visit % weight] + segment.first_sample
        number, trained = self._gaps.number(sample)
        number = number[trained] - self._gaps.number(segment.first_sample)[0]
        steps, rows = np.divmod(number, segment.batch_windows)
        return list(zip((steps + segment.first_step).tolist(), rows.tolist(), strict=True))

    def append(
        self,
        first_step: int,
        *,
        skipped: Iterable[tuple[int, int]] = (),
        restart: Collection[str] = (),
        **changes: Any,
    ) -> "tuple[Order, dict[str, int]]":
        """The order with a segment from ``first_step`` on, and the windows it leaves unread.

        ``changes`` are its batch_windows, seq_len, weights and windows; what is not given stays.
        Sources go on where they stand, but begin a new epoch under a new ``seq_len``, with another
        number of windows, or when named in ``restart`` (other shards). Segments planned for later
        steps are dropped. To pass over the batches of steps [a, b), append at step a with
        ``skipped=[(position(a), position(b))]``: a range that begins where the segment does is
        passed over in the old layout, so just those windows are left out.
        """
        skipped = merge_ranges(skipped)
        kept = [s for s in self.segments if s.first_step <= first_step]
        assert kept, f"step {first_step} lies before the first segment"
        old = Order(self.seed, kept)
        last, here = kept[-1], old.position(first_step)
        assert all(a >= here for a, _ in skipped), f"samples before {here} are already trained"
        gaps = _Gaps(merge_ranges((*old._gaps.ranges, *skipped)))
        sample = int(gaps.sample(old._gaps.number(here)[0]))
        visits = old._plan(len(kept) - 1).counts(sample - last.first_sample)
        made = dict(zip(old.names, visits.tolist(), strict=True))
        changes["windows"] = last.windows | changes.get("windows", {})
        new = replace(last, first_step=first_step, first_sample=sample, skipped=skipped, **changes)
        starts, unread = {}, {}
        for name, size in new.windows.items():
            epoch, visit = last.starts.get(name, (0, 0))
            before = last.windows.get(name, 1)
            passed, visit = divmod(visit + made.get(name, 0), before)
            epoch += passed
            if visit and (new.seq_len != last.seq_len or size != before or name in restart):
                unread[name] = before - visit
                epoch, visit = epoch + 1, 0
            starts[name] = (epoch, visit)
        return Order(self.seed, [*kept, _checked(replace(new, starts=starts))]), unread

    def _index(self, step: int) -> int:
        assert step >= self._first_steps[0], f"step {step} lies before the first segment"
        return bisect_right(self._first_steps, step) - 1

    def _plan(self, k: int) -> _Plan:
        if k not in self._plans:
            self._plans[k] = _Plan(self.segments[k], self.names)
        return self._plans[k]

    def _samples(self, step: int, n: int) -> Ints:
        segment = self.segment(step)
        first = self._gaps.number(segment.first_sample)[0]
        first += (step - segment.first_step) * segment.batch_windows
        return self._gaps.sample(first + np.arange(n))

    def _visits(self, sample: int) -> Ints:
        """Visits before a sample of the run, the skipped among them: (segments, sources)."""
        visits = []
        for k, segment in enumerate(self.segments):
            end = min([sample, *(later.first_sample for later in self.segments[k + 1 : k + 2])])
            visits.append(self._plan(k).counts(max(0, end - segment.first_sample)))
        return np.array(visits)

    def _skipped(self, sample: int) -> Ints:
        """Visits before a sample that are passed over: (segments, sources)."""
        total = np.zeros((len(self.segments), len(self.names)), np.int64)
        for first, end in self._gaps.ranges:
            total += self._visits(min(end, sample)) - self._visits(min(first, sample))
        return total


def _checked(segment: Segment) -> Segment:
    """The segment, if it can be drawn."""
    total = sum(segment.weights.values())
    assert 0 < total <= WEIGHT_LIMIT and min(segment.weights.values()) > 0, segment.weights
    assert segment.batch_windows > 0 and segment.seq_len > 0, segment
    for name in segment.weights:
        if segment.windows[name] <= 0:
            raise UserError(f"source {name!r} holds no window of {segment.seq_len} tokens")
    return segment
