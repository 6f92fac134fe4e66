"""The ids of chunks of text, each worked out once: what makes the tokenizer fast (paper §2.1).

In: UTF-8 text and a function from a chunk to its ids. Out: the ids of all chunks, packed.

BPE only ever joins neighbours whose union is a piece. Where no piece holds the two bytes at a
border, no merge crosses that border, so that what lies on either side can be encoded by itself, in
any order, once. Text is cut at such borders into chunks, mostly words. Numpy then looks up all
chunks of a text at once in a table of short ones; a cache has the rest.
"""

import threading
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

# Kinds of bytes, and before which kinds each has a border. Bytes beyond ASCII cling to letters and
# to marks, because accents and quotation marks share pieces with one or the other.
_SPACE, _DIGIT, _LETTER, _MARK, _BEYOND = (1 << i for i in range(5))
_FINE = {
    _SPACE: 0,
    _DIGIT: _SPACE | _DIGIT | _LETTER | _MARK | _BEYOND,
    _LETTER: _SPACE | _DIGIT | _MARK,
    _MARK: _SPACE | _DIGIT | _LETTER,
    _BEYOND: _SPACE | _DIGIT,
}
# Only before the first space of a run: holds for every model that splits at whitespace.
_COARSE = {_SPACE: 0, _DIGIT: _SPACE, _LETTER: _SPACE, _MARK: _SPACE, _BEYOND: _SPACE}

KEY_BYTES = 24  # a chunk and at least one byte of padding
ROW_IDS = 4
TABLE_BITS = 18  # 2^18 rows of 33 bytes, or of 41 with ids of 32 bits
BLOCK_CHUNKS = 1 << 14  # looked up at once; bounds the memory and stays in a processor's cache

# Chunks kept beside the table, and bytes of a chunk that is kept: with ids and Python's overhead
# about 250 bytes a chunk, 33 MB when it is full.
CACHE_CHUNKS = 1 << 17
CACHE_CHUNK_BYTES = 64

NO_KEY = 2**64 - 1  # no chunk begins with 0xFF
_KEY = np.dtype(f"V{KEY_BYTES}")
# Padding of a key by the size of its chunk: 0xFF is in no UTF-8, so that chunks differ in it too. A
# chunk that leaves no room for padding equals no key in the table.
_PADDING = np.array(
    [[0] * size + [255] * (KEY_BYTES - size) for size in range(KEY_BYTES + 1)], np.uint8
).view("<u8")
# Odd numbers with random bits, one for each 8 bytes of a key (multiply-shift hashing).
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
_FIRST = np.tri(ROW_IDS + 1, ROW_IDS, -1, bool)  # row n: the first n of the ids


def _kind(byte: int) -> int:
    char = chr(byte)
    if byte > 127:
        return _BEYOND
    if char == " ":
        return _SPACE
    return _LETTER if char.isalpha() else _DIGIT if char.isdigit() else _MARK


class Borders:
    """Where chunks start, decided by two neighbouring bytes alone."""

    def __init__(self, before: dict[int, int]) -> None:
        kinds = [_kind(byte) for byte in range(256)]
        self._kind = bytes(kinds)
        self._before = bytes(before[kind] for kind in kinds)

    def starts(self, data: bytes) -> np.ndarray:
        """Offsets at which the chunks of some text start, the first being 0."""
        left = np.frombuffer(data.translate(self._before), np.uint8)[:-1]
        right = np.frombuffer(data.translate(self._kind), np.uint8)[1:]
        is_start = np.empty(len(data), bool)
        is_start[:1] = True
        np.not_equal(left & right, 0, out=is_start[1:])
        return np.flatnonzero(is_start)


def borders_for(pieces: Sequence[str]) -> Borders | None:
    """The finest borders inside none of the pieces; None when even the coarse ones are."""
    data = [piece.encode() for piece in pieces]
    ends = np.cumsum([0, *map(len, data)])
    for before in (_FINE, _COARSE):
        borders = Borders(before)
        if np.isin(borders.starts(b"".join(data)), ends).all():
            return borders
    return None


