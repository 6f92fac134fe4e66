"""docs/operations.md has a row for every warning and error of a run, and for nothing else."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_repo import ROOT

PAGE = ROOT / "docs" / "operations.md"
# what a running job can print; the shards' may have rows, but most of them come at the start
FILES = [
    ROOT / "train.py",
    ROOT / "llama/data/loader.py",
    *sorted((ROOT / "llama/runtime").glob("*.py")),
    *sorted((ROOT / "llama/parallel").glob("*.py")),
]
MORE_FILES = [ROOT / f"llama/{name}.py" for name in ("data/shards", "cli", "files")]
# What the functions are called by which a process tells why it ends.
TELLING = {"signals.end", "end"}


def texts(node: ast.AST) -> Iterator[str]:
    """The texts of an expression, with … for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
        yield "".join(map(str, parts))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif not isinstance(node, ast.FormattedValue):
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


def messages(path: Path) -> Iterator[str]:
    """Texts that are raised, end a process, or call themselves a warning or an error."""
    tree = ast.parse(path.read_text())
    pieces = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    for node in ast.walk(tree):
        telling = isinstance(node, ast.Call) and ast.unparse(node.func) in TELLING
        told = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("problem", "why")
        found = list(texts(node)) if isinstance(node, ast.Raise) or telling or told else []
        if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in pieces:
            found += [t for t in texts(node) if re.match(r"WARNING|ERROR|FAULT", t)]
        # what is filled in alone, and keys, say nothing
        yield from (t for t in found if len(t.replace("…", "").split()) > 1)


def rows() -> list[str]:
    """The first cells of the table of messages."""
    _, _, table = PAGE.read_text().partition("| message |")
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


def covers(row: str, text: str) -> bool:
    return bool(re.search(".*".join(map(re.escape, row.split("…"))), " ".join(text.split())))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_message_has_a_row(path: Path) -> None:
    listed = rows()
    missing = {t for t in messages(path) if not any(covers(row, t) for row in listed)}
    assert not missing, f"{PAGE.name} does not say what to do for {sorted(missing)}"


def test_every_row_is_a_message_and_says_enough() -> None:
    known = [t for path in FILES + MORE_FILES for t in messages(path)]
    known += [t for path in FILES for t in texts(ast.parse(path.read_text()))]
    listed = rows()
    assert len(listed) == len(set(listed)) > 30
    for row in listed:
        assert len(row) >= 12, row
        assert any(covers(row, text) for text in known), f"{row}: nothing says that any more"
