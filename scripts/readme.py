"""Print what README.md shows of the code: `python scripts/readme.py` rewrites those two blocks.

The commands are the output of `python -m llama`; the tree has the first sentence of every file.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from llama.__main__ import listing  # noqa: E402

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
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"],
        cwd=README.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    rows = []
    for name in sorted(set(listed)):
        path = README.parent / name
        if not path.exists() or name.startswith("tests/") or path.name == "__init__.py":
            continue
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        first = " ".join(doc.split("\n\n")[0].split())
        rows.append((name, re.split(r"\.(?= [A-Z`])", first)[0].replace("``", "`").rstrip(".")))
    rows += list(OTHER.items())
    rows.sort(key=lambda row: (row[0].count("/") > 0, row[0]))
    width = max(len(name) for name, _ in rows)
    lines = []
    for name, text in rows:
        room = WIDTH - width - 2
        # the longest run of whole clauses that fits
        cuts = [m.start() for m in re.finditer(r"[;:] |$", text) if m.start() <= room]
        short = text[: max(cuts)] if cuts else text[: room - 3].rsplit(" ", 1)[0] + " ..."
        lines.append(f"{name:<{width}}  {short}")
    return "\n".join(lines)


def rewritten(text: str) -> str:
    """README with both blocks as they should be now."""
    for title, block in (("## Commands", listing()), ("## The tree", tree())):
        pattern = rf"({re.escape(title)}\n.*?```text\n).*?(\n```)"
        text = re.sub(pattern, lambda m, b=block: m[1] + b + m[2], text, count=1, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
