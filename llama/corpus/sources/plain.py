"""Recipe `plain`: a user's own text as it is, one document per file, line, row or archive member.

In: .txt .md .rst and source code, one document a file, bare, .gz, .zst or inside a .zip; .jsonl
and .json with one object a line [.gz | .zst]; .parquet; Stack Exchange's Posts.xml. Out: documents
with line ends made LF, without those that hold no text. Ids are the file's name below the input,
behind it the line, row or member. Nothing is ever unpacked to disk.

Drop reasons: `empty`, `short`, `binary`, `too_large`, `suffix` (of a member), `hidden` (member),
`not_json_lines` (a .json file that is no data). Quarantined: `json`, `no_text`, `encoding`, `xml`,
`member`, `damaged` (the rest of an input that cannot be read on).
"""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from llama.cli import CORPUS_EXTRA, UserError, needed
from llama.config import Count
from llama.corpus import raw
from llama.corpus.document import Document, Dropped, Item, Noted, Step, describe
from llama.corpus.plan import Piece, Plan, find, laid_out
from llama.corpus.sources import stackexchange
from llama.corpus.steps import code, text

_KINDS: dict[str, str | None] = {".txt": "txt", ".text": "txt", ".md": "md", ".rst": "rst"}
_KINDS |= {".markdown": "md", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
_KINDS |= {".parquet": "parquet", ".zip": "zip", ".xml": None}
_WHOLE_FILES = ("code", "txt", "md", "rst")
_PARQUET_ROWS = 256


@dataclass
class Options:
    """What a run of the recipe may choose.

    Args:
        source: Name of the source in every document; empty for the name of the output folder.
        text_key: Field or column that holds the text.
        encoding: Of files without a byte order mark: auto, or a codec such as shift_jis.
        min_chars: Shorter documents are dropped.
        max_document_bytes: Longer documents are dropped, and never held in memory.
        unit_bytes: Input that becomes one output shard.
    """

    source: str = ""
    text_key: str = "text"
    encoding: str = "auto"
    min_chars: int = 1
    max_document_bytes: Count = Count(64_000_000)
    unit_bytes: Count = Count(32_000_000)


def plan(options: Options, inputs: Sequence[Path]) -> Plan:
    """Lay out the files below `inputs`."""
    if options.encoding != "auto":
        try:
            "".encode(options.encoding)
        except LookupError:
            raise UserError(f"encoding is {options.encoding!r}, which is no known codec") from None
    pieces, left_out = find(inputs, format_of)
    if any(piece.format == "parquet" for piece in pieces):
        needed("pyarrow.parquet", "reading .parquet", CORPUS_EXTRA)
    return laid_out("plain", options, read, (pieces, left_out), cut=("jsonl", "posts"))


def steps(options: Options) -> list[Step]:
    """Line ends, then the least length."""
    return [text.unix_line_ends, partial(text.at_least, min_chars=options.min_chars)]


def format_of(name: str) -> str | None:
    """The format of a file by its name, as in jsonl or txt.gz, or None for one that is not read."""
    path = PurePosixPath(name)
    packing = path.suffix if path.suffix in raw.COMPRESSED else ""
    path = path.with_suffix("") if packing else path
    kind = _KINDS.get(path.suffix.lower(), "code" if code.language(path.name) else None)
    kind = "posts" if path.name == "Posts.xml" else kind
    return None if packing and kind in ("parquet", "zip") else kind and kind + packing


def read(options: Options, piece: Piece) -> Iterator[Item]:
    """Documents of one piece of input."""
    readers = {"jsonl": _lines, "json": _lines, "posts": _lines, "parquet": _parquet, "zip": _zip}
    yield from readers.get(piece.format.partition(".")[0], _file)(options, piece)


def _file(options: Options, piece: Piece) -> Iterator[Item]:
    data = raw.whole(raw.chunks(piece.path), options.max_document_bytes)
    yield from _whole(options, piece.name, data, piece.size)


def _whole(options: Options, id: str, data: bytes | None, size: int) -> Iterator[Item]:
    """One document from all the bytes of a file or member; None stands for too many."""
    if data is None:
        yield Dropped(id, "too_large", size)
        return
    try:
        content, encoding = raw.decode(data, options.encoding)
    except raw.Binary:
        yield Dropped(id, "binary", size)
    except UnicodeDecodeError as error:
        yield Dropped(id, "encoding", size, str(error))
    else:
        if encoding != "utf-8":
            yield Noted(f"decoded as {encoding}")
        yield Document(id, content, options.source, {})


def _lines(options: Options, piece: Piece) -> Iterator[Item]:
    """Documents of a piece of a file of lines."""
    chunks = raw.chunks(piece.path, piece.begin, piece.size)
    lines = raw.lines(chunks, options.max_document_bytes)
    for number, (line, size) in enumerate(lines, piece.first_line):
        id = f"{piece.name}:{number}"
        if line is None:
            yield Dropped(id, "too_large", size)
        elif piece.format.startswith("posts"):
            yield from _posts(options, id, line)
        else:
            item = _json_document(options, id, line)
            # a source tree holds .json files that are settings, and no data at all
            if number == 1 and piece.format == "json" and not isinstance(item, Document):
                yield Dropped(piece.name, "not_json_lines", piece.size)
                return
            yield item


def _posts(options: Options, id: str, line: bytes) -> Iterator[Item]:
    """A document per post; the recipe stackexchange joins questions with their answers."""
    rows = stackexchange.Rows(id, options.max_document_bytes)
    for i, row in enumerate([*rows.feed(line), *rows.end()]):
        place = f"{id}.{i}" if i else id
        if isinstance(row, Dropped):
            yield row._replace(id=place)
        else:
            meta: dict[str, Any] = {k: row[k] for k in ("Id", "PostTypeId") if k in row}
            body = stackexchange.strip_tags(row.get("Body", "")).strip()
            yield Document(place, body, options.source, meta)


def _json_document(options: Options, id: str, line: bytes) -> Item:
    if not line.strip():
        return Dropped(id, "empty", len(line))
    try:
        try:
            record = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except orjson.JSONDecodeError:
            record = orjson.loads(raw.decode(line, options.encoding)[0])
    except ValueError as error:
        return Dropped(id, "json", len(line), f"not a JSON object on one line: {error}")
    if not isinstance(record, dict):
        return Dropped(id, "json", len(line), f"a JSON {type(record).__name__}, not an object")
    content = record.pop(options.text_key, None)
    if not isinstance(content, str):
        return Dropped(id, "no_text", len(line), f"no text under the key {options.text_key!r}")
    return Document(id, content, options.source, record)


def _parquet(options: Options, piece: Piece) -> Iterator[Item]:
    # imported here: an extra, and nobody else should wait for it
    import pyarrow
    from pyarrow import parquet

    file: Any = parquet.ParquetFile(piece.path, page_checksum_verification=True)
    names = file.schema_arrow.names
    if options.text_key not in names:
        raise ValueError(f"no column {options.text_key!r} among {', '.join(names)}")
    row = 0
    for batch in file.iter_batches(_PARQUET_ROWS, columns=[options.text_key]):
        # as bytes, so that one value that is not UTF-8 costs that value
        for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
            row += 1
            id = f"{piece.name}:{row}"
            if value is None:
                yield Dropped(id, "no_text", 0, f"null in the column {options.text_key!r}")
            else:
                too_large = len(value) > options.max_document_bytes
                yield from _whole(options, id, None if too_large else value, len(value))
    # damage to the list of row groups shortens it
    if row != file.metadata.num_rows:
        raise ValueError(f"{row} rows of {file.metadata.num_rows}")
    if not row:
        yield Dropped(piece.name, "empty", piece.size)


def _zip(options: Options, piece: Piece) -> Iterator[Item]:
    budget = raw.budget_of(piece.size)
    with zipfile.ZipFile(piece.path) as archive:
        for member in archive.infolist():
            name = member.filename
            id = f"{piece.name}/{name.encode('utf-8', 'backslashreplace').decode()}"
            if member.is_dir():
                continue
            if any(map(_hidden, PurePosixPath(name).parts)):
                yield Dropped(id, "hidden", member.file_size)
            elif format_of(name) not in _WHOLE_FILES:
                yield Dropped(id, "suffix", member.file_size)
            else:
                budget.spend(member.file_size)
                yield from _member(options, archive, member, id)


def _hidden(part: str) -> bool:
    """What macOS packs beside the files, and dot files; dots alone are only an odd name."""
    return part == "__MACOSX" or (part.startswith(".") and part.strip(".") != "")


def _member(
    options: Options, archive: zipfile.ZipFile, member: zipfile.ZipInfo, id: str
) -> Iterator[Item]:
    try:
        with archive.open(member) as file:
            # zipfile never gives more than the size it was told, and checks the sum at the end
            chunks = iter(partial(file.read, raw.CHUNK_BYTES), b"")
            data = raw.whole(chunks, options.max_document_bytes)
    except Exception as error:
        # encrypted, damaged, packed in an unknown way: it costs this member
        yield Dropped(id, "member", member.file_size, describe(error))
        return
    yield from _whole(options, id, data, member.file_size)
