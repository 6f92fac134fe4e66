"""Recipe `wikipedia`: articles of MediaWiki's XML dumps as plain text (paper §2.1).

In: pages-articles .xml [.bz2 | .gz | .zst] of the `languages`. Out: a document per article, its
title and its text, in `meta` its title, language, address and the external addresses it refers to
(the positives of the reference classifier). Multistream dumps are cut into units, other files are
a unit each; of an article that is in several dumps the first one's stays.

Drop reasons: `redirect`, `namespace` (talk, templates, ...), `empty`, `short`, `id_duplicate`.
Quarantined: `xml` (a page cut off), `damaged` (the rest of a stream).
"""

import bz2
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from llama.cli import expect
from llama.config import Count
from llama.corpus import raw
from llama.corpus.document import Document, Dropped, Item, Noted
from llama.corpus.plan import LeftOut, Piece, Plan, find, laid_out
from llama.corpus.steps import text, wikitext
from llama.corpus.steps.exact import Exact

LANGUAGES = "bg ca cs da de en es fr hr hu it nl pl pt ro ru sl sr sv uk".split()
_NAME = re.compile(r"\.xml(-p\d+p\d+[\w-]*)?(\.bz2|\.gz|\.zst)?$")
_STREAM = re.compile(rb"BZh[1-9]1AY&SY")
_MAX_PAGE_BYTES = 64_000_000
# Compressed bytes at a time: what is left of them when a stream ends is copied.
_SIP_BYTES = 1 << 18
_FILE_SPACE, _CATEGORY_SPACE = "6", "14"


@dataclass
class Options:
    """What a run of the recipe may choose.

    Args:
        source: Name of the source in every document; empty for the name of the output folder.
        languages: Of which Wikipedias; dumps of others are left out.
        references: Keep the external addresses of an article in its meta.
        min_chars: Shorter articles are dropped.
        unit_bytes: Bytes of a multistream dump that become one output shard.
    """

    source: str = ""
    languages: list[str] = field(default_factory=lambda: list(LANGUAGES))
    references: bool = True
    min_chars: int = 200
    unit_bytes: Count = Count(256_000_000)


class Site(NamedTuple):
    """What the head of a dump says of its wiki."""

    language: str
    file_space: str
    category_space: str


def plan(options: Options, inputs: Sequence[Path]) -> Plan:
    """Dumps of the languages, each read as far as its head."""
    expect(options.languages, "languages is empty", "codes such as en")
    pieces, left_out = find(inputs, _format_of)
    kept = []
    for piece in pieces:
        language = _site(piece.path, piece.name).language
        if language in options.languages:
            kept += _cut(piece, options.unit_bytes)
        else:
            left_out.append(LeftOut(piece.name, f"language {language or 'unknown'}", piece.size))
    return laid_out("wikipedia", options, read, (kept, left_out))


def steps(options: Options) -> list[Any]:
    """Wikitext becomes text while reading; then the least length, and each article once."""
    return [partial(text.at_least, min_chars=options.min_chars), Exact(same="id")]


def _format_of(name: str) -> str | None:
    match = _NAME.search(name)
    return "xml" + (match[2] or "") if match else None


def _cut(piece: Piece, unit_bytes: int) -> list[Piece]:
    """A multistream dump in pieces; whole pages lie in every stream of it."""
    if "multistream" not in piece.name or piece.format != "xml.bz2":
        return [piece]
    starts = range(0, piece.size, unit_bytes)
    return [piece._replace(begin=i, size=min(unit_bytes, piece.size - i)) for i in starts]


def _chunks(path: str, format: str, begin: int = 0, size: int | None = None) -> Iterator[bytes]:
    """Bytes of a dump; of .bz2 the streams that begin within the range."""
    if format != "xml.bz2":
        yield from raw.chunks(path)
        return
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        budget, at, end = raw.budget_of(total), begin, total if size is None else begin + size
        while sip := os.pread(file.fileno(), _SIP_BYTES, at):
            if not (match := _STREAM.search(sip)):
                # it may hold the first bytes of what is looked for
                at += max(1, len(sip) - 9)
                continue
            at, stream = at + match.start(), bz2.BZ2Decompressor()
            if at >= end:
                return
            while not stream.eof:
                sip = os.pread(file.fileno(), _SIP_BYTES, at) if stream.needs_input else b""
                if not sip and stream.needs_input:
                    raise EOFError(f"the last stream is cut off at byte {at}")
                at += len(sip)
                if chunk := stream.decompress(sip, raw.CHUNK_BYTES):
                    budget.spend(len(chunk))
                    yield chunk
            at -= len(stream.unused_data)


