"""Words of a text as hashes, and of several words in a row: what texts are compared by.

A word is a run of letters, marks and digits in lower case; where no spaces are set between words
(Han, kana) each character is one. So neither case, punctuation nor line breaks tell texts apart.
"""

import unicodedata
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

BLOCK_CHARS = 1 << 16
# Odd and of the greatest order modulo 2^64, so that every place of a word counts.
_BASE = 0x9E3779B97F4A7C15
_LAST_CODE = 0x32400
_LETTER, _ALONE = 1, 2


class Words(NamedTuple):
    """Word i has the hash `hashes[i]` and is `text[begins[i] : ends[i]]`, in lower case."""

    text: str
    hashes: Hashes
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


def words(text: str) -> Words:
    """All words in their order; a word is the polynomial of its code points."""
    kinds, powers, inverses = _tables()
    text, at = text.lower(), 0
    found: list[tuple[Hashes, NDArray[np.int64], NDArray[np.int64]]] = []
    # in blocks, so that memory stays small; at least one, for a text that is empty
    while at < len(text) or not found:
        end = at + BLOCK_CHARS
        if end < len(text):
            end = max(text.rfind(" ", at, end), text.rfind("\n", at, end)) + 1 or end
        codes = np.frombuffer(text[at:end].encode("utf-32-le", "surrogatepass"), "<u4")
        kind = np.pad(kinds[np.minimum(codes, _LAST_CODE)], 1)
        here, alone = kind[1:-1] > 0, kind[1:-1] == _ALONE
        begins = np.flatnonzero(here & (alone | (kind[:-2] != _LETTER)))
        ends = np.flatnonzero(here & (alone | (kind[2:] != _LETTER))) + 1
        sums = np.append(np.uint64(0), np.cumsum(powers[: len(codes)] * codes))
        hashes = mixed((sums[ends] - sums[begins]) * inverses[begins])
        found.append((hashes, begins + at, ends + at))
        at = end
    return Words(text, *(np.concatenate(parts) for parts in zip(*found, strict=True)))


def in_a_row(hashes: Hashes, n: int) -> Hashes:
    """A hash of each n words in a row, from those of the words."""
    count = max(0, len(hashes) - n + 1)
    rolled = hashes[:count].copy()
    for i in range(1, n):
        rolled *= np.uint64(_BASE)
        rolled += hashes[i : i + count]
    return mixed(rolled)


def mixed(values: Hashes) -> Hashes:
    """A permutation of the 64-bit numbers in which every bit of one changes half the bits."""
    for _ in range(2):
        values = (values ^ values >> np.uint64(32)) * np.uint64(0xD6E8FEB86659FD93)
    return values ^ values >> np.uint64(32)


@cache
def _tables() -> tuple[NDArray[np.uint8], Hashes, Hashes]:
    """What each code point is, and the powers of the base and of its inverse."""
    letters = [unicodedata.category(chr(code))[0] in "LMN" for code in range(_LAST_CODE)]
    kinds = np.array([*letters, False], np.uint8)
    for first, end in ((0x3040, 0x3100), (0x3400, 0xA000), (0xF900, 0xFB00), (0x20000, _LAST_CODE)):
        kinds[first:end] *= _ALONE
    powers = np.ones((2, BLOCK_CHARS), "<u8")
    powers[:, 1:] = np.array([[_BASE], [pow(_BASE, -1, 1 << 64)]], "<u8")
    return kinds, *np.multiply.accumulate(powers, axis=1)
