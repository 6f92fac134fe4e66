"""Steps for any text: line ends made one kind, documents without enough text dropped; entities.

Drop reasons: `empty` (nothing but white space), `short` (fewer characters than asked).
"""

import html
import re
from collections.abc import Iterator

from llama.corpus.document import Document, Item

# Python makes no number of thousands of digits; so long a one is no character's.
_ENDLESS = re.compile("&#[0-9]{100,};?")


def unix_line_ends(documents: Iterator[Document]) -> Iterator[Item]:
    """CR LF and lone CR become LF: no token is spent on the system a file was written on."""
    for document in documents:
        if "\r" in document.text:
            text = document.text.replace("\r\n", "\n").replace("\r", "\n")
            document = document._replace(text=text)
        yield document


def unescape(markup: str) -> str:
    """Markup with its entities as characters."""
    return html.unescape(_ENDLESS.sub("\ufffd", markup) if "&#" in markup else markup)


def at_least(documents: Iterator[Document], min_chars: int) -> Iterator[Item]:
    """Keep documents of `min_chars` characters or more, white space around the text not counted."""
    for document in documents:
        length = len(document.text.strip())
        if not length:
            yield document.dropped("empty")
        elif length < min_chars:
            yield document.dropped("short")
        else:
            yield document
