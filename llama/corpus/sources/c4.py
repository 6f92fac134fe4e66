"""Recipe `c4`: ready C4 JSON as it is, or one's own crawl by the rules of C4 (paper §2.1).

In: .json and .jsonl files with one object a line [.gz | .zst], its `text`, and if there are `url`
and `timestamp`, as C4 is distributed. Out: one document a line, its id the file's name and the
line. With `rules` the first page of each address stays, and its text goes through
steps/c4_rules.py; documents of the recipe commoncrawl are read as well. What C4 did besides, one
copy of a line and one language, of a score of at least 0.99, are steps of that recipe.

Drop reasons: `empty`, `too_large`; with rules `url_duplicate`, `too_long` and those of
steps/c4_rules.py. Quarantined: as `plain`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llama.cli import UserError
from llama.config import Count
from llama.corpus.document import Document, Item
from llama.corpus.plan import Piece, Plan, find, laid_out
from llama.corpus.sources import plain
from llama.corpus.steps import text
from llama.corpus.steps.c4_rules import bad_word_pattern, c4_rules
from llama.corpus.steps.exact import Exact

# What a page's other fields may say; a dump of another pipeline holds many more.
_META = ("url", "timestamp", "id", "language")
# Longer pages were left out of C4.
MAX_PAGE_CHARS = 190_000


@dataclass
class Options:
    """What a run of the recipe may choose.

    Args:
        source: Name of the source in every document; empty for the name of the output folder.
        rules: none for C4 as it comes; reference or article for a crawl of one's own.
        bad_words: File with a word or phrase a line; pages with one of them go. Needs rules.
        text_key: Field that holds the text.
        max_document_bytes: Longer lines are dropped, and never held in memory.
        unit_bytes: Input that becomes one output shard.
    """

    source: str = ""
    rules: Literal["none", "reference", "article"] = "none"
    bad_words: str = ""
    text_key: str = "text"
    max_document_bytes: Count = Count(64_000_000)
    unit_bytes: Count = Count(256_000_000)


def plan(options: Options, inputs: Sequence[Path]) -> Plan:
    """Lay out the JSON files below `inputs`."""
    if options.bad_words and options.rules == "none":
        raise UserError(f"bad_words is {options.bad_words!r}, but rules is none: it has no effect")
    if options.bad_words:
        bad_word_pattern(options.bad_words)
    return laid_out("c4", options, read, find(inputs, _format_of), cut=("jsonl",))


def steps(options: Options) -> list[Any]:
    """Line ends, then the rules if there are any."""
    chosen: list[Any] = []
    if options.rules != "none":
        rules = partial(c4_rules, preset=options.rules, bad_words=options.bad_words)
        chosen = [Exact(same="url"), short_enough, rules]
    return [text.unix_line_ends, *chosen, partial(text.at_least, min_chars=1)]


def short_enough(documents: Iterator[Document]) -> Iterator[Item]:
    """Pages that are no longer than those of C4."""
    for document in documents:
        too_long = len(document.text) > MAX_PAGE_CHARS
        yield document.dropped("too_long") if too_long else document


def _format_of(name: str) -> str | None:
    """As `plain` names it; every .json file here is one of lines."""
    format = plain.format_of(name) or ""
    kind, dot, packing = format.partition(".")
    return f"jsonl{dot}{packing}" if kind in ("json", "jsonl") else None


def read(options: Options, piece: Piece) -> Iterator[Item]:
    """Documents of one piece of input."""
    like_plain = plain.Options(options.source, options.text_key)
    like_plain.max_document_bytes = options.max_document_bytes
    for item in plain.read(like_plain, piece):
        if isinstance(item, Document):
            # our own documents and others' keep the address one level deeper
            inner = item.meta.get("meta") or item.meta.get("metadata")
            known = {**(inner if isinstance(inner, dict) else {}), **item.meta}
            item = item._replace(meta={key: known[key] for key in _META if key in known})
        yield item
