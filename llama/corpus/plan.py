"""What a run will do, decided before it starts: input files in, a list of units out.

A unit is read from one or more pieces of input and written to one output shard. The rule that
makes units depends on the input alone, never on the number of workers: files in the order of their
names are put together until they fill `unit_bytes`; a file of one record a line that is larger is
cut at line starts into pieces of that size; any other large file is a unit of its own. So 100,000
small files make few shards and one huge file makes many. Input files are known by name and size.
"""

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson

from llama import config
from llama.cli import UserError, expect
from llama.corpus import raw
from llama.corpus.document import Item

# Of the rule that makes units: another version on an unfinished output folder is another plan.
VERSION = 1
# What a file costs beside its bytes, so that a unit of empty files is not endless.
FILE_COST_BYTES = 4096
# Text compresses about three times; guessed by name, since a unit must be known before it is read.
EXPANSION = dict.fromkeys((".gz", ".zst", ".bz2", ".xz", ".zip", ".parquet"), 3)

T = TypeVar("T")


class Piece(NamedTuple):
    """Bytes [begin, begin + size) of an input file; `name` is the file's in document ids."""

    name: str
    path: str
    format: str
    size: int
    begin: int = 0
    first_line: int = 1


class LeftOut(NamedTuple):
    """A file or folder under the input that no unit reads."""

    name: str
    reason: str
    size: int = 0


# What there is to read, and what is not read.
Found = tuple[list[Piece], list[LeftOut]]
# Documents of a piece; and of a recipe, given its options.
Read = Callable[[Piece], Iterator[Item]]
Reader = Callable[[Any, Piece], Iterator[Item]]


class Unit(NamedTuple):
    """Pieces of input that become one output shard."""

    output: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """A recipe with its input laid out.

    Args:
        recipe: Its name.
        options: All values that change the output.
        read: Documents of a piece; a bad record is `Dropped`, an exception ends the piece.
        units: What is read and written.
        left_out: What lies under the input and is not read.
    """

    recipe: str
    options: dict[str, Any]
    read: Read
    units: tuple[Unit, ...]
    left_out: tuple[LeftOut, ...] = ()

    def header(self) -> dict[str, Any]:
        """What identifies the plan: the first line of a journal."""
        inputs: dict[str, int] = defaultdict(int)
        for unit in self.units:
            for piece in unit.pieces:
                inputs[piece.name] += piece.size
        return header(self.recipe, self.options, inputs)


