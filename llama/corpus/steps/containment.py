"""Global step `containment`: a book nearly all of which stands in another one goes (paper §2.1).

The paper removes books with more than 90 % content overlap. Here overlap is containment: the share
of a book's shingles, five words in a row without case and punctuation, that another book has too.
So editions, abridgements and the parts of an anthology are found, and of two books the longer one
stays; a translation or a book that shares 60 % does not go. One shingle in 32 is compared, always
the same ones. Drop reason: `contained`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llama.corpus.document import Document, Item
from llama.corpus.groups import Rows, table
from llama.corpus.steps.words import in_a_row, words

WORDS, ONE_IN = 5, 32
# A shingle of more books than this is a phrase, a licence or a form: it says nothing of two books.
MAX_BOOKS = 64
# Fewer shingles than these, of some 1,600 words, are too few to measure 90 % with.
MIN_SHINGLES = 50


@dataclass(frozen=True)
class Containment:
    """Books of which the share `overlap` is in a longer one go.

    Args:
        overlap: Least share of a book's shingles that makes it a copy.
    """

    overlap: float = 0.9

    name = "containment"
    records = np.dtype([("key", "<u8"), ("unit", "<u4"), ("document", "<u4")])
    decisions = np.dtype([("unit", "<u4"), ("document", "<u4")])
    finds = np.dtype([("first", "<u8"), ("second", "<u8"), ("shared", "<u4")])

    def map(self, unit: int, documents: Iterator[Document]) -> tuple[Rows, Rows]:
        """The chosen shingles of every book."""
        found = []
        for number, document in enumerate(documents):
            found.append(table(self.records, key=shingles(document.text), document=number))
        return np.concatenate([np.zeros(0, self.records), *found]), np.zeros(0, self.decisions)

    def reduce(self, records: Rows) -> Rows:
        """How many shingles each book has here, and each two books have in common."""
        books = records["unit"].astype("<u8") << np.uint64(32) | records["document"]
        starts = np.flatnonzero(np.r_[True, records["key"][1:] != records["key"][:-1]])
        sizes = np.diff(np.r_[starts, len(records)]) if len(records) else np.zeros(0, int)
        pairs = [np.stack((books, books), 1)]
        for distance in range(1, MAX_BOOKS):
            # the books that share a shingle lie side by side
            near = np.repeat((sizes > distance) & (sizes <= MAX_BOOKS), sizes)[: len(books)]
            if not near.any():
                break
            first = np.flatnonzero(near[:-distance])
            same = records["key"][first] == records["key"][first + distance]
            first = first[same]
            pairs.append(np.stack((books[first], books[first + distance]), 1))
        found, counts = np.unique(np.concatenate(pairs), axis=0, return_counts=True)
        return table(self.finds, first=found[:, 0], second=found[:, 1], shared=counts)

    def resolve(self, finds: Iterator[Rows]) -> Rows:
        """Longest first: a book goes when enough of it is in one that stays."""
        shared: dict[tuple[int, int], int] = {}
        for first, second, n in (row for part in finds for row in part.tolist()):
            shared[first, second] = shared.get((first, second), 0) + n
        size = {a: n for (a, b), n in shared.items() if a == b}
        others: dict[int, list[tuple[int, int]]] = {}
        for (a, b), n in shared.items():
            if a != b:
                others.setdefault(a, []).append((b, n))
                others.setdefault(b, []).append((a, n))
        gone: set[int] = set()
        for book in sorted(size, key=lambda book: (size[book], -book)):
            least = max(self.overlap * size[book], MIN_SHINGLES)
            if any(
                n >= least and other not in gone and (size[other], -other) > (size[book], -book)
                for other, n in others.get(book, ())
            ):
                gone.add(book)
        found = np.array(sorted(gone), "<u8")
        return table(self.decisions, unit=found >> np.uint64(32), document=found & 0xFFFFFFFF)

    def apply(self, document: Document, decisions: Rows) -> Item:
        return document.dropped("contained")


def shingles(text: str) -> Rows:
    """Hashes (n,) uint64 of the chosen shingles of a text, each once."""
    rows = in_a_row(words(text).hashes, WORDS)
    return np.unique(rows[rows % np.uint64(ONE_IN) == 0])
