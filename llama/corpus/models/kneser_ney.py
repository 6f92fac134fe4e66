"""Language model of a language: n-grams of pieces, modified Kneser-Ney (paper §2.1, CCNet).

In: the piece ids of documents. Out: a model that gives any document its probability, saved as one
array that the workers of a machine share. Formulas: Chen and Goodman 1998, interpolated, with the
conventions of KenLM's lmplz (Heafield and others 2013): one <s> before a document and one </s>
behind it, true counts for what begins with <s>, the unknown piece a type that was never seen.
"""

import zlib
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama import files
from llama.cli import as_user_error

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Table = NDArray[np.uint64]

MAX_TOKENS = 10_000_000
# What lmplz takes of pieces seen once, twice and more often, where an estimate is impossible.
FALLBACK = (0.0, 0.5, 1.0, 1.5)
# Share of a table's rows that hold something: the more, the longer a search.
FILLED = 0.6
# Rows that are searched together.
WINDOW = 4
BLOCK_TOKENS = 1 << 16
_MAGIC = int.from_bytes(b"LM 5gram", "little")
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


class KneserNey:
    """A model in memory or mapped from its file.

    `table` is (rows, 2) uint64: row 0 is magic and checksum, row 1 order and number of pieces, then
    for every order above 1 where its rows begin and how many take a hash; then the unigrams by
    their word, then the hash tables. A row of these is the key of an n-gram, the row of its first
    n-1 words and its last word, and two float32: log10 of its probability, and of its weight when
    it is the context of what was never seen behind it.
    """

    def __init__(self, table: Table, figures: dict[str, Any] | None = None) -> None:
        self.figures = figures or {}
        self.order, self.n_pieces = (int(x) for x in table[1])
        self._table = table
        self._keys, self._values = table.reshape(-1), table.reshape(-1).view(np.float32)
        self._bits = _bits(self.n_pieces)

    @classmethod
    def fit(
        cls,
        sequences: Iterable[Sequence[int] | NDArray[Any]],
        n_pieces: int,
        order: int = 5,
        max_tokens: int = MAX_TOKENS,
    ) -> "KneserNey":
        """A model of the documents' ids, each 0 to `n_pieces` - 1.

        Reading stops behind the document that reaches `max_tokens`, and so memory is bounded: it
        takes about 350 bytes a token, the model 75.
        """
        assert order > 1, f"order is {order}, expected 2 or more"
        parts, tokens = [], 0
        for ids in sequences:
            # so far apart that no n-gram has words of two documents
            parts.append(_words(ids, n_pieces, order - 1).astype(np.int32))
            tokens += len(ids)
            if tokens >= max_tokens:
                break
        assert parts, "a language model needs a document"
        grams = _grams(np.concatenate(parts), order, _bits(n_pieces))
        n_grams = [int(np.count_nonzero(these.counts)) for these in grams]
        figures = {"documents": len(parts), "tokens": tokens, "ngrams": n_grams}
        return cls(_build(grams, *_estimate(grams), n_pieces), figures)

    def score(self, ids: Sequence[int] | NDArray[Any]) -> float:
        """log10 of the probability of a document, its end included."""
        words = _words(ids, self.n_pieces)
        known = self.order - 1
        total = self._score(words[:BLOCK_TOKENS], 1)
        for begin in range(BLOCK_TOKENS, len(words), BLOCK_TOKENS):
            total += self._score(words[begin - known : begin + BLOCK_TOKENS], known)
        return total

    def perplexity(self, ids: Sequence[int] | NDArray[Any]) -> float:
        """Of a piece, the document's end counted as one: 10^(-score / (pieces + 1))."""
        return float(10 ** min(-self.score(ids) / (len(ids) + 1), 300.0))

    def _score(self, words: Ints, begin: int) -> float:
        """The sum over `words[begin:]`; those before are only context."""
        rows = words + self.order + 1
        found = self._values.take(4 * rows + 2).astype(np.float64)[1:]
        # place i: the word i + 1, behind the n-gram that ends with the word i and has a row
        places, contexts = np.arange(len(words) - 1), rows[:-1]
        for n in range(2, self.order + 1):
            hits = self._find(n, contexts << self._bits | words[places + 1])
            seen = hits >= 0
            found[places[~seen]] += self._values.take(4 * contexts[~seen] + 3)
            places, contexts = places[seen], hits[seen]
            found[places] = self._values.take(4 * contexts + 2)
            # what ends with the word i + 1 is the context of the place i + 1
            inside = places < len(words) - 2
            places, contexts = places[inside] + 1, contexts[inside]
        return float(found[begin - 1 :].sum())

    def _find(self, n: int, keys: Ints) -> Ints:
        """Rows of n-grams; -1 for those that were never seen."""
        first, size = self._table[n]
        wanted = keys.astype(np.uint64)
        rows = (_home(wanted, size) + first).astype(np.int64)
        found, pending = np.full(len(keys), -1), np.arange(len(keys))
        while len(pending):
            there = self._keys.take(2 * (rows[:, None] + np.arange(WINDOW)))
            which, place = np.nonzero(there == wanted[:, None])
            found[pending[which]] = rows[which] + place
            # a search ends at an empty row
            more = (there != _EMPTY).all(axis=1)
            more[which] = False
            pending, rows, wanted = pending[more], rows[more] + WINDOW, wanted[more]
        return found

    def save(self, path: str | Path) -> None:
        """Write the model; the same model gives the same bytes."""
        with files.atomic_file(path) as file:
            np.save(file, self._table, allow_pickle=False)

    @classmethod
    def load(cls, path: str | Path) -> "KneserNey":
        """A saved model, mapped; `UserError` names a file that is missing, damaged or no model."""
        what = f"{path} cannot be read as a language model"
        with as_user_error(what, OSError, ValueError, EOFError, IndexError):
            table = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            known = table.dtype == np.uint64 and int(table[0, 0]) == _MAGIC
            if not known or int(table[0, 1]) != zlib.crc32(table[1:].data):
                raise ValueError("it is none of train_models, or its checksum is wrong")
        return cls(table)