def header(
    recipe: str, options: Mapping[str, Any], inputs: Mapping[str, int | str]
) -> dict[str, Any]:
    """What identifies a plan, with its hash; inputs are known by name and size, or by a hash."""
    body = {"version": VERSION, "recipe": recipe, "options": options, "inputs": inputs}
    canonical = orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
    return {"plan": hashlib.sha256(canonical).hexdigest(), **orjson.loads(canonical)}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What has changed between two plan headers, one phrase a change, input files summed up."""
    keys = "version", "recipe", "options"
    a, b = ({key: each.get(key) for key in keys} for each in (old, new))
    found = config.differences(a, b)
    before, after = old.get("inputs", {}), new.get("inputs", {})
    both = [name for name in before if name in after and before[name] != after[name]]
    changes = {
        "added": [name for name in after if name not in before],
        "gone": [name for name in before if name not in after],
        "changed": [f"{name} {before[name]} -> {after[name]}" for name in both],
    }
    for what, names in changes.items():
        if names:
            more = ", ..." if len(names) > 3 else ""
            found.append(f"inputs {what}: {len(names)} ({', '.join(names[:3])}{more})")
    return found


def find(inputs: Sequence[str | Path], format_of: Callable[[str], str | None]) -> Found:
    """Every file under the inputs, sorted by name, as whole pieces; and what is left out.

    Names are relative to their input, behind that input's own name where several are given. Links
    to files are followed, links to folders are not, so there are no cycles and nothing is read
    twice.
    """
    if not inputs:
        raise UserError("the recipe reads what lies below --input, which is not given")
    pieces: dict[str, Piece] = {}
    left_out: list[LeftOut] = []
    for given in map(Path, inputs):
        if not given.exists():
            raise UserError(f"--input {given} does not exist")
        prefix = f"{given.resolve().name}/" if len(inputs) > 1 and given.is_dir() else ""
        for name, path in _walk(given, left_out):
            name = printable(prefix + name)
            found = _file(name, path, format_of)
            if isinstance(found, LeftOut):
                left_out.append(found)
            elif pieces.setdefault(name, found) is not found:
                raise UserError(f"--input holds two files called {name}: their ids would clash")
    return sorted(pieces.values()), left_out


def _walk(top: Path, left_out: list[LeftOut]) -> Iterator[tuple[str, str]]:
    """(name, path) of everything below `top` that is not a folder; hidden things are left out."""
    if not top.is_dir():
        yield top.name, str(top)
        return
    folders = [("", str(top))]
    while folders:
        prefix, folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:
            left_out.append(LeftOut(printable(prefix or "."), "unreadable"))
            continue
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                left_out.append(LeftOut(printable(name), "hidden"))
            elif entry.is_dir(follow_symlinks=False):
                folders.append((name + "/", entry.path))
            elif os.path.isdir(entry.path):
                left_out.append(LeftOut(printable(name), "link to a folder"))
            else:
                yield name, entry.path


def _file(name: str, path: str, format_of: Callable[[str], str | None]) -> Piece | LeftOut:
    try:
        status = os.stat(path)
    except OSError:
        return LeftOut(name, "unreadable")
    if not stat.S_ISREG(status.st_mode):
        # opening a pipe would wait for ever
        return LeftOut(name, "special file")
    if (format := format_of(name)) is None:
        return LeftOut(name, "suffix", status.st_size)
    if not os.access(path, os.R_OK):
        return LeftOut(name, "unreadable", status.st_size)
    return Piece(name, path, format, status.st_size)


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 become backslash escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def laid_out(name: str, options: Any, read: Reader, found: Found, cut: Sequence[str] = ()) -> Plan:
    """The plan of a recipe that reads what was found in units of about `options.unit_bytes`."""
    pieces, left_out = found
    units = group(pieces, options.unit_bytes, cut)
    return Plan(name, asdict(options), partial(read, options), units, tuple(left_out))


def group(pieces: Iterable[Piece], unit_bytes: int, cut: Sequence[str] = ()) -> tuple[Unit, ...]:
    """Units of about `unit_bytes` of text; files of the formats in `cut` hold a record a line."""
    expect(unit_bytes >= 1, f"unit_bytes is {unit_bytes}", "more than 0")
    parts = (_cut(piece, unit_bytes) if piece.format in cut else [piece] for piece in pieces)
    groups = packed(chain.from_iterable(parts), _cost, unit_bytes)
    width = max(5, len(str(len(groups))))
    return tuple(Unit(f"{i:0{width}}.jsonl.zst", tuple(g)) for i, g in enumerate(groups))


def _cost(piece: Piece) -> int:
    return piece.size * EXPANSION.get(Path(piece.path).suffix, 1) + FILE_COST_BYTES


def packed(items: Iterable[T], cost: Callable[[T], float], size: int) -> list[list[T]]:
    """Items in their order, in groups that cost about `size`; what costs more is alone."""
    groups: list[list[T]] = []
    room = 0.0
    for item in items:
        if not groups or cost(item) > room:
            groups.append([])
            room = size
        groups[-1].append(item)
        room -= cost(item)
    return groups


def _cut(piece: Piece, unit_bytes: int) -> list[Piece]:
    """A file cut behind the first newline at or after every multiple of `unit_bytes`."""
    if piece.size <= unit_bytes:
        return [piece]
    starts, at = [(0, 1)], 0
    # the sizes of lines, of which none is held
    for number, (_, size) in enumerate(raw.lines(raw.chunks(piece.path), 0), 2):
        at += size + 1
        if at > starts[-1][0] + unit_bytes:
            starts.append((min(at, piece.size), number))
    ends = [begin for begin, _ in starts[1:]] + [piece.size]
    return [
        piece._replace(begin=begin, size=end - begin, first_line=first)
        for (begin, first), end in zip(starts, ends, strict=True)
        if end > begin
    ]