@lru_cache
def _site(path: str, name: str) -> Site:
    """From the file's name, as in dewiki-latest-pages-articles.xml.bz2, and the dump's head."""
    head = b""
    # told when the pages are read
    with suppress(OSError, EOFError, ValueError):
        for chunk in _chunks(path, _format_of(name) or "xml"):
            head += chunk
            if b"</siteinfo>" in head or len(head) > 1 << 20:
                break
    content = head.partition(b"</siteinfo>")[0].decode("utf-8", "replace")
    spaces = dict(re.findall(r'<namespace key="(-?\d+)"[^<>]*>([^<]*)</', content))
    # an export of another wiki's pages may carry the head of the one that made it
    named = re.match(r"([a-z_]+?)wiki\b", Path(path).name)
    wiki = named or re.search(r"<dbname>(\w+?)wiki<", content)
    return Site(
        wiki[1].replace("_", "-") if wiki else "",
        spaces.get(_FILE_SPACE, "file").lower(),
        spaces.get(_CATEGORY_SPACE, "category").lower(),
    )


def read(options: Options, piece: Piece) -> Iterator[Item]:
    """Articles of one dump, or of a piece of it."""
    site = _site(piece.path, piece.name)
    chunks = _chunks(piece.path, piece.format, piece.begin, piece.size)
    for number, page in enumerate(pages(chunks), 1):
        if isinstance(page, str):
            yield from _article(page, site, options, piece.name)
        else:
            yield page._replace(id=f"{piece.name}:{piece.begin}:{page.id or number}")


def pages(chunks: Iterator[bytes]) -> Iterator[str | Dropped]:
    """The XML within each <page>; no parser, so that a damaged page costs itself alone."""
    data = b""
    error: Exception | None = None
    while True:
        try:
            chunk = next(chunks, b"")
        except (OSError, EOFError, ValueError) as problem:
            # what came before the damage is kept
            error, chunk = problem, b""
        behind, *parts = (data + chunk).split(b"<page>")
        # it may be the beginning of a page's tag
        data = behind[-5:]
        for i, part in enumerate(parts, 1):
            page, end, behind = part.partition(b"</page>")
            data = behind[-5:]
            if end:
                yield (b"<page>" + page).decode("utf-8", "replace")
            elif i < len(parts) or not chunk or len(part) > _MAX_PAGE_BYTES:
                yield Dropped("", "xml", len(part) + 6, "a page without an end")
            else:
                data = b"<page>" + part
        if not chunk:
            if error:
                yield Dropped("end", "damaged", 0, f"not read to its end: {error}")
            return


def _article(page: str, site: Site, options: Options, name: str) -> Iterator[Item]:
    """One page as a document, or why it is none."""
    head = page.partition("<revision>")[0]
    values = dict(re.findall(r"<(title|ns|id)>([^<]*)</", head))
    id, title = values.get("id", ""), text.unescape(values.get("title", ""))
    size = len(page)
    place = f"{site.language}wiki:{id}"
    if not id or not title:
        yield Dropped(f"{name}:{title or id}", "xml", size, "a page without title or id")
    elif "ns" in values and values["ns"] != "0" or _elsewhere(values, title, site):
        yield Dropped(place, "namespace", size)
    elif "<redirect" in head:
        yield Dropped(place, "redirect", size)
    else:
        # the last one, where a dump holds the history
        content = page.rpartition("<revision>")[2].partition("<text")[2].partition(">")[2]
        source = text.unescape(content.partition("</text>")[0])
        if re.match(r"\s*#[^\W\d]++\s*+:?\s*\[\[", source):
            yield Dropped(place, "redirect", size)
            return
        if "\ufffd" in source:
            yield Noted("bytes that are not UTF-8")
        body = wikitext.plain_text(source, [site.file_space], [site.category_space])
        meta: dict[str, Any] = {
            "title": title,
            "language": site.language,
            "url": f"https://{site.language}.wikipedia.org/wiki/{title.replace(' ', '_')}",
        }
        if options.references:
            meta["references"] = wikitext.references(source)
        content = f"{title}\n\n{body}" if body else ""
        yield Document(place, content, options.source, meta)


def _elsewhere(values: dict[str, str], title: str, site: Site) -> bool:
    """Dumps before 2010 have no <ns>: a prefix of the title tells files and categories."""
    prefix, colon, _ = title.partition(":")
    known = "template", "wikipedia", "help", "portal", "mediawiki", *site[1:]
    return "ns" not in values and bool(colon) and prefix.lower() in known
