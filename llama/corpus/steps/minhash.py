"""Global step `minhash`: of documents that are nearly the same the first stays (not in the paper).

Documents are as alike as the share of their shingles, five words in a row, that both have. That is
also the chance that in a random order of all shingles they have the same first one (MinHash, Broder
1997). Those that agree in a whole band of orders are compared in all orders, by 4 bits of each.
Documents that hang together, be it through others, are a cluster, whose first one in the order of
the input stays. Drop reason: `near_duplicate`; its detail is `shard:document` of the first.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import shake_256

import numpy as np
from numpy.typing import NDArray

from llama.cli import expect
from llama.corpus.document import Document, Item
from llama.corpus.groups import table
from llama.corpus.steps.words import in_a_row, mixed, words

SHINGLE_WORDS = 5
# Where a band is the same in many documents, as in forms, each is compared with so many before it.
NEIGHBOURS = 32
_BLOCK_ROWS, _JOINED_ROWS = 1024, 1 << 22
# Of two bytes of two orders each, how many orders are the same: by their exclusive or.
_SAME = np.array([(byte < 16) + (byte % 16 == 0) for byte in range(256)], np.uint8)


@dataclass(frozen=True)
class MinHash:
    """Near duplicates go: 14 bands of 8 find 99.9 % of the pairs that have 90 % in common.

    Args:
        bands: Documents are compared if they agree in one of these.
        rows: Orders that make a band.
        similarity: Least share of common shingles that makes documents the same.
        min_shingles: Documents with fewer different ones are not compared.
    """

    bands: int = 14
    rows: int = 8
    similarity: float = 0.8
    min_shingles: int = 20

    name = "minhash"
    decisions = np.dtype([("unit", "<u4"), ("document", "<u4"), ("first", "<u8")])

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            most, what = (1, "up to 1") if key == "similarity" else (value, "a number")
            expect(0 < value <= most, f"{key} is {value}", f"{what} above 0")

    @property
    def orders(self) -> NDArray[np.uint32]:
        """What shingles are multiplied by; an even number, since two share a byte."""
        n = self.bands * self.rows
        return np.frombuffer(shake_256(b"orders").digest(4 * (n + n % 2)), "<u4") | np.uint32(1)

    @property
    def records(self) -> np.dtype:
        lows = ("lows", "u1", (len(self.orders) // 2,))
        return np.dtype([("key", "<u8"), ("unit", "<u4"), ("document", "<u4"), lows])

    def map(self, unit: int, documents: Iterator[Document]) -> tuple[NDArray, NDArray]:
        """A record for each band of each document."""
        orders, numbers, found = self.orders, [], []
        for number, document in enumerate(documents):
            shingles = np.unique(in_a_row(words(document.text).hashes, SHINGLE_WORDS))
            if len(shingles) >= self.min_shingles:
                numbers.append(number)
                found.append(signature(shingles, orders))
        lows = np.array(found, "<u4").reshape(-1, len(orders))
        records = np.zeros((len(lows), self.bands), self.records)
        records["key"] = np.arange(self.bands)
        for i in range(self.rows):
            of_bands = lows[:, i : self.bands * self.rows : self.rows]
            records["key"] = mixed(records["key"] ^ of_bands)
        records["document"] = np.array(numbers, "<u4")[:, None]
        records["lows"] = ((lows[:, ::2] & 15) | (lows[:, 1::2] & 15) << 4)[:, None]
        return records.reshape(-1), np.zeros(0, self.decisions)

    def reduce(self, records: NDArray) -> NDArray:
        """Documents that agree in a band and are alike: each with the first of its cluster."""
        return joined(self._pairs(records))

    def _pairs(self, records: NDArray) -> Iterator[NDArray]:
        place = records["unit"].astype("<u8") << np.uint64(32) | records["document"]
        key, lows = records["key"], records["lows"]
        # two different ones have the same 4 bits once in 16 times
        least = (1 + 15 * self.similarity) / 16 * len(self.orders)
        for distance in range(1, NEIGHBOURS + 1):
            # the documents of a band lie side by side
            first = np.flatnonzero(key[:-distance] == key[distance:])
            for at in np.array_split(first, len(first) // _BLOCK_ROWS + 1):
                alike = at[_SAME[lows[at] ^ lows[at + distance]].sum(1) >= least]
                yield np.stack((place[alike], place[alike + distance]), 1)

    def resolve(self, finds: Iterator[NDArray]) -> NDArray:
        """All but the first of each cluster."""
        found = joined(finds)
        first, place = found.T
        return table(self.decisions, unit=place >> 32, document=place & 0xFFFFFFFF, first=first)

    def apply(self, document: Document, decisions: NDArray) -> Item:
        first = int(decisions["first"][0])
        return document.dropped("near_duplicate", detail=f"{first >> 32}:{first & 0xFFFFFFFF}")


def joined(parts: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """`clusters` of pairs that come in parts: in memory are as many as there are documents in it.

    They are joined each time they are as many as what was joined before, so each a few times.
    """
    found, waiting, more = np.zeros((0, 2), "<u8"), list[NDArray](), 0
    for part in parts:
        waiting.append(part)
        more += len(part)
        if more > max(len(found), _JOINED_ROWS):
            found, waiting, more = clusters(np.concatenate([found, *waiting])), [], 0
    return clusters(np.concatenate([found, *waiting]))


def clusters(pairs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(first of its cluster, member) for all other documents (m, 2) that pairs (n, 2) join."""
    places, ends = np.unique(pairs, return_inverse=True)
    first, second = ends.reshape(-1, 2).T
    leader = np.arange(len(places))
    while (apart := leader[first] != leader[second]).any():
        a, b = leader[first[apart]], leader[second[apart]]
        np.minimum.at(leader, np.maximum(a, b), np.minimum(a, b))
        while (leader != leader[leader]).any():
            leader = leader[leader]
    gone = leader != np.arange(len(places))
    return np.stack((places[leader[gone]], places[gone]), 1)


def signature(shingles: NDArray[np.uint64], orders: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The first of the shingles (n,) in each of the orders (k,)."""
    # odd numbers, which multiplying by odd ones puts into another order
    short = (shingles >> np.uint64(32)).astype("<u4") | np.uint32(1)
    low = np.full(len(orders), 2**32 - 1, "<u4")
    for i in range(0, len(short), _BLOCK_ROWS):
        np.minimum(low, (short[i : i + _BLOCK_ROWS, None] * orders).min(0), out=low)
    return low
