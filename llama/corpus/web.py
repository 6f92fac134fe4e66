"""What a web server has sent, as text: status, transfer and content coding, character set.

In: the body of a response record, status line and headers before the payload. Out: the payload
without its codings, and its characters. Nothing that the headers claim is believed before the
bytes agree.
"""

import codecs
import re
import zlib
from contextlib import suppress

import brotli
from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

from llama.corpus import raw, warc

_STATUS = re.compile(rb"HTTP/\S+ +(\d{3})\b[^\n]*\r?\n")
_HEADER_END = re.compile(rb"\n\r{0,2}\n")
_CHUNK_SIZE = re.compile(rb"(?:\r?\n)?([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\n]{0,200})?\r?\n")
_HTML_TYPES = ("text/html", "application/xhtml+xml", "application/xhtml")
_HTML = re.compile(rb"<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_META = re.compile(
    rb"""<(?:meta\b[^>]{0,500}?\bcharset|\?xml\b[^>]{0,100}?\bencoding)\s*=\s*["']?\s*([\w.:-]+)""",
    re.IGNORECASE,
)
# Where browsers look for a name of the character set, and where HTML begins.
_HEAD_BYTES = 4096
# Of so many characters beyond ASCII one may be damaged in what is taken for UTF-8.
_DAMAGED = 10


class Refused(ValueError):
    """The response holds no page that can be read; the message is the drop reason."""


def payload(response: bytes, max_bytes: int, found_type: str = "") -> tuple[bytes, str, list[str]]:
    """(HTML, character set that the headers name, what was odd) of a response with status 200.

    `found_type` is the media type that the crawler has found, whatever the server says.
    Raises `Refused`: http (no status line), http_status, not_html, content_encoding, too_large.
    """
    status = _STATUS.match(response)
    if not status:
        raise Refused("http")
    if status[1] != b"200":
        raise Refused("http_status")
    end = _HEADER_END.search(response, status.end() - 2)
    headers = warc.headers(response[status.end() : end.start()] if end else b"")
    content, odd = response[end.end() if end else status.end() :], []
    if "chunked" in headers.get("transfer-encoding", "").lower():
        content, is_whole = _dechunked(content)
        odd += [] if is_whole else ["transfer encoding is not as said"]
    codings = headers.get("content-encoding", "").lower()
    if not codings and content.startswith(b"\x1f\x8b\x08"):
        codings = "gzip"
    for coding in reversed(codings.split(",")):
        content, is_whole = _decoded(content, coding.strip(), max_bytes)
        odd += [] if is_whole else ["content encoding is not as said"]
    if len(content) > max_bytes:
        raise Refused("too_large")
    kind = headers.get("content-type", "")
    media_type = re.split("[;,]", found_type or kind)[0].strip().lower()
    if media_type not in _HTML_TYPES and (media_type or not _HTML.search(content, 0, _HEAD_BYTES)):
        raise Refused("not_html")
    charset = _CHARSET.search(kind)
    return content, charset[1] if charset else "", odd


def _dechunked(data: bytes) -> tuple[bytes, bool]:
    """The chunks of a body put together; as it is where the header lies and there are none."""
    parts, at = [], 0
    while (size := _CHUNK_SIZE.match(data, at)) and (length := int(size[1], 16)):
        parts.append(data[size.end() : size.end() + length])
        at = size.end() + length
    return (b"".join(parts) or (b"" if size else data)), bool(size)


def _decoded(data: bytes, coding: str, max_bytes: int) -> tuple[bytes, bool]:
    """The bytes without a coding, as far as they go; as they are where the header lies."""
    if coding in ("", "identity", "none", "utf-8"):
        return data, True
    if coding == "br":
        try:
            unpacker = brotli.Decompressor()
            found = unpacker.process(data, output_buffer_limit=max_bytes + 1)
        except brotli.error:
            return data, False
        return found, unpacker.is_finished() or len(found) > max_bytes
    if coding not in ("gzip", "x-gzip", "deflate"):
        if _HTML.search(data, 0, _HEAD_BYTES):
            return data, False
        raise Refused("content_encoding")
    # zlib's or gzip's header, or with deflate often none
    for bits in (47, -15) if coding == "deflate" else (47,):
        parts, at, stream = [], 0, zlib.decompressobj(bits)
        try:
            while at < len(data) and not stream.eof and max_bytes >= 0:
                parts.append(stream.decompress(data[at : at + raw.CHUNK_BYTES], max_bytes + 1))
                max_bytes -= len(parts[-1])
                at += raw.CHUNK_BYTES
            if max_bytes < 0:
                raise Refused("too_large")
            return b"".join(parts), stream.eof
        except zlib.error:
            if any(parts):
                return b"".join(parts), False
    return data, False


def decode(data: bytes, charset: str = "") -> tuple[str, str]:
    """(text, how its character set was found: mark, utf-8, declared, detected or replaced).

    UTF-8 needs no name, no other text is valid in it; what it is not, the headers, the page, and
    last its letters tell. Raises `raw.Binary`.
    """
    for mark, name in raw.BOMS:
        if data.startswith(mark):
            return data.decode(name, "replace"), "mark"
    meta = _META.search(data, 0, _HEAD_BYTES)
    declared = _codec(charset) or _codec(meta[1].decode() if meta else "")
    if declared.startswith(("utf-16", "iso2022")):
        # the one's markup is half NULs, the other switches with escapes
        if (b"\0" if declared.startswith("utf") else b"\x1b") in data[:_HEAD_BYTES]:
            return data.decode(declared, "replace"), "declared"
        declared = ""
    with suppress(UnicodeDecodeError):
        return data.decode(), "utf-8"
    if text := raw.mostly_utf8(data, _DAMAGED):
        return text, "replaced"
    for how, name in (("declared", declared), ("detected", _codec(detect_encoding(data) or ""))):
        with suppress(UnicodeDecodeError):
            if name and not name.startswith("utf-16"):
                return data.decode(name), how
    return data.decode(declared or "windows-1252", "replace"), "replaced"


def _codec(name: str) -> str:
    """The codec that browsers take for a name, or nothing; Python has codecs that are no text."""
    found = map_encoding_to_html5(name.lower(), fallback_utf8=False) if name else None
    try:
        return codecs.lookup(found).name if found else ""
    except LookupError:
        return ""
