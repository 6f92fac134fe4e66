"""Global step `exact`: of documents that are the same the first stays (paper §2.1).

Documents are the same when 128 bits of a BLAKE2 hash are: of their text, white space around it
apart, of their address, or of their id. At 10^10 documents the chance of one wrong pair is below
10^-18. Drop reasons: `exact_duplicate`, `url_duplicate`, `id_duplicate`; their detail is the first
half of the hash, the same for all copies.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np

from llama.cli import expect
from llama.corpus.document import Document, Item
from llama.corpus.groups import Rows, narrowed, repeats, table

_REASONS = {"text": "exact_duplicate", "url": "url_duplicate", "id": "id_duplicate"}
# What C4 does not count as part of an address: scheme, www., tracking, a slash at the end.
_NO_ADDRESS = re.compile(r"^https?://(?:www\.)?|\?(?:utm_|ref|feed).*")


@dataclass(frozen=True)
class Exact:
    """Its records are the first of each kind in a shard; further ones it drops at once.

    Args:
        same: What makes two documents one: text, url (as C4 compares them) or id.
    """

    same: Literal["text", "url", "id"] = "text"

    name = "exact"
    records = np.dtype([("key", "<u8"), ("key2", "<u8"), ("unit", "<u4"), ("document", "<u4")])
    decisions = np.dtype([("unit", "<u4"), ("document", "<u4"), ("key", "<u8")])
    resolve = None

    def __post_init__(self) -> None:
        expect(self.same in _REASONS, f"same is {self.same!r}", f"one of {', '.join(_REASONS)}")

    def map(self, unit: int, documents: Iterator[Document]) -> tuple[Rows, Rows]:
        """The hash of every document; one without an address is like no other."""
        numbers, hashes = [], bytearray()
        for number, document in enumerate(documents):
            if (what := self._compared(document)) is not None:
                numbers.append(number)
                data = what.encode("utf-8", "surrogatepass")
                hashes += blake2b(data, digest_size=16).digest()
        keys = np.frombuffer(hashes, np.dtype((np.void, 16)))
        _, first = np.unique(keys, return_index=True)
        key, key2 = np.frombuffer(hashes, "<u8").reshape(-1, 2).T
        records = table(self.records, key=key, key2=key2, document=numbers)
        again = np.ones(len(keys), bool)
        again[first] = False
        return records[~again], narrowed(records[again], self.decisions)

    def _compared(self, document: Document) -> str | None:
        if self.same == "url":
            return _NO_ADDRESS.sub("", str(document.meta.get("url") or "")).rstrip("/") or None
        return document.id if self.same == "id" else document.text.strip()

    def reduce(self, records: Rows) -> Rows:
        """All but the first of each key."""
        return narrowed(records[repeats(records, "key", "key2")], self.decisions)

    def apply(self, document: Document, decisions: Rows) -> Item:
        return document.dropped(_REASONS[self.same], detail=f"{decisions['key'][0]:016x}")
