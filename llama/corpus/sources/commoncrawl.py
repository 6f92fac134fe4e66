"""Recipe `commoncrawl`: web pages of a crawl, after CCNet (paper §2.1).

In: WARC and ARC files (preset improved), or WET (preset llama1), .gz or plain. Out: a document per
page, its id the file's name and the record's place, in `meta` its url, date, title, language and
how sure that is. The presets, as `steps` reads:

    llama1      text as Common Crawl has extracted it; within a group of shards every copy of a
                repeated line goes
    improved    main content of the HTML; of a line that is repeated anywhere one copy stays

With `models` pages are graded at the end as the recipe quality does it.

Drop reasons: `too_large`, `http`, `http_status`, `not_html`, `binary`, `content_encoding`, those of
steps/html.py, `empty`, `short`, those of steps/lines.py, steps/language.py and quality.py.
Quarantined: `damaged`. Records of other types are noted, and how a page's character set was found.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from llama.cli import CORPUS_EXTRA, expect, needed
from llama.config import Count
from llama.corpus import raw, warc
from llama.corpus.document import Document, Dropped, Item, Noted
from llama.corpus.plan import LeftOut, Piece, Plan, find, group
from llama.corpus.sources import quality
from llama.corpus.steps import language, text
from llama.corpus.steps.lines import Lines
from llama.corpus.steps.references import THRESHOLD

_SUFFIXES = {".warc": "warc", ".arc": "warc", ".wet": "wet"}
_READS = {"llama1": "wet", "improved": "warc"}
_HTML_MEMORY_BYTES = 1 << 30


@dataclass
class Options:
    """What a run of the recipe may choose.

    Args:
        source: Name of the source in every document; empty for the name of the output folder.
        preset: llama1 or improved, see above.
        languages: Codes of those that stay; an empty list keeps all.
        min_language_score: Documents whose language is less sure are dropped.
        language_model: Path of a language.npz of train_models or of a fastText model, such as
            lid.176.bin; empty for py3langid.
        group_shards: Shards among which llama1 looks for repeated lines.
        models: Folder of models that grade pages; empty for none.
        buckets: With models: those that stay; an empty list keeps all.
        min_reference_score: With models: pages with less are dropped; 0 does without.
        min_chars: Shorter pages are dropped.
        html_deadline_s: Seconds of the processor that extracting a page may take.
        max_page_bytes: Larger pages are dropped, and never held in memory.
        unit_bytes: Input that becomes one output shard.
    """

    source: str = ""
    preset: Literal["llama1", "improved"] = "improved"
    languages: list[str] = field(default_factory=lambda: ["en"])
    min_language_score: float = 0.5
    language_model: str = ""
    group_shards: int = 50
    models: str = ""
    buckets: list[str] = field(default_factory=lambda: ["head", "middle", "all"])
    min_reference_score: float = THRESHOLD
    min_chars: int = 300
    html_deadline_s: float = 5.0
    max_page_bytes: Count = Count(16_000_000)
    unit_bytes: Count = Count(1_000_000_000)


def plan(options: Options, inputs: Sequence[Path]) -> Plan:
    """Lay out the archives that the preset reads."""
    expect(options.group_shards >= 1, f"group_shards is {options.group_shards}", "1 or more")
    deadline = options.html_deadline_s
    expect(deadline > 0, f"html_deadline_s is {deadline}", "more than 0")
    if options.preset == "improved":
        for module in ("resiliparse.extract.html2text", "brotli"):
            needed(module, "reading WARC", CORPUS_EXTRA)
    language.check(options.languages, options.min_language_score, options.language_model)
    if options.models:
        quality.check(options, options.languages)
    pieces, left_out = find(inputs, _format_of)
    wanted = _READS[options.preset]
    kept = [piece for piece in pieces if piece.format == wanted]
    left_out += [
        LeftOut(p.name, f"preset {options.preset} reads {wanted}", p.size)
        for p in pieces
        if p.format != wanted
    ]
    units = group(kept, options.unit_bytes)
    known = quality.identity(options)
    return Plan("commoncrawl", known, partial(read, options), units, tuple(left_out))


def _format_of(name: str) -> str | None:
    path = PurePosixPath(name)
    return _SUFFIXES.get((path.with_suffix("") if path.suffix == ".gz" else path).suffix)


def steps(options: Options) -> list[Any]:
    """CCNet's: length, repeated lines, language, and by models perplexity and references."""
    enough = partial(text.at_least, min_chars=options.min_chars)
    in_language = partial(
        language.identify,
        languages=options.languages,
        min_score=options.min_language_score,
        model=options.language_model,
    )
    last = [in_language, *(quality.steps(options) if options.models else ())]
    if options.preset == "llama1":
        lines = Lines(copies="none", group_shards=options.group_shards)
        return [text.unix_line_ends, enough, lines, *last]
    # imported here: an extra that only WARC needs
    from llama.corpus.steps import html

    main_content = partial(
        html.main_content, deadline_s=options.html_deadline_s, memory_bytes=_HTML_MEMORY_BYTES
    )
    return [main_content, text.unix_line_ends, enough, Lines(copies="first"), enough, *last]


def read(options: Options, piece: Piece) -> Iterator[Item]:
    """Pages of one archive; those of WARC are still HTML."""
    wanted, page = ("conversion", _text) if piece.format == "wet" else ("response", _html)
    is_empty = True
    for record in warc.records(piece.path, options.max_page_bytes):
        is_empty = False
        id = f"{piece.name}:{record.place}"
        if record.problem == "damaged":
            yield Dropped(id, "damaged", 0, "a record that is damaged or cut off")
        elif record.kind != wanted:
            yield Noted(f"record {record.kind or 'without type'}")
        elif record.problem == "too_large":
            yield Dropped(id, "too_large")
        else:
            if record.problem:
                yield Noted("Content-Length is wrong")
            yield from page(options, id, record)
    if is_empty:
        yield Dropped(piece.name, "damaged", piece.size, "holds no record")


def _text(options: Options, id: str, record: warc.Record) -> Iterator[Item]:
    """A record of WET; its first line is the page's title, as in CCNet."""
    try:
        content = record.body.decode()
    except UnicodeDecodeError:
        content = record.body.decode("utf-8", "replace")
        yield Noted("text with damaged bytes")
    title, _, body = content.replace("\0", "").partition("\n")
    yield Document(id, body, options.source, {**_meta(record), "title": title.strip()})


def _html(options: Options, id: str, record: warc.Record) -> Iterator[Item]:
    """A response of WARC as its HTML."""
    from llama.corpus import web

    identified = record.headers.get("warc-identified-payload-type", "")
    try:
        page, charset, odd = web.payload(record.body, options.max_page_bytes, identified)
        content, how = web.decode(page, charset)
    except web.Refused as refused:
        yield Dropped(id, str(refused), len(record.body))
    except raw.Binary:
        yield Dropped(id, "binary", len(record.body))
    else:
        yield from map(Noted, [f"charset {how}", *odd])
        yield Document(id, content.replace("\0", ""), options.source, _meta(record))


def _meta(record: warc.Record) -> dict[str, Any]:
    found = record.headers
    # some crawlers put it in angle brackets
    address = found.get("warc-target-uri", "").strip("<>")
    return {"url": address, "date": found.get("warc-date", "")}
