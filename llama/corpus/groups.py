"""Rows in files, by a group each: what lies between the stages of a global step (see shuffle.py).

In: structured arrays and the group of every row. Out: files in which the rows of one group, a
partition or a shard, are read without the others.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.recfunctions import repack_fields
from numpy.typing import NDArray

from llama import files
from llama.corpus.journal import Record, stamp

Rows = NDArray[Any]


def write_groups(path: Path, rows: Rows, group: Rows, n: int) -> Record:
    """Rows by their group, 0 <= group < n, behind an index; order within a group is kept."""
    order = np.argsort(group, kind="stable")
    index = np.searchsorted(group[order], np.arange(n + 1)).astype("<i8")
    with files.atomic_file(path) as file:
        file.write(index.tobytes())
        file.write(rows[order].tobytes())
    return stamp(path)


def read_groups(path: Path, dtype: np.dtype[Any], n: int, group: int | None = None) -> Rows:
    """Rows of one of the n groups, or all."""
    first, last = (0, n) if group is None else (group, group + 1)
    with open(path, "rb") as file:
        file.seek(first * 8)
        begin = int.from_bytes(file.read(8), "little")
        file.seek(last * 8)
        end = int.from_bytes(file.read(8), "little")
        file.seek((n + 1) * 8 + begin * dtype.itemsize)
        data = file.read((end - begin) * dtype.itemsize)
    return np.frombuffer(data, dtype)


def table(dtype: np.dtype[Any], **columns: Any) -> Rows:
    """Rows with these columns, the first of which tells how many, and 0 in the others."""
    rows = np.zeros(len(next(iter(columns.values()))), dtype)
    for name, values in columns.items():
        rows[name] = values
    return rows


def narrowed(rows: Rows, dtype: np.dtype[Any]) -> Rows:
    """Rows with the fields of the type alone."""
    return repack_fields(rows[list(dtype.names or ())])


def repeats(rows: Rows, *fields: str) -> NDArray[np.bool_]:
    """Which rows have the fields of the row before."""
    same = np.ones(len(rows), bool)
    same[:1] = False
    for field in fields:
        same[1:] &= rows[field][1:] == rows[field][:-1]
    return same


def sorted_by_key(records: Rows) -> Rows:
    """By all fields that are called key..., equal ones in their order."""
    assert records.dtype.names
    keys = [name for name in records.dtype.names if name.startswith("key")]
    return records[np.lexsort([records[name] for name in reversed(keys)])]
