"""Wikitext to plain text, in one pass over the markup (paper §2.1: hyperlinks, comments and
formatting boilerplate are removed).

In: the source of a page. Out: its sentences, headings and lists. Templates, tables, references,
files, categories, galleries and comments go with all they hold; links leave their label, other tags
their content, <math> its formula, blocks of code all their white space. Markup that is opened and
never closed stays as text.

The scanner writes pieces into one list; what opens remembers where, what closes cuts the list back
to there. Nothing is read twice, so time is linear in the length, whatever the nesting.
"""

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from llama import files
from llama.corpus.steps.text import unescape

_TABLES = files.read_yaml(Path(__file__).with_suffix(".yaml"))
FILES, CATEGORIES, _BLOCKS, _DROPPED, _LINE_BREAKS = (
    frozenset(_TABLES[name].split())
    for name in ("files", "categories", "blocks", "dropped", "line_breaks")
)
# Their content is no wikitext.
_VERBATIM = _BLOCKS | frozenset("nowiki math chem code ce".split())
# Where a template was, and before each line of a block of code; dumps hold no such characters.
_GONE, _CODE = "\x01", "\x02"
# Links within the caption of a file go three deep; a limit keeps the work on labels linear.
_MAX_LINKS = 8
_LINKS = {"[[": "link", "[": "external", "-{": "variant"}

_TOKEN = re.compile(
    r"""<!--
    | </?([a-zA-Z][a-zA-Z0-9]*)(?:[\s/][^<>]*+)?>
    | \{{2,} | \}{2,} | \[\[ | \]{1,2} | \[(?=(?:https?:|ftp:)?//|mailto:)
    | ^[ \t:]*\{\| | ^[ \t]*\|\}(?!\})
    | (?<=\w)(?P<elided>''')(?=\w[^'\n]*+''(?!')) | '{2,} | -\{(?!\{) | \}-
    """,
    re.VERBOSE | re.MULTILINE,
)
_HEADING = re.compile(r"(={1,6})(.+)\1")
_LIST = re.compile(r"^[ \t]*(?:-{4,})?[*#;:]*[ \t]*")
# What templates leave of (pronunciation; dates): nothing, or a bracket before the dates.
_EMPTY = re.compile(f"( ?\\()[ ,;:]*{_GONE}[ ,;:{_GONE}]*(\\)?)")
_SPACES = re.compile("  +")
_NOWIKI = re.compile("</?nowiki */?>")
# An apostrophe behind something in italics: the ''Titanic'''s crew.
_POSSESSIVE = re.compile(r"(?<!')''([^'\n]++)(?<=[\w\])])'''(?=s\b(?!'''))")
_SWITCH = re.compile(r"__\w{3,40}?__")
_INTERWIKI = re.compile(r"(?:[a-z]{2,3}|simple|[a-z]{2,3}-[a-z-]{2,})$")
_VARIANT = re.compile(r"(?:^|;)\s*[a-z]{2,3}(?:-[a-z]+)*\s*:\s*([^;]*)")
_URL = re.compile(r"https?://[^\s<>\[\]{}|\"']+")


def references(source: str) -> list[str]:
    """The external addresses on a page, each once, in their order."""
    return list(dict.fromkeys(url.rstrip(".,;:)") for url in _URL.findall(source)))


def plain_text(
    source: str, files: Collection[str] = FILES, categories: Collection[str] = CATEGORIES
) -> str:
    """Text of a page; `files` and `categories` are names of those namespaces in lower case."""
    source = _POSSESSIVE.sub(r"\1'", source) if "'''s" in source else source
    scanner = _Scanner(source, frozenset(files) | FILES, frozenset(categories) | CATEGORIES)
    return _lines(scanner.text())


