"""The byte layout of Megatron-LM's IndexedDataset: tokens in ``.bin``, documents in ``.idx``.

In: lengths of documents, or an ``.idx`` made here or by Megatron-LM. Out: an index file, or its
numbers checked against one another and against the size of the file. The data of §2.1.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama import files
from llama.cli import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
Dtype = np.dtype[Any]

DTYPES: dict[int, Dtype] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
# What an index made elsewhere may hold besides; adoption rewrites it.
_FOREIGN = {1: "u1", 2: "i1", 3: "<i2", 5: "<i8"}
FOREIGN_DTYPES: dict[int, Dtype] = {code: np.dtype(name) for code, name in _FOREIGN.items()}
MAX_SEQUENCE = 2**31 - 1  # the layout counts the tokens of a sequence in int32
# Files of a shard and the keys of their hashes in the manifest. Beyond Megatron's two: ids in the
# order of the documents, and the sorted hashes of these ids.
SUFFIXES = {
    ".bin": "sha256",
    ".idx": "idx_sha256",
    ".ids.zst": "ids_sha256",
    ".hash": "hash_sha256",
}


def dtype_for(vocab_size: int) -> Dtype:
    return DTYPES[8] if vocab_size <= 65_536 else DTYPES[4]


def largest(tokens: NDArray[Any]) -> int:
    """The largest id, counting a negative one as too large."""
    if tokens.dtype.kind == "i":
        tokens = tokens.view(f"<u{tokens.dtype.itemsize}")
    return int(tokens.max(initial=0))


def check_ids(tokens: NDArray[Any], vocab_size: int, path: Path, first: int) -> None:
    """Refuse ids outside the vocabulary; ``first`` is the place of tokens[0] in the file."""
    if largest(tokens) >= vocab_size:
        at = int(np.flatnonzero((tokens >= vocab_size) | (tokens < 0))[0])
        raise UserError(
            f"{path}: token id {tokens[at]} at byte {(first + at) * tokens.dtype.itemsize} lies"
            f" outside the vocabulary of {vocab_size}"
        )


@dataclass(frozen=True)
class Index:
    """An ``.idx`` file: tokens and byte position per sequence, first sequence per document."""

    dtype: Dtype
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    documents: NDArray[np.int64]

    @property
    def starts(self) -> NDArray[np.int64]:
        """First token of each document, and the end of the last."""
        ends = np.append(self.pointers // self.dtype.itemsize, self.lengths.sum(dtype=np.int64))
        return ends[self.documents]


def write_index(path: Path, dtype: Dtype, tokens: NDArray[np.int64], limit: int) -> None:
    """Write the ``.idx`` of documents of so many tokens.

    A document longer than ``limit`` is several sequences of one document.
    """
    pieces = np.maximum(1, -(-tokens // limit))
    documents = np.concatenate([[0], np.cumsum(pieces)]).astype("<i8")
    sequences = np.full(documents[-1], limit, np.int64)
    sequences[documents[1:] - 1] = tokens - (pieces - 1) * limit
    itemsize = dtype.itemsize
    pointers = (np.cumsum(sequences) - sequences) * itemsize
    code = next(code for code, known in DTYPES.items() if known == dtype)
    data = HEADER.pack(MAGIC, 1, code, len(sequences), len(documents))
    data += sequences.astype("<i4").tobytes() + pointers.astype("<i8").tobytes()
    data += documents.tobytes()
    files.write_atomic(path, data)


def read_index(path: Path, whole: bool = True) -> Index:
    """The index; if `whole`, its numbers are checked against one another, else its size alone."""
    with files.readable(path):
        # mapped: to open a shard it takes only its last numbers
        size = path.stat().st_size
        data: Any = np.memmap(path, np.uint8, "r") if size else b""
    if size < HEADER.size:
        raise UserError(f"{path} ends at byte {size}, inside its header of {HEADER.size} bytes")
    magic, version, code, n, documents = HEADER.unpack_from(data)
    if magic != MAGIC or version != 1:
        raise UserError(f"{path}: byte 0 does not start a Megatron index of version 1")
    dtype = (DTYPES | FOREIGN_DTYPES).get(code)
    if dtype is None:
        raise UserError(f"{path}: byte 17 names dtype code {code}, which holds no token ids")
    expected = HEADER.size + n * 12 + documents * 8
    if size != expected or documents < 1:
        raise UserError(
            f"{path} has {size} bytes, but {n} sequences and {documents - 1} documents"
            f" (bytes 18 to 33) take {expected}"
        )
    lengths = np.frombuffer(data, "<i4", n, HEADER.size)
    pointers = np.frombuffer(data, "<i8", n, HEADER.size + 4 * n)
    firsts = np.frombuffer(data, "<i8", documents, HEADER.size + 12 * n)
    if whole:
        ends = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
        wrong = np.flatnonzero((pointers != ends) | (lengths < 0))
        if len(wrong):
            where = "does not lie where the ones before it end"
            raise UserError(f"{path}: sequence {wrong[0]} {where}")
        if firsts[0] != 0 or firsts[-1] != n or (np.diff(firsts) < 0).any():
            raise UserError(f"{path}: its documents are not stretches of its {n} sequences")
    return Index(dtype, lengths, pointers, firsts)
