"""Recipe `github`: source trees and archives to files of code under free licences (paper §2.1).

In: a folder or an archive (.zip, .tar, packed as gzip, bzip2, xz or Zstandard) per repository;
folders that hold nothing but such are gone through. Nothing is unpacked to disk. An archive is
read twice: for the licences of its folders (sources/licences.py; a folder that says nothing is
under that of the one above), then for its files. Out: a document per file, cleaned by
steps/code.py; its id is repository/path.

Drop reasons: `special_file` (links, pipes, folders that cannot be read), `lock_file`, `vendored`,
`minified`, `suffix`, `licence_file`, `too_large`, `no_licence`, `licence NAME`, `repeated`,
`binary`, those of steps/code.py.
Quarantined: `unreadable`, `damaged`. Noted: `decoded as ...`.
"""

import bz2
import gzip
import lzma
import os
import posixpath
import re
import stat
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from llama.cli import UserError
from llama.config import Count
from llama.corpus import raw
from llama.corpus.document import Document, Dropped, Item, Noted, Step, describe
from llama.corpus.plan import LeftOut, Piece, Plan, laid_out, printable
from llama.corpus.sources import licences
from llama.corpus.sources.licences import Evidence
from llama.corpus.steps import code, text

_ARCHIVE = re.compile(r"(.+?)\.(?:(tar(?:\.\w+)?|t[gbx]z2?|crate)|zip)", re.IGNORECASE | re.DOTALL)
# By the first two bytes, whatever the name says.
_OPEN: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_OPEN[b"(\xb5"] = zstandard.open
_BY_PATH = re.compile(
    r"(?:.*/)?(?:(?P<lock_file>[^/]*[-.]lock(?:\.[^/]*)?|go\.sum|npm-shrinkwrap\.json)"
    r"|(?P<vendored>(?:node_modules|bower_components|_?vendor(?:ed|s)?|third[-_]?party"
    r"|3rd[-_]?party|extern(?:al)?s?|site-packages|(?:go)?deps|pods|carthage)/.*)"
    r"|(?P<minified>[^/]*[-.](?:min|bundle)\.(?:js|css)))",
    re.IGNORECASE | re.DOTALL,
)
_MAX_PATH = 4096
_MAX_LICENCE_BYTES = 1 << 20
# Of a member of a tar: tarfile holds it several times over.
_MAX_HEADER_BYTES = 1 << 24


