"""Recipe `arxiv`: LaTeX sources of arXiv to the text of papers (paper §2.1).

In: the bulk archive's arXiv_src_YYMM_NNN.tar and single .gz of a .tex or of a tar, as arXiv serves
them. Nothing is unpacked to disk. Out: a document per paper, see steps/latex.py; its id is arXiv's,
and of a paper that is there twice, as in a bulk archive and on its own, the first file's stays.

Drop reasons: `pdf_only`, `no_tex`, `no_main_file`, `too_large`, `empty`, `short`, `id_duplicate`.
Quarantined: `damaged`. Noted: `decoded as ...`, `input missing`, `input in a circle`, `no section`,
`macro limit`.
"""

import gzip
import io
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from llama.config import Count
from llama.corpus import raw
from llama.corpus.document import Document, Dropped, Item, Noted, describe
from llama.corpus.plan import Piece, Plan, find, laid_out
from llama.corpus.steps import latex, text
from llama.corpus.steps.exact import Exact

_TEX = (".tex", ".ltx", ".latex", ".sty", ".cls")
# As they are called in bulk, and what a browser saves: arXiv-2301.00001v2.
_ID = re.compile(
    r"(?:arxiv[-_.:]?)?(?:(\d{4}\.\d{4,5})|([a-z]+(?:-[a-z]+)?)[-_/.]?(\d{7}))(?:v\d+)?", re.I
)
_INPUTENC = re.compile(rb"\\usepackage\[(\w+)\]\{inputenc\}")
_CODECS = {"latin2": "iso8859-2", "latin9": "iso8859-15", "cp1250": "cp1250", "koi8-r": "koi8-r"}
_CODECS |= {"cp1251": "cp1251", "applemac": "mac-roman", "latin5": "iso8859-9"}


@dataclass
class Options:
    """What a run of the recipe may choose.

    Args:
        source: Name of the source in every document; empty for the name of the output folder.
        min_chars: Shorter papers are dropped.
        max_paper_bytes: Papers with more bytes of TeX are dropped.
        unit_bytes: Input that becomes one output shard.
    """

    source: str = ""
    min_chars: int = 200
    max_paper_bytes: Count = Count(64_000_000)
    unit_bytes: Count = Count(64_000_000)


def plan(options: Options, inputs: Sequence[Path]) -> Plan:
    """Lay out the archives below `inputs`."""
    return laid_out("arxiv", options, read, find(inputs, _format_of))


def steps(options: Options) -> list[Any]:
    """LaTeX is cleaned while reading; then the least length, and each paper once."""
    return [partial(text.at_least, min_chars=options.min_chars), Exact(same="id")]


def _format_of(name: str) -> str | None:
    suffix = PurePosixPath(name).suffix
    return {".tar": "bulk", ".gz": "paper", ".tex": "paper"}.get(suffix)


def read(options: Options, piece: Piece) -> Iterator[Item]:
    """Papers of one file: of a bulk archive its members, else the one."""
    if piece.format == "paper":
        yield from _paper(options, piece.name, Path(piece.path).read_bytes())
        return
    with tarfile.open(piece.path, "r|") as bulk:
        for member in bulk:
            if not member.isfile():
                continue
            name = f"{piece.name}/{member.name}"
            if member.size > options.max_paper_bytes:
                yield Dropped(name, "too_large", member.size)
            elif file := bulk.extractfile(member):
                yield from _paper(options, name, file.read())


def _paper(options: Options, name: str, data: bytes) -> Iterator[Item]:
    """One submission, whatever it is packed in."""
    size = len(data)
    try:
        files, notes = unpacked(data, options.max_paper_bytes)
    except _TooLarge:
        yield Dropped(name, "too_large", size)
        return
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
        yield Dropped(name, "damaged", size, describe(error))
        return
    if files is None:
        yield Dropped(name, "pdf_only", size)
    elif not any(file.endswith(_TEX[:3]) for file in files):
        yield Dropped(name, "no_tex", size)
    elif (main := latex.find_main(files)) is None:
        yield Dropped(name, "no_main_file", size)
    else:
        paper = latex.clean(files, main)
        yield from (Noted(note) for note in (*notes, *paper.notes))
        id = paper_id(name)
        meta = {"url": f"https://arxiv.org/abs/{id}", "main": main}
        yield Document(f"arxiv:{id}", paper.text, options.source, meta)


def paper_id(name: str) -> str:
    """arXiv's number by the file's name: 2301.00001, or hep-th/9901001 for an old one."""
    stem = re.sub(r"\.(?:tar\.gz|tar|gz|tex)$", "", posixpath.basename(name))
    found = _ID.fullmatch(stem)
    return (found[1] or f"{found[2]}/{found[3]}") if found else stem


class _TooLarge(ValueError):
    pass


def unpacked(data: bytes, limit: int) -> tuple[dict[str, str] | None, list[str]]:
    """(TeX files by their name in the project, notes on their encoding); None for a PDF."""
    if data[:2] == b"\x1f\x8b":
        with gzip.open(io.BytesIO(data)) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise _TooLarge
    if data[:5] == b"%PDF-":
        return None, []
    contents: dict[str, bytes] = {}
    if data[257:262] == b"ustar" or (data[:1] != b"\\" and _is_tar(data)):
        _unpack(data, limit, contents)
        if not contents or all(name.endswith(".pdf") for name in contents):
            return (None if contents else {}), []
    else:
        contents["main.tex"] = data
    files, notes = {}, []
    for name, content in contents.items():
        if name.endswith(_TEX):
            content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            files[name], encoding = _decoded(content)
            if encoding != "utf-8":
                notes.append(f"decoded as {encoding}")
    return files, notes


def _is_tar(data: bytes) -> bool:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:"):
            return True
    except tarfile.TarError:
        return False


def _unpack(data: bytes, limit: int, contents: dict[str, bytes], nested: int | None = None) -> int:
    """Members by normalised name, in memory: no path of an archive ever reaches the disk.

    Returns their bytes; those taken so far are given for an archive that is `nested`.
    """
    total = nested or 0
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            name = posixpath.normpath(member.name)
            if not member.isfile() or not name.endswith((*_TEX, ".pdf", ".tar")):
                continue
            if member.size + total > limit:
                raise _TooLarge
            file = archive.extractfile(member)
            content = file.read() if file and not name.endswith(".pdf") else b""
            if name.endswith(".tar") and nested is None:
                total = _unpack(content, limit, contents, nested=total)
            elif not name.endswith(".tar"):
                contents[name], total = content, total + len(content)
    return total


def _decoded(content: bytes) -> tuple[str, str]:
    """Text of a file; one that is not UTF-8 is believed what it declares."""
    try:
        return content.decode("utf-8-sig"), "utf-8"
    except UnicodeDecodeError:
        declared = _INPUTENC.search(content)
        codec = _CODECS.get(declared[1].decode()) if declared else None
        if codec:
            return content.decode(codec, "replace"), codec
    try:
        return raw.decode(content)
    except raw.Binary:
        return content.decode("latin-1"), "latin-1"
