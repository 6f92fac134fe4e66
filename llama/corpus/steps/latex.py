"""LaTeX sources of a paper to the LaTeX of its text (paper §2.1, after Lewkowycz et al. 2022).

In: the files of a project by name. Out: the main file with what it inputs in place, from its first
section on, without comments and bibliography, the authors' own macros expanded, arguments,
optional arguments and nesting included. What is LaTeX's own stays: formulas, sections, citations.

Everything is cut along one table of matching braces per text, and expansion ends at a depth and at
a size: time is linear in what comes in and out, whatever the macros do.
"""

import posixpath
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

MAX_DEPTH, MAX_INPUTS = 32, 1000
# Characters that expanding macros may add: so many times the text, and this much in any case.
MAX_GROWTH, FREE_GROWTH = 10, 1_000_000

_VERBATIM = re.compile(r"\\begin\{(verbatim\*?|lstlisting|Verbatim|minted|filecontents\*?)\}")
_HIDDEN = re.compile(r"\\begin\{comment\}")
_REFERENCES = re.compile(r"\\begin\{(?:thebibliography|references|bibdiv|biblist)\}")
# \iff is a sign, \ifthenelse takes arguments; to give one a name asks nothing.
_CONDITION = re.compile(
    r"\\newif\s*\\[a-zA-Z@]+|\\let\s*\\[a-zA-Z@]+\s*+=?\s*\\[a-zA-Z@]+|\\(?:(?P<hides>iffalse|if0)"
    r"(?![a-zA-Z@])|(?P<asks>if)(?!f(?![a-zA-Z@])|thenelse)|(?P<ends>else|fi)(?![a-zA-Z@]))"
)
_CLASS = re.compile(
    r"^[^%\n]*\\document(?:class|style)\b\s*(?:\[[^\[\]]*\])?\s*(?:\{\s*(\w*))?", re.MULTILINE
)
# Files with a preamble of their own that are made to be read by others.
_PARTS = ("standalone", "subfiles")
_BEGIN, _END = (re.compile(rf"\\{what}\s*\{{document\}}") for what in ("begin", "end"))
# What a percent sign does not begin a comment in, or a comment with the line end that it eats.
_COMMENT = re.compile(
    r"\\verb\*?([^\sa-zA-Z*])[^\n]{0,300}?\1|\\(?:url|href|path|nolinkurl)\s*\{[^{}\n]*\}|\\[\\%]"
    r"|(?P<line>(?:(?<=\n)|^)[ \t]*%[^\n]*(?:\n|$))|(?P<rest>%[^\n]*)"
)
_INPUT = re.compile(
    r"\\(?:input|include|subfile|subfileinclude)\s*"
    r"(?:\{([^{}\n]{1,300})\}|(?<=input)[ \t]+([^\s{}\\%]{1,300}))"
    r"|\\(?:sub)?import\*?\s*\{([^{}\n]{1,300})\}\s*\{([^{}\n]{1,300})\}"
)
_SECTION = re.compile(r"\\(?:part|chapter|section|subsection|subsubsection|paragraph)\b\*?")
_AFTER_FRONT = re.compile(r"\\end\{abstract\}|\\maketitle")
_BIBLIOGRAPHY = re.compile(
    r"\\(?:bibliography|bibliographystyle|printbibliography|nobibliography)\b\*?"
    r"(?:\[[^\[\]]*\])?(?:\{[^{}]*\})?"
)
_DEFINES = re.compile(
    r"\\(?:(?:re)?newcommand|providecommand|DeclareRobustCommand)\b\*?\s*(?:\{\s*\\([a-zA-Z@]+|.)\s*\}|\\([a-zA-Z@]+|.))"
    r"\s*+(?:\[(\d)\])?\s*+(?:\[((?:[^\[\]{}]|\{[^{}]*\})*+)\])?\s*(?=\{)"
    r"|\\DeclareMathOperator\*?\s*\{?\s*\\([a-zA-Z@]+)\s*\}?\s*(?=\{)"
    r"|\\(?:long\s*)?[egx]?def\s*\\([a-zA-Z@]+|.)\s*+((?:#\d)*+)\s*(?=\{)"
)
# What is \relax by another name is taken away, not meant.
_ALIAS = re.compile(
    r"\\let\s*\\([a-zA-Z]+)\s*+=?\s*+(?!\\(?:relax|undefined|empty|if|fi)|\\[a-zA-Z]*@)(\\[a-zA-Z]+)"
)
_CALL = re.compile(r"\\([a-zA-Z@]+|[^a-zA-Z@])")
_INTERNAL = re.compile(r"\\[a-zA-Z]*@|\\(?:csname|expandafter|futurelet|if[a-z]*)\b")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_STOP = re.compile(r"[{\]]")
_PARAMETER = re.compile(r"#(\d)")
_BLANKS = re.compile(r"\n[ \t]*\n\s*\n")


