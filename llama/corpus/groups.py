"""Rows in files, by a group each: what lies between the stages of a global step (see shuffle.py).

In: structured arrays and the group of every row. Out: files in which the rows of one group, a
partition or a shard, are read without the others.
"""

from pathlib import Path
from typing import Any

import numpy as np
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


def sorted_by_key(records: Rows) -> Rows:
    """By all fields that are called key..., equal ones in their order."""
    assert records.dtype.names
    keys = [name for name in records.dtype.names if name.startswith("key")]
    return records[np.lexsort([records[name] for name in reversed(keys)])]
