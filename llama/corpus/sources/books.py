"""Recipe `books`: Project Gutenberg's texts and other plain books, a document each (paper §2.1).

In: .txt and .md files, bare, .gz, .zst or inside a .zip. Out: the book without what Project
Gutenberg puts before and after it, in `meta` what its header says of title, author and language.
Books of one's own have no such header and stay whole. A book nearly all of which stands in
another one goes, see steps/containment.py.

Drop reasons: `empty`, `short`, `contained`, and those of `plain` for files and members.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llama import files
from llama.cli import expect
from llama.config import Count
from llama.corpus.document import Document, Item, Noted
from llama.corpus.plan import Piece, Plan, find, laid_out
from llama.corpus.sources import plain
from llama.corpus.steps import text
from llama.corpus.steps.containment import Containment

# Headers were at most 400 lines when the small print came first; footers are as long, and both are
# twice as long where every line end has become two.
_MARGIN_LINES = 1000
_TABLES = files.read_yaml(Path(__file__).with_suffix(".yaml"))
_GUTENBERG, _HEADER_ENDS, _FOOTER_BEGINS, _CREDITS, _FIELD = (
    re.compile("|".join(_TABLES[name]), re.IGNORECASE)
    for name in ("gutenberg", "header_ends", "footer_begins", "credits", "field")
)
_NAMES = {"titel": "title", "titre": "title", "autor": "author", "auteur": "author"}
_NAMES |= {"sprache": "language", "langue": "language"}


@dataclass
class Options:
    """What a run of the recipe may choose.

    Args:
        source: Name of the source in every document; empty for the name of the output folder.
        encoding: Of files without a byte order mark: auto, or a codec such as latin-1.
        min_chars: Shorter books are dropped.
        overlap: A book goes when this share of it is in a longer one; 0 keeps all.
        max_document_bytes: Longer ones too.
        unit_bytes: Input that becomes one output shard.
    """

    source: str = ""
    encoding: str = "auto"
    min_chars: int = 1000
    overlap: float = 0.9
    max_document_bytes: Count = Count(256_000_000)
    unit_bytes: Count = Count(64_000_000)


def plan(options: Options, inputs: Sequence[Path]) -> Plan:
    """Lay out the books below `inputs`."""
    expect(0 <= options.overlap <= 1, f"overlap is {options.overlap}", "a share from 0 to 1")
    return laid_out("books", options, read, find(inputs, _format_of))


def steps(options: Options) -> list[Any]:
    """Line ends, Gutenberg's frame, the least length, then copies across all books."""
    chosen = [text.unix_line_ends, frame, partial(text.at_least, min_chars=options.min_chars)]
    return [*chosen, *([Containment(options.overlap)] if options.overlap else [])]


def _format_of(name: str) -> str | None:
    format = plain.format_of(name)
    return format if format and format.partition(".")[0] in ("txt", "md", "zip") else None


def read(options: Options, piece: Piece) -> Iterator[Item]:
    """Books of one file."""
    like_plain = plain.Options(options.source, encoding=options.encoding)
    like_plain.max_document_bytes = options.max_document_bytes
    return plain.read(like_plain, piece)


def frame(documents: Iterator[Document]) -> Iterator[Item]:
    """Books without Project Gutenberg's header and footer, what the header says in their meta."""
    for document in documents:
        book, meta, problem = unframed(document.text)
        if problem:
            yield Noted(problem)
        yield document._replace(text=book, meta=document.meta | meta)


def unframed(content: str) -> tuple[str, dict[str, str], str]:
    """(the book, what its header says, what was odd about the frame or nothing)."""
    lines = content.split("\n")
    head, tail = lines[:_MARGIN_LINES], max(0, len(lines) - _MARGIN_LINES)
    begins = [i for i, line in enumerate(head) if _HEADER_ENDS.match(line)]
    begin = _after(lines, begins[-1]) if begins else 0
    # the small print may stand at the end as well: then its last line is no header's
    while begins and _mostly_footer(lines, begin):
        begins.pop()
        begin = _after(lines, begins[-1]) if begins else 0
    ends = [i for i in range(max(begin, tail), len(lines)) if _FOOTER_BEGINS.match(lines[i])]
    end = ends[0] if ends else len(lines)
    problem = ""
    if not begins and any(_GUTENBERG.search(line) for line in head[:60]):
        problem = "header without an end"
    elif begins and not ends:
        problem = "header without a footer"
    found = (_FIELD.match(line.strip()) for line in lines[:begin])
    fields = [(m[1].lower(), m[2].strip()) for m in found if m]
    meta = {_NAMES.get(name, name): value for name, value in reversed(fields)}
    return _without_credits("\n".join(lines[begin:end]).strip()), meta, problem


def _after(lines: list[str], marker: int) -> int:
    """The line behind a marker, which a long title may break into several."""
    below = range(marker + 1, min(marker + 4, len(lines)))
    closing = next((i for i in below if "***" in lines[i]), marker)
    return 1 + (marker if "*" in lines[marker].rstrip()[-4:] else closing)


def _mostly_footer(lines: list[str], begin: int) -> bool:
    """Whether hardly anything is left behind the supposed header."""
    return sum(map(len, lines[begin:])) < 0.02 * sum(map(len, lines[:begin]))


def _without_credits(book: str) -> str:
    """Who typed and scanned it, at the beginning: paragraphs of the volunteers, not of the book."""
    # a limit, so that time stays linear
    for _ in range(9):
        first, _, rest = book.partition("\n\n")
        is_team = len(first) < 400 and "proofreading team" in first.lower()
        if not (is_team or _CREDITS.match(first)):
            break
        book = rest.lstrip("\n")
    return book