class Macro(NamedTuple):
    """`arguments` is how many it takes; the first may be left out where there is a `default`."""

    arguments: int
    default: str | None
    body: str


class Paper(NamedTuple):
    """The text, and what happened on the way, to be counted."""

    text: str
    notes: tuple[str, ...]


def clean(files: Mapping[str, str], main: str) -> Paper:
    """The text of the project whose main file is `main`."""
    notes: set[str] = set()
    whole = "".join(_inputs(files, main, notes))
    whole = _without_false("".join(text for text, block in _blocks(whole, _HIDDEN) if not block))
    preamble, body = _halves(whole)
    styles = (without_comments(t) for name, t in files.items() if name.endswith((".sty", ".cls")))
    macros: dict[str, Macro] = {}
    for source in (*styles, preamble):
        _, found = definitions(source)
        macros.update(found)
    body, found = definitions(body)
    macros.update(found)
    body = _BIBLIOGRAPHY.sub("", _from_first_section(body, macros, notes))
    body = "".join(text for text, block in _blocks(body, _REFERENCES) if not block)
    # one that never ends: nothing follows it
    body = _REFERENCES.split(body, maxsplit=1)[0]
    expander = _Expander(macros, MAX_GROWTH * len(body) + FREE_GROWTH)
    text = expander.expand(body)
    if expander.stopped:
        notes.add("macro limit")
    return Paper(_BLANKS.sub("\n\n", text).strip(), tuple(sorted(notes)))


def find_main(files: Mapping[str, str]) -> str | None:
    """The file that begins the document, and is no part or figure of another one."""
    found = []
    for name, text in files.items():
        if not name.endswith((".tex", ".ltx", ".latex")):
            continue
        declared, begins = _CLASS.search(text), bool(_BEGIN.search(text))
        if begins or declared:
            stem = posixpath.basename(name).rpartition(".")[0].lower()
            likely = stem in ("main", "ms", "paper", "article", "manuscript", "root")
            is_part = declared is not None and declared[1] in _PARTS
            found.append((not is_part, bool(declared) and begins, likely, len(text), name))
    return max(found)[-1] if found else None


def _halves(source: str) -> tuple[str, str]:
    """(preamble, body) of a file; one that does not begin a document has no preamble."""
    begin = _BEGIN.search(source)
    body = source[begin.end() :] if begin else source
    return source[: begin.start()] if begin else "", _END.split(body, maxsplit=1)[0]


def _without_false(source: str) -> str:
    """Without what \\iffalse and \\if0 hide, up to their own \\fi or \\else."""
    # what is open: whether it hides text, and from where on
    opened: list[tuple[bool, int]] = []
    hidden: list[tuple[int, int]] = []
    for match in _CONDITION.finditer(source):
        if match["hides"] or match["asks"]:
            opened.append((bool(match["hides"]), match.start()))
        elif match["ends"] and opened:
            hides, start = opened.pop()
            if hides:
                hidden.append((match.start() if start < 0 else start, match.end()))
            if match["ends"] == "else":
                opened.append((hides, -1))
    kept, at = [], 0
    for start, end in sorted(hidden):
        kept.append(source[at : max(at, start)])
        at = max(at, end)
    return "".join([*kept, source[at:]])


