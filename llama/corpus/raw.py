"""Reading what others wrote, with bounds: bytes of plain, .gz and .zst files, lines, text.

Nothing here trusts its input. A compressed file may claim to be 30,000 times its size, a line may
be as long as the file, and the encoding is anyone's guess; so everything is streamed, capped and
counted. `llama.files` reads what the project itself has written.
"""

import codecs
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama import files

CHUNK_BYTES = 1 << 20
# Compressed bytes given to a decompressor at once: a zstd block may grow 32,749 times.
SIP_BYTES = 1 << 10
# Text compresses 2 to 10 times, much-repeated text rarely 100 times; below the floor nobody cares.
MAX_RATIO = 200
RATIO_FLOOR_BYTES = 1 << 28
COMPRESSED = (".gz", ".zst")

BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Control characters that no text holds; tab, line ends, form feed and DOS's end of file it may.
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1a"))


class Binary(ValueError):
    """The bytes are no text."""


def expansion_limit(size: int) -> int:
    """Most bytes that a compressed file of this size may become."""
    return max(RATIO_FLOOR_BYTES, MAX_RATIO * size)


def chunks(path: str | Path, begin: int = 0, size: int | None = None) -> Iterator[bytes]:
    """Bytes of a file, decompressed by its suffix; a range only of a file that is not compressed.

    Raises EOFError for a frame that does not end, ValueError for a file that expands without end.
    """
    with open(path, "rb") as file:
        if Path(path).suffix in COMPRESSED:
            limit = expansion_limit(os.fstat(file.fileno()).st_size)
            found, damage = bytearray(), None
            try:
                for chunk in files.inflated(file, Path(path).suffix, SIP_BYTES):
                    limit -= len(chunk)
                    if limit < 0:
                        raise ValueError(f"expands more than {MAX_RATIO} times: taken for a bomb")
                    found += chunk
                    # readers copy what they wait with for every chunk that comes
                    if len(found) >= CHUNK_BYTES:
                        yield bytes(found)
                        found.clear()
            except Exception as error:
                damage = error
            if found:
                yield bytes(found)
            if damage:
                raise damage
            return
        file.seek(begin)
        left = os.fstat(file.fileno()).st_size - begin if size is None else size
        while left > 0 and (chunk := file.read(min(CHUNK_BYTES, left))):
            left -= len(chunk)
            yield chunk


def lines(source: Iterable[bytes], max_bytes: int) -> Iterator[tuple[bytes | None, int]]:
    """(line without its newline, its bytes); a line beyond `max_bytes` is None, and never held."""
    parts: list[bytes] = []
    size = 0
    for chunk in source:
        for i, part in enumerate(chunk.split(b"\n")):
            if i:
                yield (b"".join(parts) if size <= max_bytes else None), size
                parts, size = [], 0
            size += len(part)
            if size <= max_bytes:
                parts.append(part)
            else:
                parts = []
    if size:
        yield (b"".join(parts) if size <= max_bytes else None), size


def whole(source: Iterable[bytes], max_bytes: int) -> bytes | None:
    """All the bytes, or None when there are more than `max_bytes`."""
    parts: list[bytes] = []
    left = max_bytes
    for chunk in source:
        left -= len(chunk)
        if left < 0:
            return None
        parts.append(chunk)
    return b"".join(parts)


def is_binary(data: bytes) -> bool:
    """Whether more than 1 % of the bytes are control characters that text does not have."""
    return (len(data) - len(data.translate(None, _CONTROLS))) * 100 > len(data)


def decode(data: bytes, encoding: str = "auto") -> tuple[str, str]:
    """(text, what it was decoded as). A byte order mark is believed, then `encoding`.

    "auto" is UTF-8; UTF-8 with damaged bytes, which become U+FFFD, where most of what is not ASCII
    is valid; else windows-1252, and latin-1 where that has no character. Raises `Binary` for NULs
    or many control characters, UnicodeDecodeError for bytes that are not in the encoding that was
    named.
    """
    for mark, name in BOMS:
        if data.startswith(mark):
            return data.decode(name), name.removesuffix("-sig")
    if b"\0" in data:
        raise Binary("NUL bytes")
    if encoding != "auto":
        return data.decode(encoding), codecs.lookup(encoding).name
    try:
        return data.decode(), "utf-8"
    except UnicodeDecodeError:
        pass
    if is_binary(data):
        raise Binary("more than 1 % control characters")
    text = data.decode("utf-8", "replace")
    damaged = text.count("\ufffd")
    if len(text) - len(text.encode("ascii", "ignore")) > 2 * damaged:
        return text, "utf-8 with damaged bytes"
    try:
        return data.decode("windows-1252"), "windows-1252"
    except UnicodeDecodeError:
        return data.decode("latin-1"), "latin-1"
