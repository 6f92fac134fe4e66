"""Records of web archives: WARC, WET and ARC 1.x, plain or gzipped, healthy or not (paper §2.1).

In: a file, told by its first bytes. Out: its records in order. Archives begin a gzip member with
every record, so a damaged member costs that record, and reading goes on at the next magic bytes. A
length that does not lead to the next record is not believed: the record then ends where the next
one begins. No more than one record is held, and none beyond the cap.
"""

import mmap
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MAGIC = b"\x1f\x8b\x08"
# Compressed bytes at a time: what is left of them when a member ends is copied. Plain bytes.
_SIP_BYTES, _CHUNK_BYTES = 1 << 15, 1 << 18
_MAX_HEADER_BYTES = 1 << 16
# The line that begins a record; in ARC it holds address, IP, date, type and length.
_ARC_LINE = rb"([A-Za-z][\w+.-]*:[^\n]{0,8000}) [\d.:a-f]+ (\d{14}) ([^\n]{0,500}?) ?(\d+)\r?\n"
_START = re.compile(rb"(?:WARC/\d\.\d+[ \t\r]{0,9}\n|" + _ARC_LINE + rb")")
_NEXT = re.compile(rb"\n(?=" + _START.pattern + rb")")
_MAX_ARC_LINE = 9000
_BLANK_LINE = re.compile(rb"\n\r{0,2}\n")
_NEWLINES, _TRAILER = re.compile(rb"[\r\n]*"), re.compile(rb"(?:\r?\n){1,2}\Z")
# Damaged members are tried again one byte on; beyond this many times the file, where they stopped.
_MAX_RETRIED = 4


class Record(NamedTuple):
    """`place` is the offset of its gzip member, and its own in there: 1024 or 1024+512; `kind` its
    WARC-Type, response for what ARC has fetched; `problem` damaged or too_large where there is no
    body, length where Content-Length is wrong."""

    place: str
    kind: str
    headers: dict[str, str]
    body: bytes
    problem: str = ""


def records(path: str | Path, max_bytes: int) -> Iterator[Record]:
    """Every record of a file; the body of one of more than `max_bytes` is left out."""
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            begins = _NEXT.search(b"\n" + data[:_MAX_ARC_LINE])
            cutter = _Cutter(max_bytes)
            if data[:2] == _MAGIC[:2] or not begins and data.find(_MAGIC) >= 0:
                yield from _gzipped(data, cutter)
                return
            for at in range(0, len(data), _CHUNK_BYTES):
                yield from cutter.feed(data[at : at + _CHUNK_BYTES])
            yield from cutter.end("cut off")


def headers(block: bytes) -> dict[str, str]:
    """Lines of `Name: value`, by name in lower case; the first of a name counts."""
    found: dict[str, str] = {}
    for line in block.decode("utf-8", "replace").split("\n"):
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip().lower(), value.strip())
    return found


def _gzipped(data: mmap.mmap, cutter: "_Cutter") -> Iterator[Record]:
    at, retried, damaged = 0, 0, False
    # padding between members is passed over
    while (start := data.find(_MAGIC, at)) >= 0:
        if not damaged and data[at:start].strip(b"\0"):
            yield Record(str(at), "", {}, b"", "damaged")
        member, at, first = zlib.decompressobj(wbits=31), start, True
        try:
            while not member.eof:
                sip = data[at : at + _SIP_BYTES]
                if not sip:
                    raise zlib.error("cut off")
                chunk = member.decompress(sip)
                at += len(sip) - len(member.unused_data)
                if not chunk:
                    continue
                # some writers put one record into several members
                if first and (_START.match(chunk) or b"WARC/".startswith(chunk[:5])):
                    yield from cutter.end("")
                    cutter.begin(start)
                    damaged = False
                elif damaged:
                    raise zlib.error("not a member: magic bytes by chance")
                first = False
                yield from cutter.feed(chunk)
        except zlib.error:
            # without a byte of this member, what waits belongs to a healthy one
            yield from cutter.end("" if first else "damaged")
            if not damaged and first:
                yield Record(str(start), "", {}, b"", "damaged")
            damaged, retried = True, retried + at - start
            at = start + 1 if retried < _MAX_RETRIED * len(data) else max(at, start + 1)
    yield from cutter.end("")


