"""Global step `lines`: lines that are repeated across documents go, as in CCNet (paper §2.1).

Lines are the same when the first 64 bits of their SHA-1 are, after `normalized`. What normalises to
nothing is no line and stays. A line that a document repeats counts once, and its first copy there
stays if that line does.

Drop reason: `duplicate_lines`, where no line is left of a document.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha1
from typing import Literal

import numpy as np

from llama.corpus.document import Document, Item
from llama.corpus.groups import Rows, narrowed, repeats, table

_PLACE = [("unit", "<u4"), ("document", "<u4"), ("line", "<u4")]
_DIGEST = np.dtype([("key", "<u8"), ("rest", "V12")])
# Spreads the number of a group over the bits of a hash.
_ODD = 0x9E3779B97F4A7C15
# Up to U+FFFF: beyond, where a class is slow, letters and pictures are nearly all there is.
_KINDS = {chr(code): unicodedata.category(chr(code)) for code in range(0x10000)}
_GONE = [c for c, kind in _KINDS.items() if kind[0] in "PZ" or kind in ("Cc", "Cf")]
_ASCII_REMOVED = bytes(ord(c) for c in _GONE if c.isascii() and c not in " \n")
_ASCII_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_REMOVED = re.compile(f"[{''.join(c for c in _GONE if not c.isascii())}]")
_DIGIT = re.compile(f"[{''.join(c for c, kind in _KINDS.items() if kind == 'Nd' and c > '9')}]")
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Lines:
    """Its records are the first of each line in a shard; what is repeated there it decides at once.

    Args:
        copies: Which copies of a repeated line stay: the first, or none.
        group_shards: Shards in a row that are compared with each other; 0 for all.
    """

    copies: Literal["first", "none"] = "first"
    group_shards: int = 0
    name = "lines"
    records = np.dtype([("key", "<u8"), *_PLACE])
    decisions = np.dtype(_PLACE)
    resolve = None

    def map(self, unit: int, documents: Iterator[Document]) -> tuple[Rows, Rows]:
        """The hash of every line."""
        parts = [np.zeros(0, self.records)]
        for number, document in enumerate(documents):
            keys, lines = line_keys(document.text)
            parts.append(table(self.records, key=keys, document=number, line=lines))
        rows = np.concatenate(parts)
        rows = rows[np.argsort(rows["key"], kind="stable")]
        in_document = repeats(rows, "key", "document")
        decided = rows[in_document]
        rows = rows[~in_document]
        again = repeats(rows, "key")
        if self.copies == "none":
            decided = np.concatenate([decided, rows[again | np.append(again[1:], False)]])
        else:
            decided = np.concatenate([decided, rows[again]])
        records = rows[~again]
        if self.group_shards:
            records["key"] ^= np.uint64((unit // self.group_shards + 1) * _ODD % (1 << 64))
        return records, narrowed(decided, self.decisions)

    def reduce(self, records: Rows) -> Rows:
        """Lines of a key that several shards have, all or all but the first."""
        again = repeats(records, "key")
        if self.copies == "none":
            again |= np.append(again[1:], False)
        return narrowed(records[again], self.decisions)

    def apply(self, document: Document, decisions: Rows) -> Item:
        """The document without the lines that were decided to go."""
        gone = set(decisions["line"].tolist())
        kept = [line for i, line in enumerate(document.text.split("\n")) if i not in gone]
        text = _BLANK_LINES.sub("\n\n", "\n".join(kept)).strip()
        if not normalized(text).strip():
            return document.dropped("duplicate_lines")
        return document._replace(text=text)


def line_keys(text: str) -> tuple[Rows, Rows]:
    """(64-bit hash, number from 0) of every line of a text that does not normalise to nothing."""
    lines = [line.strip() for line in normalized(text).split(b"\n")]
    digests = b"".join([sha1(line).digest() for line in lines if line])
    numbers = np.array([i for i, line in enumerate(lines) if line], np.uint32)
    return np.frombuffer(digests, _DIGEST)["key"], numbers


def normalized(text: str) -> bytes:
    """All lines in lower case, digits as 0, without punctuation and control characters."""
    text = text.lower()
    if not text.isascii():
        text = _REMOVED.sub("", _DIGIT.sub("0", text))
    return text.encode("utf-8", "surrogatepass").translate(_ASCII_DIGITS, _ASCII_REMOVED)
