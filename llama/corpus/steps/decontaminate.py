"""Step `decontaminate`: documents that hold a passage of a benchmark go (not in the paper).

A passage is 13 words in a row (Brown et al. 2020, appendix C), without case and punctuation. The
benchmarks are files below a folder: .jsonl .json .csv .tsv .txt, bare or .gz .zst; their items are
lines, elements of the list, rows, or what stands between empty lines. Drop reason: `contaminated`;
its detail names file and passage, and the counts say how many documents hold one of each file.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from llama.cli import UserError, as_user_error
from llama.corpus import raw
from llama.corpus.document import Document, Item, Noted, describe
from llama.corpus.plan import find
from llama.corpus.steps.words import Hashes, Words, in_a_row, words

WORDS = 13
# Not counting, an alphabet or "0 0 0": so many different words, and so many of four letters.
MIN_DIFFERENT, MIN_LONG, LONG_CHARS = 8, 3, 4
MAX_BYTES, SHOWN = 1 << 30, 10
_FORMAT = re.compile(r"\.(jsonl|json|csv|tsv|txt)(?:\.gz|\.zst)?$")
_window = np.lib.stride_tricks.sliding_window_view


@dataclass
class Decontaminate:
    """Documents that hold 13 words in a row of a benchmark go, or are only counted.

    Args:
        benchmarks: Folder of benchmark files.
        drop: False keeps the documents, and says in their meta what they hold.
        max_items: What stands in more items than this is a form, and no item's own.
    """

    benchmarks: str = ""
    drop: bool = True
    max_items: int = 10
    # part of the plan: a hash of all passages, and by file how many items are too short to have one
    known: dict[str, Any] = field(init=False)

    name = "decontaminate"

    def __post_init__(self) -> None:
        if not self.benchmarks or not Path(self.benchmarks).is_dir():
            raise UserError(f"decontaminate: benchmarks is {self.benchmarks!r}, which is no folder")
        pieces, left_out = find([self.benchmarks], _format_of)
        self.files = [piece.name for piece in pieces]
        short: list[tuple[int, str, int]] = []
        every, of = [np.zeros(0, "<u8")], [np.zeros(0, "<u4")]
        for number, piece in enumerate(pieces):
            items = [words(text) for text in _items(piece.path, piece.format)]
            found = np.concatenate([np.zeros(0, "<u8"), *map(passages, items)])
            every.append(found)
            of.append(np.full(len(found), number, "<u4"))
            if n := sum(len(item.hashes) < WORDS for item in items):
                short.append((n, piece.name, len(items)))
        hashes, at, times = np.unique(np.concatenate(every), return_index=True, return_counts=True)
        own = times <= self.max_items
        self.hashes, self.of = hashes[own], np.concatenate(of)[at[own]]
        if not len(self.hashes):
            raise UserError(f"{self.benchmarks} holds no benchmark of {WORDS} words in a row")
        missed = {name: f"not read: {reason}" for name, reason, _ in left_out}
        missed |= {f: f"{n:,} of {all:,} items are shorter" for n, f, all in sorted(short)[::-1]}
        self.known = {"sha256": sha256(self.hashes.tobytes()).hexdigest(), "not covered": missed}
        print(f"decontaminate: {len(self.hashes):,} passages of {len(pieces):,} files", flush=True)
        if listed := [f"{name} ({why})" for name, why in missed.items()]:
            more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
            print(f"not covered: {', '.join(listed[:SHOWN])}{more}", flush=True)

    def __call__(self, documents: Iterator[Document]) -> Iterator[Item]:
        for document in documents:
            found = self.find(document.text)
            detail = "; ".join(f"{name}: {passage}" for name, passage in found.items())
            yield from (Noted(f"hold a passage of {name}") for name in found)
            if found and self.drop:
                yield document.dropped("contaminated", detail=detail)
            elif found:
                yield document._replace(meta={**document.meta, "contaminated": detail})
            else:
                yield document

    def find(self, text: str) -> dict[str, str]:
        """Benchmark file -> the first passage of it that the text holds."""
        given = words(text)
        hashes = in_a_row(given.hashes, WORDS)
        known = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        hits = np.flatnonzero(self.hashes[known] == hashes)
        files, at = np.unique(self.of[known[hits]], return_index=True)
        found = {}
        for file, first in zip(files, hits[at], strict=True):
            places = zip(given.begins[first:][:WORDS], given.ends[first:][:WORDS], strict=True)
            found[self.files[file]] = " ".join(given.text[begin:end] for begin, end in places)
        return found


def passages(item: Words) -> Hashes:
    """Hashes of the passages of a benchmark item that are special enough, each once."""
    if len(item.hashes) < WORDS:
        return np.zeros(0, "<u8")
    ranked = np.sort(_window(item.hashes, WORDS), axis=1)
    different = 1 + (ranked[:, 1:] != ranked[:, :-1]).sum(1)
    # a Han character is a word that says as much as a long one
    long = [
        end - begin >= LONG_CHARS or item.text[begin] >= "\u3040"
        for begin, end in zip(item.begins, item.ends, strict=True)
    ]
    special = (different >= MIN_DIFFERENT) & (_window(long, WORDS).sum(1) >= MIN_LONG)
    return np.unique(in_a_row(item.hashes, WORDS)[special])


def _format_of(name: str) -> str | None:
    found = _FORMAT.search(name)
    return found and found[1]


def _items(path: str, format: str) -> Iterator[str]:
    """The text of each item of a benchmark file."""
    kinds = OSError, EOFError, ValueError, csv.Error
    with as_user_error(f"benchmark file {path} cannot be read", *kinds, show=describe):
        data = raw.whole(raw.chunks(path), MAX_BYTES)
        if data is None:
            raise ValueError(f"larger than {MAX_BYTES:,} bytes")
        text, _ = raw.decode(data)
        if format == "txt":
            yield from re.split(r"\n\s*?\n", text)
        elif format in ("csv", "tsv"):
            csv.field_size_limit(MAX_BYTES)
            delimiter = "," if format == "csv" else "\t"
            yield from map("\n".join, csv.reader(io.StringIO(text), delimiter=delimiter))
        else:
            yield from ("\n".join(_strings(item)) for item in _json(text, format))


def _json(text: str, format: str) -> Iterable[Any]:
    """The values of lines, or of the list that the file is."""
    lines = (line for line in text.split("\n") if line.strip())
    if format == "jsonl":
        return map(orjson.loads, lines)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return map(orjson.loads, lines)
    return value if isinstance(value, list) else [value]


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, in order; keys are the form of the file."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