class Packer:
    """Ids of texts, packed in an array type, from the ids of their chunks."""

    def __init__(
        self, borders: Borders, encode: Callable[[str], list[int]], dtype: np.dtype
    ) -> None:
        self._borders = borders
        self._encode, self._dtype = encode, dtype
        self.cache = lru_cache(CACHE_CHUNKS)(self._encoded)
        self._lock = threading.Lock()
        self._keys = np.full((1 << TABLE_BITS, KEY_BYTES // 8), NO_KEY, np.uint64)
        self._counts = np.zeros(1 << TABLE_BITS, np.uint8)
        self._ids = np.zeros((1 << TABLE_BITS, ROW_IDS), dtype)

    def pack(self, data: bytes) -> bytes:
        """The ids of all chunks of a text in UTF-8, one after the other."""
        starts = self._borders.starts(data)
        edges = [*starts[::BLOCK_CHUNKS].tolist(), len(data)]
        parts: list[bytes] = []
        for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            block = starts[i * BLOCK_CHUNKS : (i + 1) * BLOCK_CHUNKS] - low
            with self._lock:
                parts += self._pack_block(data[low:high], block)
        return b"".join(parts)

    def _pack_block(self, data: bytes, starts: np.ndarray) -> list[bytes]:
        sizes = np.diff(starts, append=len(data))
        # the bytes from each place of the text on, as keys
        windows = np.ndarray((len(data),), _KEY, data + bytes(KEY_BYTES), strides=(1,))
        keys = windows[starts].view("<u8").reshape(len(starts), -1)
        keys |= _PADDING.take(sizes, axis=0, mode="clip")
        a, b, c = keys.T
        mixed = a * _FACTORS[0] + b * _FACTORS[1] + c * _FACTORS[2]
        rows = (mixed >> np.uint64(64 - TABLE_BITS)).astype(np.int64)
        there = self._keys.take(rows, axis=0)
        found = (there[:, 0] == a) & (there[:, 1] == b) & (there[:, 2] == c)
        counts = self._counts.take(rows) * found
        ids = self._ids.take(rows, axis=0).ravel()
        packed = ids.compress(_FIRST.take(counts, axis=0).ravel()).tobytes()

        missing = np.flatnonzero(~found)
        if not len(missing):
            return [packed]
        ends = counts.cumsum(dtype=np.int64) * ids.itemsize
        columns = (missing, ends[missing], starts[missing], sizes[missing])
        parts: list[bytes] = []
        new: list[tuple[int, bytes]] = []
        last = 0
        for i, end, start, size in zip(*(column.tolist() for column in columns), strict=True):
            known = self.cache if size <= CACHE_CHUNK_BYTES else self._encoded
            own = known(data[start : start + size])
            parts += packed[last:end], own
            last = end
            if size < KEY_BYTES and len(own) <= ROW_IDS * ids.itemsize:
                new.append((i, own))
        parts.append(packed[last:])
        chosen = [i for i, _ in new]
        self._add(rows[chosen], keys[chosen], [own for _, own in new])
        return parts

    def _encoded(self, chunk: bytes) -> bytes:
        return array(self._dtype.char, self._encode(chunk.decode())).tobytes()

    def _add(self, rows: np.ndarray, keys: np.ndarray, packed: list[bytes]) -> None:
        """Put chunks into the table in place of what was there."""
        itemsize = self._ids.itemsize
        padded = b"".join(part.ljust(ROW_IDS * itemsize, b"\0") for part in packed)
        # keys first and last: interrupted in between, a row equals no chunk
        self._keys[rows] = NO_KEY
        self._counts[rows] = [len(part) // itemsize for part in packed]
        self._ids[rows] = np.frombuffer(padded, self._ids.dtype).reshape(-1, ROW_IDS)
        self._keys[rows] = keys