class _Cutter:
    """Cuts bytes that arrive in chunks into records."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.begin(0)

    def begin(self, origin: int) -> None:
        """What follows begins a record."""
        self.data = bytearray()
        # where the data lies: a member, and the place in what it holds
        self.origin, self.at = origin, 0
        # bytes without which nothing more can be told
        self.need, self.skipping = 0, False

    def feed(self, chunk: bytes) -> Iterator[Record]:
        """Records that are complete and followed by another one."""
        self.data += chunk
        while len(self.data) >= self.need and (record := self._next(None)):
            yield record

    def end(self, how: str) -> Iterator[Record]:
        """The others: no more bytes follow, because of damage, or a cut that may be one, or not."""
        while record := self._next(how):
            yield record
        self.begin(0)

    def _next(self, end: str | None) -> Record | None:
        """The next record, or None when there is none before more bytes come."""
        data = self.data
        if self.skipping:
            self._skip(end is not None)
        self._drop(_newlines(data, 0))
        if self.skipping or not data:
            return None
        start = _START.match(data)
        if start and start[1]:
            kind = "response" if start[1].startswith(b"http") else "arc"
            return self._cut(kind, _arc_headers(start), start.end(), end)
        if start and (blank := _BLANK_LINE.search(data, 0, _MAX_HEADER_BYTES)):
            found = headers(bytes(data[start.end() : blank.start()]))
            return self._cut(found.get("warc-type", "").lower(), found, blank.end(), end)
        if end is None and len(data) < (_MAX_HEADER_BYTES if start else _MAX_ARC_LINE):
            self.need = len(data) + 1
            return None
        return self._record("", {}, "damaged")

    def _cut(self, kind: str, found: dict[str, str], body: int, end: str | None) -> Record | None:
        """The record whose body begins at `body`."""
        data, length = self.data, found.get("content-length", "")
        stop = body + int(length) if length.isdecimal() and len(length) < 20 else -1
        behind = _newlines(data, stop) if body <= stop < len(data) else len(data)
        is_followed = _START.match(data, behind)
        if stop - body > self.max_bytes:
            return self._record(kind, found, "too_large")
        if end is None and len(data) < stop + _MAX_ARC_LINE and not is_followed:
            self.need = stop + 16
            return None
        if is_followed or end is not None and body <= stop <= len(data) == behind:
            is_damaged = end == "damaged" and not is_followed
            return self._record(kind, found, "damaged" if is_damaged else "", body, stop)
        if following := _NEXT.search(data, body):
            return self._record(kind, found, "length", body, following.end())
        if len(data) - body > self.max_bytes:
            return self._record(kind, found, "too_large")
        if end is None:
            self.need = 2 * len(data)
            return None
        is_damaged = end == "damaged" or end == "cut off" and len(data) < stop
        return self._record(kind, found, "damaged" if is_damaged else "length", body, len(data))

    def _record(
        self, kind: str, found: dict[str, str], problem: str, body: int = 0, stop: int = 0
    ) -> Record:
        """The record up to `stop`, which leaves the data; without one, up to the next record."""
        content = b"" if problem == "damaged" else bytes(memoryview(self.data)[body:stop])
        content = _TRAILER.sub(b"", content) if problem == "length" else content
        place = f"{self.origin}+{self.at}" if self.at else str(self.origin)
        self.skipping = not stop
        self._drop(stop)
        return Record(place, kind, found, content, problem)

    def _skip(self, is_end: bool) -> None:
        """Go to the next record, or as far as there is none."""
        following = _NEXT.search(self.data)
        self.skipping = following is None
        kept = 0 if is_end else _MAX_ARC_LINE
        self._drop(following.end() if following else max(0, len(self.data) - kept))
        self.need = 0 if following else len(self.data) + _CHUNK_BYTES

    def _drop(self, size: int) -> None:
        """Bytes that nothing needs any more."""
        if size:
            self.at, self.need = self.at + size, 0
            del self.data[:size]


def _newlines(data: bytearray, at: int) -> int:
    """Where the line ends at `at` end."""
    match = _NEWLINES.match(data, at)
    return match.end() if match else at


def _arc_headers(line: re.Match[bytes]) -> dict[str, str]:
    """What the line of an ARC record says, under the names of WARC."""
    address, date, mime, length = (part.decode("utf-8", "replace") for part in line.groups())
    date = f"{date[:4]}-{date[4:6]}-{date[6:8]}T{date[8:10]}:{date[10:12]}:{date[12:]}Z"
    names = ("warc-target-uri", "warc-date", "content-type", "content-length")
    return dict(zip(names, (address, date, mime, length), strict=True))