class _Scanner:
    def __init__(self, source: str, files: frozenset[str], categories: frozenset[str]) -> None:
        self.source, self.files, self.categories = source, files, categories
        self.out: list[str] = []
        # what is open: its kind, and where in `out` it began
        self.open: list[tuple[str, int]] = []
        self.depth = Counter[str]()
        # tags known to be never closed from here on
        self.endless: set[str] = set()

    def text(self) -> str:
        """All pieces that are left, as one string."""
        at = 0
        while match := _TOKEN.search(self.source, at):
            if match.start() > at:
                self.out.append(self.source[at : match.start()])
            at = self._token(match)
        self.out.append(self.source[at:])
        for kind, start in self.open:
            # of an unclosed tag the content stays; other markup stays itself
            if kind in ("ref", "html table"):
                self.out[start] = ""
        return "".join(self.out)

    def _token(self, match: re.Match[str]) -> int:
        """Do what a token asks for; where to read on."""
        token = match[0]
        if token[0] == "<":
            return self._comment(match) if token == "<!--" else self._tag(match)
        kind = token.strip(" \t:")
        if kind[0] == "'":
            # three behind a letter, and then two: an apostrophe before something in italics
            elided = kind == "'''" and match.lastgroup == "elided"
            self.out.append("'" * (elided or len(kind) == 4 or max(0, len(kind) - 5)))
        elif kind == "{|":
            self._begin("table", token)
        elif kind == "|}":
            self._end("table", token)
        elif kind == "}-":
            self._end("variant", token)
        elif kind[0] == "{":
            for _ in range(len(kind) // 2):
                self._begin("template", "{{")
            self.out.append("{" * (len(kind) % 2))
        elif kind[0] == "}":
            return self._braces(match)
        elif link := _LINKS.get(kind):
            if self.depth[link] < _MAX_LINKS:
                self._begin(link, token)
            else:
                self.out.append(token)
        else:
            return self._bracket(match)
        return match.end()

    def _begin(self, kind: str, token: str) -> None:
        self.open.append((kind, len(self.out)))
        self.depth[kind] += 1
        self.out.append(token)

    def _end(self, kind: str, token: str) -> str | None:
        """Close the last `kind` and what is open in it: its content; None where none is open."""
        if not self.depth[kind]:
            self.out.append(token)
            return None
        while True:
            closed, start = self.open.pop()
            self.depth[closed] -= 1
            if closed == kind:
                break
        content = self.out[start + 1 :]
        del self.out[start:]
        if kind == "variant":
            self.out.append(_variant("".join(content)))
        elif kind == "template":
            self.out.append(_GONE)
        return "".join(content) if kind in ("link", "external") else ""

    def _braces(self, match: re.Match[str]) -> int:
        n = len(match[0])
        # "}}-" closes a template, and then perhaps a variant
        if n == 2 or not self.depth["template"]:
            self._end("template", match[0])
            return match.end()
        for _ in range(min(n // 2, self.depth["template"])):
            self._end("template", "}}")
        return match.end()

    def _bracket(self, match: re.Match[str]) -> int:
        """] or ]]: a link can only be closed by what stands in it, not from within a template."""
        kind = self.open[-1][0] if self.open else ""
        if kind == "external":
            content = self._end("external", "]") or ""
            address, _, label = content.partition(" ")
            # a bracket that is closed on another line is no link
            self.out.append(label if "\n" not in content else f"[{content}]")
            return match.start() + 1
        if match[0] == "]]" and kind == "link":
            self.out.append(self._link(self._end("link", "]]") or ""))
        else:
            self.out.append(match[0])
        return match.end()

    def _link(self, content: str) -> str:
        target, bar, label = content.partition("|")
        space, colon, _ = target.partition(":")
        space = space.strip().lower()
        if colon and (space in self.files or space in self.categories):
            return ""
        if colon and not bar and _INTERWIKI.match(space):
            return ""
        return label if bar else target.strip().removeprefix(":")

    def _comment(self, match: re.Match[str]) -> int:
        end = self._find("-->", match.end())
        return len(self.source) if end < 0 else end + len("-->")

    def _tag(self, match: re.Match[str]) -> int:
        name, closing = match[1].lower(), match[0][1] == "/"
        alone = match[0].endswith("/>")
        if name in ("ref", "table"):
            kind = "ref" if name == "ref" else "html table"
            if closing:
                self._end(kind, "")
            elif not alone:
                self._begin(kind, match[0])
        elif (name in _VERBATIM or name in _DROPPED) and not closing and not alone:
            end = self._find(f"</{match[1]}", match.end())
            if end >= 0:
                if name in _VERBATIM:
                    self.out.append(_verbatim(name, self.source[match.end() : end]))
                # behind the closing tag
                return self.source.find(">", end) + 1 or len(self.source)
        elif name in _LINE_BREAKS:
            self.out.append("\n")
        return match.end()

    def _find(self, closing: str, at: int) -> int:
        """Where `closing` is, in any case; each is searched for in vain only once."""
        closing = closing.lower()
        if closing in self.endless:
            return -1
        match = re.compile(closing, re.IGNORECASE).search(self.source, at)
        if match is None:
            self.endless.add(closing)
        return match.start() if match else -1


def _verbatim(name: str, content: str) -> str:
    """What stands in a tag whose content is no wikitext; of a block each line is marked."""
    if name == "code" and "<nowiki" in content:
        content = _NOWIKI.sub("", content)
    if name not in _BLOCKS:
        return content
    return ("\n" + content.strip("\n")).replace("\n", "\n" + _CODE) + "\n"


def _variant(content: str) -> str:
    """Of -{ ... }- the text, its first variant, or nothing where it only sets a rule."""
    flags, bar, rest = content.partition("|")
    if bar and re.fullmatch(r"[A-Za-z-](?:;[A-Za-z-])*|[a-z]+(?:[-;][a-z]+)+", flags):
        if set(flags.upper().split(";")) & set("THD-"):
            return ""
        content = rest
    found = _VARIANT.search(content)
    return found[1].strip() if found else content


def _lines(text: str) -> str:
    """Headings without their signs, lists without colons, at most one blank line, no empty
    sections."""
    text = _SWITCH.sub(lambda match: "" if match[0].isupper() else match[0], text)
    text = _EMPTY.sub(lambda match: "" if match[2] else match[1], text).replace(_GONE, "")
    text = unescape(text).replace("\xa0", " ")
    lines: list[str] = []
    headings: list[tuple[int, str]] = []
    for line in text.splitlines():
        if match := _HEADING.fullmatch(line.strip(" \t")):
            level = len(match[1])
            headings = [h for h in headings if h[0] < level] + [(level, match[2].strip(" \t"))]
            continue
        marks = _LIST.match(line)
        if line.startswith(_CODE):
            body, marks = line[1:].rstrip(), None
        else:
            # what was removed leaves its spaces
            body = _SPACES.sub(" ", line[marks.end() :] if marks else line).strip()
        if not body:
            if lines and lines[-1] and not headings:
                lines.append("")
            continue
        for _, heading in headings:
            lines += ["", heading, ""] if lines and lines[-1] else [heading, ""]
        headings = []
        lines.append(f"* {body}" if marks and set(marks[0]) & set("*#") else body)
    return "\n".join(lines).strip()
