"""Source code: licence headers removed, files that nobody wrote or reads dropped (paper §2.1).

Of the comments that a file begins with, paragraphs that are copyright or licence notices are cut;
a title, a docstring or a shebang beside them stays. Statistics and limits are RedPajama's.

Drop reasons: `generated`, `file_licence NAME` (a header names a licence that is not allowed),
`empty`, `max_line_length`, `mean_line_length`, `alphanumeric`. Noted: `licence header`.
"""

import re
import string
from collections.abc import Collection, Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from llama import files
from llama.corpus.document import Document, Item, Noted
from llama.corpus.sources.licences import judge, read_text, words

_TABLES = files.read_yaml(Path(__file__).with_suffix(".yaml"))
_MARKS: dict[str, list[list[str]]] = {}
_BY_NAME: dict[str, str] = {}
for _family in _TABLES.pop("families"):
    for _name, _suffixes in _family["languages"].items():
        _MARKS[_name] = [mark.split("~") for mark in _family["marks"]]
        _BY_NAME |= dict.fromkeys(_suffixes.split(), _name)
_ANY = {name: "|".join(said) for name, said in _TABLES.items()}

MAX_LINE, MAX_MEAN_LINE, MIN_ALPHANUMERIC = 1000, 100, 0.25
_PROSE = ("Markdown", "reStructuredText", "TeX", "HTML")
_GENERATED = re.compile(
    rf"^[ \t]*(?:#|//|/?\*|--|;|%|<!--|dnl|\"\"\"|''').{{0,100}}?(?:{_ANY['generated']})",
    re.MULTILINE,
)
# One of these is in the head of all that are found so.
_SUSPECT = ("generated", "do not", "made by gnu bison")
_MAYBE_NOTICE = re.compile(_ANY["maybe_notice"], re.IGNORECASE)
_NOTICE, _TERMS, _MODE_LINE = (re.compile(_ANY[n]) for n in ("notice", "terms", "mode_line"))
_LONGER = "distribut|free|permi|condition|under|terms"
_ONE_LINE = re.compile(rf"(?:{_ANY['one_line']})(?!.*(?:{_LONGER})).{{0,100}}$")
_FRONT = re.compile(rf"(?:{_ANY['front']})*", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]")
_MAX_COMMENTS, _MAX_COMMENT_CHARS = 8, 1 << 16
_ALPHANUMERIC = (string.ascii_letters + string.digits).encode()
_ASCII_RUN = re.compile(r"[\x00-\x7f]+")


def language(name: str) -> str:
    """The language of a file by its name; empty for one that is not read."""
    name = name.lower().rpartition("/")[2]
    return _BY_NAME.get(name) or _BY_NAME.get(name.rpartition(".")[2], "")


def clean(documents: Iterator[Document], allowed: Collection[str]) -> Iterator[Item]:
    """Cut notices; drop what is generated, empty, unreadable or under a licence not allowed."""
    for document in documents:
        head = "" if document.meta["language"] in _PROSE else document.text[:2000].lower()
        text, notices = without_header(document.text, document.meta["language"])
        verdict = judge([read_text(notices)], allowed) if notices else None
        longest, mean, share = measure(text)
        if any(map(head.__contains__, _SUSPECT)) and _GENERATED.search(head):
            yield document.dropped("generated")
        elif verdict and verdict[1]:
            yield document.dropped(f"file_{verdict[1]}")
        elif not text.strip():
            yield document.dropped("empty")
        elif longest > MAX_LINE:
            yield document.dropped("max_line_length")
        elif mean > MAX_MEAN_LINE:
            yield document.dropped("mean_line_length")
        elif share < MIN_ALPHANUMERIC:
            yield document.dropped("alphanumeric")
        else:
            yield document._replace(text=text)
            if notices:
                yield Noted("licence header")


def without_header(text: str, language: str) -> tuple[str, str]:
    """(text without the notices in its first comments, these notices)."""
    at, notices = 0, ""
    for _ in range(_MAX_COMMENTS):
        front = _FRONT.match(text, at)
        at = front.end() if front else at
        end, opener, closer = _comment(text, at, _MARKS[language])
        if end == at:
            break
        comment, kept = text[at:end], text[at:end]
        if _MAYBE_NOTICE.search(comment):
            # a run of lines is handled as a block between two line ends
            lines, cut = _cut(comment[len(opener) : -len(closer)] if closer else "\n" + comment)
            kept = (opener + "\n".join(lines) + closer)[not closer :] if lines else ""
            if cut:
                notices += cut + "\n"
                text = text[:at] + kept + (text[end:] if kept else text[end:].lstrip("\n"))
        at += len(kept)
    return text, notices


def _comment(text: str, at: int, marks: list[list[str]]) -> tuple[int, str, str]:
    """(end, opener, closer) of the comment at a place; of lines it has neither."""
    last = at + _MAX_COMMENT_CHARS
    for opener, *closer in marks:
        if closer and text.startswith(opener, at):
            end = text.find(closer[0], at + len(opener), last)
            if end >= 0:
                return end + len(closer[0]), opener, closer[0]
    starts = tuple(mark[0] for mark in marks if len(mark) == 1)
    end = at
    while starts and end < min(last, len(text)):
        after = text.find("\n", end) + 1 or len(text)
        if not text[end:after].lstrip().startswith(starts):
            break
        end = after
    return end, "", ""


# The files of a repository begin alike.
@lru_cache
def _cut(comment: str) -> tuple[list[str], str]:
    """(lines of a comment without the paragraphs that are notices, these); a frame stays."""
    lines = comment.split("\n")
    paragraphs = [list(group) for _, group in groupby(lines, lambda x: bool(_WORD.search(x)))]
    plain = [_plain("\n".join(paragraph)) for paragraph in paragraphs]
    said = [i for i, each in enumerate(plain) if _NOTICE.search(each)]
    kept: list[str] = []
    cut: list[str] = []
    for i, paragraph in enumerate(paragraphs):
        between = bool(said) and said[0] <= i <= said[-1]
        goes = between and (i in said or not plain[i] or _TERMS.search(plain[i]))
        stays = _beside(paragraph) if goes and i in said else []
        for line in paragraph:
            is_cut = goes and line not in stays and not _MODE_LINE.search(line)
            (cut if is_cut else kept).append(line)
    return (kept if any(map(_WORD.search, kept)) else []), "\n".join(cut)


def _plain(text: str) -> str:
    return words(text.lower().replace("(c)", "copyright by "))


def _beside(paragraph: list[str]) -> list[str]:
    """Lines that stand beside notices of one line each; none where a notice is longer."""
    others = []
    for line in paragraph:
        says_all = _ONE_LINE.match(_plain(line)) and not line.rstrip().endswith((",", " and"))
        if not says_all:
            if _TERMS.search(line.lower()):
                return []
            others.append(line)
    return [] if _NOTICE.search(_plain("\n".join(others))) else others


def measure(text: str) -> tuple[int, float, float]:
    """(longest line, characters per line, share of letters and digits), as RedPajama counts."""
    lengths = list(map(len, text.splitlines()))
    if not lengths:
        return 0, 0.0, 0.0
    ascii = text.encode("ascii", "ignore")
    alphanumeric = len(ascii) - len(ascii.translate(None, _ALPHANUMERIC))
    if len(ascii) < len(text):
        alphanumeric += sum(map(str.isalnum, _ASCII_RUN.sub("", text)))
    return max(lengths), len(text) / len(lengths), alphanumeric / len(text)