@dataclass
class Options:
    """What a run of the recipe may choose.

    Args:
        source: Name of the source in every document; empty for the name of the output folder.
        licences: SPDX names of the licences that are kept.
        max_file_bytes: Larger files are dropped.
        unit_bytes: Input that becomes one output shard.
    """

    source: str = ""
    licences: list[str] = field(
        default_factory=lambda: ["Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "MIT"]
    )
    max_file_bytes: Count = Count(1_000_000)
    unit_bytes: Count = Count(64_000_000)


def plan(options: Options, inputs: Sequence[Path]) -> Plan:
    """Lay out the repositories below `inputs`."""
    if not inputs:
        raise UserError("recipe github reads the repositories below --input, which is not given")
    pieces: dict[str, Piece] = {}
    left_out: list[LeftOut] = []
    for top in inputs:
        if not top.is_dir():
            raise UserError(f"--input {top} is no folder of repositories")
        for piece in _repositories(top, left_out):
            if pieces.setdefault(piece.name, piece) is not piece:
                raise UserError(f"--input holds two repositories {piece.name}: ids would clash")
    return laid_out("github", options, read, (sorted(pieces.values()), left_out))


def steps(options: Options) -> list[Step]:
    """Line ends, then all of steps/code.py."""
    allowed = (*options.licences, *licences.HARMLESS)
    return [text.unix_line_ends, partial(code.clean, allowed=allowed)]


def _repositories(top: Path, left_out: list[LeftOut]) -> Iterator[Piece]:
    """Folders and archives below `top`; a folder with any other file in it is a repository."""
    # grows while it is gone through: however deep the folders lie, nothing calls itself
    entries = list(os.scandir(top))
    for entry in entries:
        name = printable(os.path.relpath(entry.path, top))
        archive = _ARCHIVE.fullmatch(name)
        if entry.is_dir(follow_symlinks=False):
            try:
                inside = list(os.scandir(entry.path))
            except OSError:
                left_out.append(LeftOut(name, "unreadable"))
                continue
            if all(e.is_dir(follow_symlinks=False) or _ARCHIVE.fullmatch(e.name) for e in inside):
                entries += inside
            else:
                size = sum(member.size for member in _tree(entry.path))
                yield Piece(name, entry.path, "tree", size)
        elif archive and entry.is_file(follow_symlinks=False):
            format = "tar" if archive[2] else "zip"
            yield Piece(archive[1], entry.path, format, entry.stat().st_size)
        else:
            left_out.append(LeftOut(name, "not in a repository"))


class Member(NamedTuple):
    """A file by its path in the repository; None reads a link or what else is no file."""

    path: str
    size: int
    read: Callable[[], bytes] | None


def _tree(top: str) -> Iterator[Member]:
    folders = [top]
    while folders:
        folder = folders.pop()
        try:
            inside = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            # no right to, or the path is too long for the system
            yield Member(os.path.relpath(folder, top), 0, None)
            continue
        for entry in inside:
            # links to folders are not gone into
            if not entry.is_dir(follow_symlinks=False):
                status, path = entry.stat(follow_symlinks=False), os.path.relpath(entry.path, top)
                read = Path(entry.path).read_bytes if stat.S_ISREG(status.st_mode) else None
                yield Member(path, status.st_size if read else 0, read)
        further = (e for e in reversed(inside) if e.is_dir(follow_symlinks=False))
        folders += [e.path for e in further if e.name not in (".git", ".hg", ".svn")]


class _Bounded:
    """A stream within a budget, and within `near` until the next member: a header may ask for all
    of a bomb."""

    def __init__(self, file: Any, budget: raw.Budget) -> None:
        self.file, self.budget, self.near = file, budget, raw.Budget(_MAX_HEADER_BYTES)

    def read(self, size: int) -> bytes:
        data: bytes = self.file.read(size)
        self.budget.spend(len(data))
        self.near.spend(len(data))
        return data


def _tar(path: str) -> Iterator[Member]:
    budget = raw.budget_of(os.path.getsize(path))
    with open(path, "rb") as file:
        opened = _OPEN.get(file.read(2), open)
    with opened(path, "rb") as file:
        stream: Any = _Bounded(file, budget)
        tar = tarfile.open(fileobj=stream, mode="r|")
        for info in tar:
            # tarfile would remember every one
            tar.members = []  # type: ignore[attr-defined]
            stream.near = raw.Budget(info.size + _MAX_HEADER_BYTES)
            if not info.isdir():
                member = tar.extractfile(info) if info.isreg() else None
                yield Member(info.name, info.size, member.read if member else None)


def _zip(path: str) -> Iterator[Member]:
    budget = raw.budget_of(os.path.getsize(path))
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            budget.spend(info.file_size)
            if not info.is_dir():
                link = stat.S_ISLNK(info.external_attr >> 16)
                read = None if link else partial(archive.read, info)
                yield Member(info.filename, info.file_size, read)


def _members(piece: Piece) -> Iterator[Member]:
    for member in {"tree": _tree, "tar": _tar, "zip": _zip}[piece.format](piece.path):
        # from the root on, the search for a folder's licence would never end
        yield member._replace(path=posixpath.normpath(printable(member.path)).lstrip("/"))


def read(options: Options, piece: Piece) -> Iterator[Item]:
    """Files of one repository."""
    top, verdicts = _survey(options, piece)
    seen: set[str] = set()
    for member in _members(piece):
        path = member.path.removeprefix(top)
        id, folder = f"{piece.name}/{path}", posixpath.dirname(member.path)
        while len(member.path) <= _MAX_PATH and folder not in verdicts:
            folder = posixpath.dirname(folder)
        licence, refused = verdicts.get(folder, ("", ""))
        reason = _reason(options, member) or refused or ("repeated" if id in seen else "")
        seen.add(id)
        if reason or not member.read:
            yield Dropped(id, reason, member.size)
            continue
        try:
            content, encoding = raw.decode(member.read())
        except (raw.Binary, UnicodeDecodeError):
            yield Dropped(id, "binary", member.size)
        except Exception as error:
            # no right to read, encrypted, damaged: it costs this file
            yield Dropped(id, "unreadable", member.size, describe(error))
        else:
            if encoding != "utf-8":
                yield Noted(f"decoded as {encoding}")
            meta = {"repository": piece.name, "path": path, "licence": licence}
            meta["language"] = code.language(path)
            yield Document(id, content, options.source, meta)


def _reason(options: Options, member: Member) -> str:
    """Why a file is dropped for its kind, name or size."""
    if not member.read or len(member.path) > _MAX_PATH:
        return "special_file"
    if by_path := _BY_PATH.fullmatch(member.path):
        return str(by_path.lastgroup)
    if not code.language(member.path):
        return "suffix"
    if licences.is_text(member.path):
        return "licence_file"
    return "too_large" if member.size > options.max_file_bytes else ""


def _survey(options: Options, piece: Piece) -> tuple[str, dict[str, tuple[str, str]]]:
    """(the folder that all of an archive lies in, the verdict on each folder that has its own)."""
    found: dict[str, list[Evidence]] = defaultdict(list)
    tops = set()
    # what comes before the damage counts, and the second reading will tell of it
    with suppress(Exception):
        for path, size, content in _members(piece):
            tops.add(path[: path.find("/") + 1])
            speaks = licences.is_text(path) or posixpath.basename(path) in licences.METADATA
            if content and speaks and size <= _MAX_LICENCE_BYTES:
                with suppress(Exception):
                    folder, said = licences.evidence(path, raw.decode(content())[0])
                    found[folder].append(said)
    verdicts = {folder: licences.judge(said, options.licences) for folder, said in found.items()}
    known = {folder: verdict for folder, verdict in verdicts.items() if verdict}
    top = tops.pop() if len(tops) == 1 and piece.format != "tree" else ""
    return top, {"": ("", "no_licence"), **known}
