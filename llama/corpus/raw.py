"""Reading what others wrote, with bounds: bytes of plain, .gz and .zst files, lines, text.

Nothing here trusts its input. A compressed file may claim to be 30,000 times its size, a line may
be as long as the file, and the encoding is anyone's guess; so everything is streamed, capped and
counted. `llama.files` reads what the project itself has written.
"""

import codecs
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
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


class Budget:
    """So many bytes may come out of a compressed file; more is taken for a bomb."""

    def __init__(self, n_bytes: int) -> None:
        self.left = n_bytes

    def spend(self, n_bytes: int) -> None:
        """Count what was unpacked, or will be; raises ValueError when that is too much."""
        self.left -= n_bytes
        if self.left < 0:
            raise ValueError(f"expands more than {MAX_RATIO} times: taken for a bomb")


def budget_of(size: int) -> Budget:
    """What a compressed file of this size may become."""
    return Budget(max(RATIO_FLOOR_BYTES, MAX_RATIO * size))


def chunks(path: str | Path, begin: int = 0, size: int | None = None) -> Iterator[bytes]:
    """Bytes of a file, decompressed by its suffix; a range only of a file that is not compressed.

    Raises EOFError for a frame that does not end, ValueError for a file that expands without end.
    """
    with open(path, "rb") as file:
        if Path(path).suffix in COMPRESSED:
            budget = budget_of(os.fstat(file.fileno()).st_size)
            found = bytearray()
            try:
                for chunk in files.inflated(file, Path(path).suffix, SIP_BYTES):
                    budget.spend(len(chunk))
                    found += chunk
                    # readers copy what they wait with for every chunk that comes
                    if len(found) >= CHUNK_BYTES:
                        yield bytes(found)
                        found.clear()
            except Exception:
                if found:
                    yield bytes(found)
                raise
            if found:
                yield bytes(found)
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


def mostly_utf8(data: bytes, share: int) -> str:
    """Text in UTF-8 with damaged bytes, which become U+FFFD; nothing where of the characters that
    are not ASCII one in `share` is damaged, or more. Raises `Binary` for many control characters.
    """
    if is_binary(data):
        raise Binary("more than 1 % control characters")
    text = data.decode("utf-8", "replace")
    beyond_ascii = len(text) - len(text.encode("ascii", "ignore"))
    return text if beyond_ascii > share * text.count("\ufffd") else ""


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
    with suppress(UnicodeDecodeError):
        return data.decode(), "utf-8"
    if text := mostly_utf8(data, 2):
        return text, "utf-8 with damaged bytes"
    try:
        return data.decode("windows-1252"), "windows-1252"
    except UnicodeDecodeError:
        return data.decode("latin-1"), "latin-1"
