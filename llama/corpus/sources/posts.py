"""Stack Exchange's Posts.xml as plain text: one document per row, its `Body` without HTML tags.

Only enough to train on a dump as it comes; questions are not joined with their answers (paper §2.1
does that). A dump holds one row a line and no raw `<` or quote inside an attribute, so rows are
found by scanning: a truncated file loses its last row alone, and no entity is ever expanded.
"""

import html
import re
from collections.abc import Iterator

from llama.corpus.document import Document, Dropped, Item

_ATTRIBUTE = re.compile(r'\s(Id|PostTypeId|Body)="([^"]*)"')
# Tags that begin a line of text; around most blocks posts have line ends of their own.
_BREAKS = re.compile(r"(br|p|li|tr|h[1-6]|div|blockquote|pre)\b", re.IGNORECASE)


def rows(line: str, id: str, source: str) -> Iterator[Item]:
    """Documents of the rows on one line of Posts.xml; `id` tells the line."""
    for i, row in enumerate(line.split("<row ")[1:]):
        place = f"{id}.{i}" if i else id
        if "/>" not in row:
            yield Dropped(place, "xml", len(row.encode()), "a row without an end")
            continue
        values = {key: html.unescape(value) for key, value in _ATTRIBUTE.findall(" " + row)}
        meta = {key: values[key] for key in ("Id", "PostTypeId") if key in values}
        yield Document(place, strip_tags(values.get("Body", "")).strip(), source, meta)


def strip_tags(markup: str) -> str:
    """Text of an HTML fragment, in one pass: tags and comments go, entities become characters."""
    parts: list[str] = []
    at = search = 0
    while (start := markup.find("<", search)) >= 0:
        if not re.match(r"[a-zA-Z/!?]", markup[start + 1 : start + 2]):
            search = start + 1
            continue
        comment = markup.startswith("<!--", start)
        end = markup.find("-->" if comment else ">", start)
        if end < 0:
            break
        if start > at:
            parts.append(markup[at:start])
        if parts and not parts[-1].endswith("\n") and _BREAKS.match(markup, start + 1, end):
            parts.append("\n")
        at = search = end + (3 if comment else 1)
    parts.append(markup[at:])
    return html.unescape("".join(parts))
