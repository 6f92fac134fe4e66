"""Global step `exact`: of documents with the same text the first stays (paper §2.1).

Texts are the same when 128 bits of their BLAKE2 hashes are, white space around them apart: at 10^10
documents the chance of one wrong pair is below 10^-18. Drop reason: `exact_duplicate`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from llama.corpus.document import Document, Item


@dataclass(frozen=True)
class Exact:
    """Its records are the first of each text in a shard; further ones it drops at once."""

    name = "exact"
    records = np.dtype([("key", "<u8"), ("key2", "<u8"), ("unit", "<u4"), ("document", "<u4")])
    decisions = np.dtype([("unit", "<u4"), ("document", "<u4")])
    resolve = None

    def map(self, unit: int, documents: Iterator[Document]) -> tuple[NDArray, NDArray]:
        """The hash of every document."""
        texts = (document.text.strip() for document in documents)
        hashes = b"".join(
            blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            for text in texts
        )
        keys = np.frombuffer(hashes, np.dtype((np.void, 16)))
        _, first = np.unique(keys, return_index=True)
        records = np.zeros(len(keys), self.records)
        records["key"], records["key2"] = np.frombuffer(hashes, "<u8").reshape(-1, 2).T
        records["document"] = np.arange(len(keys))
        again = np.ones(len(keys), bool)
        again[first] = False
        decisions = np.zeros(again.sum(), self.decisions)
        decisions["document"] = np.flatnonzero(again)
        return records[~again], decisions

    def reduce(self, records: NDArray) -> NDArray:
        """All but the first of each key."""
        same = np.ones(max(0, len(records) - 1), bool)
        for key in ("key", "key2"):
            same &= records[key][1:] == records[key][:-1]
        again = records[1:][same]
        decisions = np.zeros(len(again), self.decisions)
        decisions["unit"], decisions["document"] = again["unit"], again["document"]
        return decisions

    def apply(self, document: Document, decisions: NDArray) -> Item:
        return document.dropped("exact_duplicate")
