"""Lines of the project: the total, the largest files, the longest functions.

What counts is the code that users run: tests, benchmarks, blank lines, comments and docstrings are
shown, and cost nothing.
"""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The aim, and what it must not grow beyond until it is met.
AIM_LINES, LIMIT_LINES = 15_000, 16_241
JUDGES = ("tests/", "benchmarks/")
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
_NO_CODE |= {tokenize.ENDMARKER}


def code_lines(text: str) -> int:
    """Lines with code on them; those of a docstring have none."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def listed_files() -> list[str]:
    """Python files of the project: those that git has or would take."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted({path for path in listed.split() if (ROOT / path).exists()})


def main() -> int:
    files = {path: (ROOT / path).read_text() for path in listed_files()}
    code = {path: text for path, text in files.items() if not path.startswith(JUDGES)}
    lines = {path: text.count("\n") for path, text in code.items()}
    functions = [
        (node.end_lineno - node.lineno + 1, f"{path}:{node.lineno} {node.name}")
        for path, text in code.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    ]
    tests, benchmarks = (
        sum(code_lines(text) for path, text in files.items() if path.startswith(folder))
        for folder in JUDGES
    )
    total = sum(map(code_lines, code.values()))
    print(
        f"{total:,} lines of code of at most {LIMIT_LINES:,}, the aim is {AIM_LINES:,}; with "
        f"docstrings, comments and blank lines {sum(lines.values()):,}; {tests:,} of tests "
        f"and {benchmarks:,} of benchmarks\n"
    )
    largest = [(number, path) for path, number in lines.items()]
    for title, found in (("largest files", largest), ("longest functions", functions)):
        print(title)
        for number, where in sorted(found, reverse=True)[:10]:
            print(f"{number:6,}  {where}")
    return int(total > LIMIT_LINES)


if __name__ == "__main__":
    sys.exit(main())
