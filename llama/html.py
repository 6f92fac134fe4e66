"""Pages that stand alone: text, tables and PNG pictures in, one HTML file out.

No script, no font and no file from elsewhere: a page can be sent by mail and printed. It is light
or dark as the reader's system is. Everything that is not `Markup` is escaped.
"""

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from llama.cli import expect

# Cells of columns that are aligned right: 1,024; −0.3 %; 4.19M; 3 of 7; 1.2 GiB; and – for none.
NUMBER = re.compile(r"[-+−–\d.,% ]+(of [\d,?]+|[kMGT]?i?B?)")
STYLE = Path(__file__).with_name("page.css").read_text()


class Markup(str):
    """Ready HTML."""


class Picture(NamedTuple):
    """A PNG; the title stands for it where it cannot be seen."""

    title: str
    caption: str
    png: bytes

    @classmethod
    def drawn(cls, figure: Any, title: str, caption: str) -> "Picture":
        """Of a figure of matplotlib's, which would write its version into the file."""
        png = io.BytesIO()
        figure.savefig(png, dpi=150, metadata={"Software": None})
        return cls(title, caption, png.getvalue())


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


def soft(*content: object) -> Markup:
    """A paragraph that says how to read what stands beside it."""
    return tag("p", *content, class_="soft")


def check_output(output: Path) -> None:
    """Raise `UserError` for what cannot be the name of a page."""
    good = output.suffix in (".html", ".htm") and not output.is_dir()
    expect(good, f"--output is {output}", "a file name that ends in .html")


def page(title: str, *parts: object) -> str:
    """The whole file; `parts` follow the title in their order."""
    head = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(map(text, (tag("h1", title), *parts)))
    style = f"<title>{text(title)}</title><style>{STYLE}</style></head>"
    return f"{head}{style}\n<body>\n{body}\n</body></html>\n"