def without_comments(source: str) -> str:
    """A line that is only a comment goes whole; of others the end, `\\%` and verbatim text stay."""

    def kept(match: re.Match[str]) -> str:
        return "" if match["line"] is not None or match["rest"] is not None else match[0]

    parts = _blocks(source, _VERBATIM)
    return "".join(text if block else _COMMENT.sub(kept, text) for text, block in parts)


def _blocks(source: str, opening: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """The source in parts, and whether each is a block that is opened and closed.

    What a block is closed with is searched for in vain only once, so time is linear.
    """
    endless: set[str] = set()
    done = at = 0
    while match := opening.search(source, at):
        closing = match[0].replace("begin", "end", 1).replace(r"\iffalse", r"\fi")
        end = -1 if closing in endless else source.find(closing, match.end())
        at = match.end()
        if end < 0:
            endless.add(closing)
            continue
        yield source[done : match.start()], False
        done = at = end + len(closing)
        yield source[match.start() : done], True
    yield source[done:], False


def _inputs(files: Mapping[str, str], main: str, notes: set[str]) -> Iterator[str]:
    """The main file's text with every input in its place, files of the project only."""
    # files that are open: name, text, where to read on
    stack = [(main, without_comments(files[main]), 0)]
    # a file may be read again and again
    n, left = 0, FREE_GROWTH + sum(map(len, files.values()))
    while stack:
        name, text, at = stack.pop()
        match = _INPUT.search(text, at)
        if match is None:
            yield text[at:]
            continue
        yield text[at : match.start()]
        stack.append((name, text, match.end()))
        wanted = match[1] or match[2] or posixpath.join(match[3], match[4])
        found = _look_up(files, wanted.strip().strip('"'), posixpath.dirname(name))
        n, left = n + 1, left - len(files.get(found or "", ""))
        if found is None:
            notes.add("input missing")
        elif any(found == open_name for open_name, _, _ in stack) or n > MAX_INPUTS or left < 0:
            notes.add("input in a circle")
        else:
            stack.append((found, _part(files[found]), 0))


def _part(source: str) -> str:
    """What another file reads of this one: of a document of its own the body."""
    text = without_comments(source).partition(r"\endinput")[0]
    return _halves(text)[1] if _BEGIN.search(text) and _END.search(text) else text


def _look_up(files: Mapping[str, str], wanted: str, folder: str) -> str | None:
    for base in dict.fromkeys(("", folder)):
        path = posixpath.normpath(posixpath.join(base, wanted))
        for candidate in (path, f"{path}.tex", f"{path}.ltx"):
            if candidate in files:
                return candidate
    return None


def _from_first_section(body: str, macros: Mapping[str, Macro], notes: set[str]) -> str:
    own = {name for name, macro in macros.items() if _SECTION.search(macro.body)}
    for match in _CALL.finditer(body):
        if match[1] in own or _SECTION.fullmatch(match[0]):
            return body[match.start() :]
    # letters have none: what follows the abstract or the title
    notes.add("no section")
    ends = [match.end() for match in _AFTER_FRONT.finditer(body)]
    return body[max(ends, default=0) :]


def matching(text: str) -> Sequence[int]:
    """Where the brace that opens at a position closes, or 0."""
    closes, opened = array("I", bytes(4 * len(text))), array("I")
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closes[opened.pop()] = match.start()
    return closes


def definitions(source: str) -> tuple[str, dict[str, Macro]]:
    """The source without definitions of macros, and those; one with a pattern (\\def\\x[#1]) stays.

    So do those of LaTeX's inner workings: what they stand for is layout, not text.
    """
    closes = matching(source)
    # where each is, so that what is nested is not searched again and again
    internal = [match.start() for match in _INTERNAL.finditer(source)]
    kept: list[str] = []
    macros = {name: Macro(0, None, body) for name, body in _ALIAS.findall(source)}
    at = 0
    for match in _DEFINES.finditer(source):
        end = closes[match.end()]
        name = match[1] or match[2] or match[5] or match[6]
        if match.start() < at or not end:
            continue
        body = source[match.end() + 1 : end]
        inside = bisect_left(internal, match.end())
        if _INTERNAL.match(f"\\{name} ") or inside < bisect_left(internal, end):
            continue
        if match[5]:
            body = rf"\operatorname{{{body}}}"
        # it only asks for a space where there is one
        body = re.sub(r"\\xspace(?![a-zA-Z@])\s*", "", body)
        arguments = len(match[7]) // 2 if match[7] is not None else int(match[3] or 0)
        macros[name] = Macro(arguments, match[4], body)
        kept.append(source[at : match.start()])
        at = end + 1
    kept.append(source[at:])
    return "".join(kept), macros


class _Expander:
    """Replaces calls of macros until the budget of characters is spent."""

    def __init__(self, macros: Mapping[str, Macro], budget: int) -> None:
        self.macros, self.budget, self.stopped = dict(macros), budget, False

    def expand(self, text: str, depth: int = 0) -> str:
        """The text with every call replaced by the macro's expanded body."""
        if depth > MAX_DEPTH:
            self.stopped = True
            return text
        out: list[str] = []
        closes: Sequence[int] | None = None
        at = 0
        for match in _CALL.finditer(text):
            macro = self.macros.get(match[1])
            if macro is None or match.start() < at:
                continue
            arguments: list[str] = []
            end = match.end()
            if macro.arguments:
                closes = matching(text) if closes is None else closes
                taken = _arguments(text, end, macro, closes)
                if taken is None:
                    continue
                arguments, end = [self.expand(a, depth + 1) for a in taken[0]], taken[1]
            parts = _filled(macro.body, arguments)
            self.budget -= len(macro.body) + sum(map(len, parts))
            if self.budget < 0:
                self.stopped = True
                break
            body = "".join(parts)
            # in its own body a macro means what it meant before
            del self.macros[match[1]]
            expanded = self.expand(body, depth + 1) if "\\" in body else body
            self.macros[match[1]] = macro
            out += (text[at : match.start()], expanded)
            # \alpha x must not become \alphax
            if match[1].isalpha() and re.search(r"\\[a-zA-Z@]+$", expanded[-40:]):
                out.append(" " if text[end : end + 1].isalpha() else "")
            # {} behind a name only ends it
            at = end + 2 * (not macro.arguments and text.startswith("{}", end))
        out.append(text[at:])
        return "".join(out)


def _filled(body: str, arguments: list[str]) -> list[str]:
    """The body in parts: put together it may be far longer than all that there is."""
    parts = _PARAMETER.split(body)
    for i, number in enumerate(parts[1::2]):
        known = 0 < int(number) <= len(arguments)
        parts[2 * i + 1] = arguments[int(number) - 1] if known else f"#{number}"
    return parts


def _bracket(text: str, at: int, closes: Sequence[int]) -> int:
    """Where the optional argument that begins at a place ends, or -1; braces may hold brackets."""
    end = at if text.startswith("[", at) else len(text)
    while match := _STOP.search(text, end + 1, max(at + 1000, end + 2)):
        if match[0] == "]":
            return match.start()
        end = closes[match.start()] or match.start()
    return -1


def _arguments(
    text: str, at: int, macro: Macro, closes: Sequence[int]
) -> tuple[list[str], int] | None:
    """(the arguments of a call, where it ends), or None where they are not all there."""
    found: list[str] = []
    for number in range(macro.arguments):
        while text[at : at + 1].isspace():
            at += 1
        if number == 0 and macro.default is not None:
            end = _bracket(text, at, closes)
            found.append(macro.default if end < 0 else text[at + 1 : end])
            at = at if end < 0 else end + 1
            continue
        if text[at : at + 1] == "{":
            close = closes[at]
            if not close:
                return None
            found.append(text[at + 1 : close])
            at = close + 1
        elif single := _CALL.match(text, at):
            found.append(single[0])
            at = single.end()
        elif at < len(text) and text[at] != "}":
            found.append(text[at])
            at += 1
        else:
            return None
    return found, at
