"""Pages that stand alone: text, tables and PNG pictures in, one HTML file out.

No script, no font and no file from elsewhere: a page can be sent by mail and printed. It is light
or dark as the reader's system is. Everything that is not `Markup` is escaped.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

# Cells of columns that are aligned right: 1,024; −0.3 %; 4.19M; 3 of 7; 1.2 GiB; and – for none.
NUMBER = re.compile(r"[-+−–\d.,% ]+(of [\d,?]+|[kMGT]?i?B?)")
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --soft: #59636e; --rule: #d9dee3;
  --box: #f6f8fa; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14171b; --ink: #dfe3e8; --soft: #98a2ad; --rule: #353b43; --box: #1d2127; }
  img, .dot { filter: invert(0.92) hue-rotate(180deg); }
  img { mix-blend-mode: lighten; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 40px 32px 64px; max-width: 1120px; background: var(--page);
  color: var(--ink); font: 15px/1.55 "Helvetica Neue", Helvetica, Arial, "Liberation Sans",
  "DejaVu Sans", sans-serif; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 10px; padding-bottom: 5px;
  border-bottom: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 8px 0; max-width: 100ch; }
.soft, figcaption { color: var(--soft); font-size: 13px; }
figure { margin: 12px 0; break-inside: avoid; }
img { width: 100%; height: auto; display: block; margin-bottom: 4px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; line-height: 1.4; margin: 8px 0;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 4px 16px 4px 0; max-width: 60ch;
  border-bottom: 1px solid var(--rule); }
th { vertical-align: bottom; font-weight: 600; color: var(--soft); border-color: var(--soft); }
.n { text-align: right; white-space: nowrap; }
tr { break-inside: avoid; }
code, pre { font: 12px/1.5 "SF Mono", Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono",
  monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; background: var(--box); padding: 10px 12px; margin: 6px 0 14px;
  border-left: 3px solid var(--rule); break-inside: avoid; }
pre i { font-style: normal; color: var(--soft); }
.dot { margin-right: 6px; print-color-adjust: exact; }
@media print {
  @page { size: A4; margin: 14mm; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  table { font-size: 8.5pt; } pre, code { font-size: 8pt; }
  .wide { overflow: visible; } h2, h3, p.soft { break-after: avoid; }
}
"""


class Markup(str):
    """Ready HTML."""


class Picture(NamedTuple):
    """A PNG; the title stands for it where it cannot be seen."""

    title: str
    caption: str
    png: bytes


def text(value: object) -> Markup:
    """Escaped, with control characters that HTML forbids made visible; whole numbers as 1,024."""
    if isinstance(value, Markup):
        return value
    plain = f"{value:,}" if type(value) is int else str(value)
    return Markup(escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", plain)))


def tag(name: str, *content: object, **attributes: str) -> Markup:
    """An element, as in `tag("p", "a note", class_="soft")`."""
    inside = "".join(map(text, content))
    given = "".join(f' {key.rstrip("_")}="{text(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{given}>{inside}</{name}>")


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table that scrolls where it is wider than the page; columns of numbers at the right."""
    cells = [[text(cell) for cell in row] for row in rows]
    kinds = [
        {"class_": "n"} if all(map(NUMBER.fullmatch, column)) else {}
        for column in zip(*cells, strict=True)
    ] or [{} for _ in header]

    def line(name: str, row: Sequence[object]) -> Markup:
        pairs = zip(row, kinds, strict=True)
        return tag("tr", *(tag(name, cell, **kind) for cell, kind in pairs), "\n")

    lines = [line("td", row) for row in cells]
    inside = tag("thead", line("th", header)), tag("tbody", *lines)
    return tag("div", tag("table", *inside), class_="wide")


def figure(picture: Picture) -> Markup:
    """A picture inside the page, as wide as the text."""
    source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
    image = Markup(f'<img alt="{text(picture.title)}" src="{source}">')
    return tag("figure", image, tag("figcaption", picture.caption))


def page(title: str, *parts: object) -> str:
    """The whole file; `parts` follow the title in their order."""
    head = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(map(text, (tag("h1", title), *parts)))
    style = f"<title>{text(title)}</title><style>{STYLE}</style></head>"
    return f"{head}{style}\n<body>\n{body}\n</body></html>\n"