class _Grams(NamedTuple):
    """The distinct n-grams of one order, sorted; unigrams are all words, each behind nothing.

    Args:
        words: The last word of each.
        prefix: Which n-gram of the order below its first n-1 words are.
        suffix: And its last n-1 words.
        counts: How often each occurs.
    """

    words: NDArray[np.int32]
    prefix: NDArray[np.int32]
    suffix: NDArray[np.int32]
    counts: Ints


def _bits(n_pieces: int) -> int:
    """Of a word: 0 is nothing, then the pieces, then </s>, then <s>."""
    return (n_pieces + 2).bit_length()


def _words(ids: Sequence[int] | NDArray[Any], n_pieces: int, room: int = 0) -> Ints:
    """<s>, the pieces, </s>, and behind them `room` times nothing."""
    words = np.zeros(len(ids) + 2 + room, np.int64)
    words[0], words[1 : len(ids) + 1], words[len(ids) + 1] = n_pieces + 2, ids, n_pieces + 1
    words[1 : len(ids) + 1] += 1
    assert len(ids) == 0 or 0 <= np.min(ids) <= np.max(ids) < n_pieces, f"{n_pieces} pieces: {ids}"
    return words


def _grams(words: NDArray[np.int32], order: int, bits: int) -> list[_Grams]:
    """Distinct n-grams of every order: one sort of all places by what follows them serves all."""
    at = np.flatnonzero(words)
    keys = []
    for first in range(0, order, 63 // bits):
        keys.append(np.zeros(len(at), np.int64))
        for k in range(first, min(first + 63 // bits, order)):
            keys[-1] = keys[-1] << bits | words[at + k]
    at = at[np.lexsort(keys[::-1])].astype(np.int32)
    del keys
    place = np.zeros(len(words), np.int32)
    place[at] = np.arange(len(at), dtype=np.int32)
    ids = words[at]
    differs = np.append(True, ids[1:] != ids[:-1])
    every = np.arange(words.max() + 1, dtype=np.int32)
    found = [_Grams(every, 0 * every, 0 * every, np.bincount(ids, minlength=len(every)))]
    for n in range(2, order + 1):
        last = words[at + (n - 1)]
        differs[1:] |= last[1:] != last[:-1]
        within = last > 0
        new = differs & within
        below, ids = ids, np.cumsum(new, dtype=np.int32) - np.int32(1)
        suffix = below[place[at[new] + 1]]
        found.append(_Grams(last[new], below[new], suffix, np.bincount(ids[within])))
    return found


def _estimate(grams: list[_Grams]) -> tuple[list[Floats], list[Floats]]:
    """Probabilities of the n-grams of every order, and weights of those one shorter as contexts."""
    # the unknown piece is a type as well, and <s> none
    probabilities, weights = [1 / np.array([np.count_nonzero(grams[0].counts)])], []
    for these, longer in zip_longest(grams, grams[1:]):
        counts = these.counts
        if longer:
            # how many words stand before it; the true count where <s> is in the way
            before = np.bincount(longer.suffix, minlength=len(counts))
            counts = np.where(before, before, counts)
        if these is grams[0]:
            # nothing ever predicts <s>
            counts[-1] = 0
        off, below = _discounts(counts)[np.minimum(counts, 3)], probabilities[-1]
        total = np.bincount(these.prefix, counts, len(below))
        left = np.bincount(these.prefix, off, len(below))
        weights.append(np.divide(left, total, out=np.ones(len(below)), where=total > 0))
        share = (counts - off) / total[these.prefix]
        probabilities.append(share + weights[-1][these.prefix] * below[these.suffix])
    return probabilities[1:], [*weights[1:], np.ones(len(probabilities[-1]))]


def _discounts(adjusted: Ints) -> Floats:
    """What is taken off the counts 0, 1, 2, and 3 or more (Chen and Goodman, equation 26)."""
    n = np.bincount(np.minimum(adjusted, 5), minlength=6).astype(np.float64)
    if not n[1:4].all():
        return np.array(FALLBACK)
    j = np.arange(4)
    amounts = j - (j + 1) * n[1] / (n[1] + 2 * n[2]) * n[1:5] / np.append(1, n[1:4])
    amounts[0] = 0
    return amounts if ((amounts >= 0) & (amounts <= j)).all() else np.array(FALLBACK)


def _build(
    grams: list[_Grams], probabilities: list[Floats], weights: list[Floats], n_pieces: int
) -> Table:
    """The table of a model, see `KneserNey`."""
    header = np.zeros((len(grams) + 1, 2), np.uint64)
    header[1] = len(grams), n_pieces
    keys = [np.full(len(grams[0].words), _EMPTY)]
    rows = [np.arange(len(keys[0])) + len(header)]
    end = len(header) + len(keys[0])
    for n, these in enumerate(grams[1:], 2):
        keys.append((rows[-1][these.prefix] << _bits(n_pieces) | these.words).astype(np.uint64))
        size = int(len(these.words) / FILLED) + 1
        header[n] = end, size
        home = _home(keys[-1], header[n, 1]).astype(np.int64)
        by_home = np.argsort(home, kind="stable")
        # each in the first free row from its own on
        count = np.arange(len(home))
        taken = np.maximum.accumulate(home[by_home] - count) + count
        rows.append(np.empty(len(home), np.int64))
        rows[-1][by_home] = end + taken
        end += max(size, int(taken.max(initial=0)) + 1) + WINDOW
    table = np.full((end, 2), _EMPTY)
    table[: len(header)] = header
    values = table.view(np.float32)
    for row, key, probability, weight in zip(rows, keys, probabilities, weights, strict=True):
        table[row, 0] = key
        # a discount of nothing leaves nothing to what was never seen; not so here
        pairs = np.maximum(np.stack((probability, weight), axis=1), 1e-30)
        values[row, 2:] = np.log10(pairs)
    table[0] = _MAGIC, zlib.crc32(table[1:].data)
    return table


def _home(keys: NDArray[np.uint64], size: np.uint64) -> NDArray[np.uint64]:
    """The row of a table of `size` rows where the search for a key begins."""
    return ((keys * _SPREAD) >> _HALF) * size >> _HALF
