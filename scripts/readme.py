"""Print what README.md shows of the code: `python scripts/readme.py` rewrites those two blocks.

The commands are the output of `python -m llama`; the tree has the first sentence of every file.
"""

import ast
import re
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from llama.__main__ import LISTING  # noqa: E402
from scripts.size import listed_files  # noqa: E402

README = Path(__file__).parent.parent / "README.md"
OTHER = {
    "configs/*.yaml": "the quickstart, the published sizes, and three below them",
    "configs/corpus/*.yaml": "recipes of the corpus",
    "configs/mixtures/*.yaml": "weights per source",
    "scripts/quickstart.sh": "the quickstart, in public commands",
    "tests/": "unit, against a reference, runs, repository",
}
WIDTH = 112


def tree() -> str:
    """A line per file: its path and the beginning of its docstring."""
    rows = []
    for name in listed_files():
        path = README.parent / name
        if name.startswith("tests/") or path.name == "__init__.py":
            continue
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        first = " ".join(doc.split("\n\n")[0].split())
        rows.append((name, re.split(r"\.(?= [A-Z`])|: ", first)[0].replace("``", "`").rstrip(".")))
    rows = sorted(rows + list(OTHER.items()), key=lambda row: (row[0].count("/") > 0, row[0]))
    width = max(len(name) for name, _ in rows)
    room = WIDTH - width - 2
    return "\n".join(
        f"{name:<{width}}  {textwrap.shorten(text, room, placeholder=' ...')}"
        for name, text in rows
    )


def rewritten(text: str) -> str:
    """README with both blocks as they should be now."""
    for title, block in (("## Commands", LISTING), ("## The tree", tree())):
        pattern = rf"({re.escape(title)}\n.*?```text\n).*?(\n```)"
        text = re.sub(pattern, lambda m, b=block: m[1] + b + m[2], text, count=1, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
