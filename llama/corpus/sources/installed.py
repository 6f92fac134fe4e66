"""Recipe `installed`: real text that every machine with Python has, for the quickstart.

In: the Python that runs this. Out, by `part`: `github`, the sources of one half of the standard
library, a file a document; `docs`, the docstrings of the other half, a module a document, so that
no text is in both; `manual`, the language reference that comes as documentation topics, a section
a document; `packages`, the long descriptions of the installed packages. Which half is decided by a
hash of the file's name.
"""

import ast
import email
import hashlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from llama.cli import UserError
from llama.config import Count
from llama.corpus import raw
from llama.corpus.document import Document, Dropped, Item, Step
from llama.corpus.plan import LeftOut, Piece, Plan, find, laid_out
from llama.corpus.steps import text

_TOPICS = "pydoc_data/topics.py"
# Not text that anyone reads: tests, tables of characters, build settings, and what pip installed.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
_NOT_LIBRARY |= {"pydoc_data", "lib2to3", "__pycache__", "ensurepip", "turtledemo"}
# A line underlined in the characters of the reference's headings.
_HEADING = re.compile(r"^(?=\S.*\n(?:\*{3,}|={3,}|-{3,}|~{3,}|\^{3,})\n)", re.MULTILINE)
_DOCUMENTED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Options:
    """What a run of the recipe may choose.

    Args:
        part: Which of the texts.
        source: Name of the source in every document; empty for the name of the output folder.
        max_bytes: Most bytes of input files, taken in the order of a hash of their names.
        min_chars: Shorter documents are dropped.
        unit_bytes: Input that becomes one output shard.
    """

    part: Literal["github", "docs", "manual", "packages"] = "github"
    source: str = ""
    max_bytes: Count = Count(8_000_000)
    min_chars: int = 200
    unit_bytes: Count = Count(1_000_000)


def plan(options: Options, inputs: Sequence[Path]) -> Plan:
    """Lay out the files of the part."""
    if inputs:
        raise UserError("recipe installed reads the installed Python: --input has no effect")
    folder = Path(sysconfig.get_path("purelib" if options.part == "packages" else "stdlib"))
    pieces, _ = find([folder], partial(_format_of, options.part))
    kept, left_out, room = [], [], int(options.max_bytes)
    for piece in sorted(pieces, key=lambda piece: _hash(piece.name)):
        if (room := room - piece.size) >= 0:
            kept.append(piece)
        else:
            left_out.append(LeftOut(piece.name, "max_bytes", piece.size))
    if not kept:
        raise UserError(f"part {options.part} found nothing to read below {folder}")
    return laid_out("installed", options, read, (sorted(kept), left_out))


def steps(options: Options) -> list[Step]:
    """Line ends, then the least length."""
    return [text.unix_line_ends, partial(text.at_least, min_chars=options.min_chars)]


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def _format_of(part: str, name: str) -> str | None:
    """The part's name for files that belong to it."""
    parts = name.split("/")
    if part == "packages":
        wanted = len(parts) == 2 and parts[0].endswith(".dist-info") and parts[1] == "METADATA"
    elif part == "manual":
        wanted = name == _TOPICS
    else:
        half = "github" if _hash(name)[0] % 2 else "docs"
        in_library = name.endswith(".py") and not _NOT_LIBRARY & set(parts)
        wanted = in_library and "config-" not in name and part == half
    return part if wanted else None


def read(options: Options, piece: Piece) -> Iterator[Item]:
    """Documents of one file."""
    content, _ = raw.decode(Path(piece.path).read_bytes())
    if options.part == "manual":
        yield from _topics(options, piece, content)
        return
    if options.part == "docs":
        try:
            content = docstrings(content, piece.name.removesuffix(".py").replace("/", "."))
        except SyntaxError as error:
            # code templates among the library's files are no Python
            yield Dropped(piece.name, "no_python", piece.size, str(error))
            return
    if options.part == "packages":
        message = email.message_from_string(content)
        content = str(message.get_payload()) or message.get("Description", "")
    yield Document(piece.name, content, options.source, {})


def _topics(options: Options, piece: Piece, content: str) -> Iterator[Item]:
    """Sections of the topics: one big dictionary in a source file, which is read, not run."""
    values = [getattr(node, "value", None) for node in ast.parse(content).body]
    for value in values:
        topics = ast.literal_eval(value) if isinstance(value, ast.Dict) else {}
        for name, topic in topics.items():
            for number, section in enumerate(filter(None, _HEADING.split(topic)), 1):
                yield Document(f"{piece.name}:{name}:{number}", section, options.source, {})


def docstrings(code: str, module: str) -> str:
    """What a module says about itself: each docstring under its signature, in the file's order."""
    tree = ast.parse(code)
    parts = [f"{module}\n\n{ast.get_docstring(tree) or ''}".rstrip()]

    def visit(node: ast.AST, path: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _DOCUMENTED):
                name = f"{path}.{child.name}"
                given = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                if documentation := ast.get_docstring(child):
                    parts.append(f"{name}{given}\n\n{documentation}")
                visit(child, name)
            elif isinstance(child, ast.If | ast.Try):
                visit(child, path)

    visit(tree, module)
    return "\n\n\n".join(parts) if len(parts) > 1 or ast.get_docstring(tree) else ""
