"""Lines of the project: the total without tests, the largest files, the longest functions.

What counts is code: blank lines, comments and docstrings are shown, and cost nothing.
"""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

LIMIT_LINES = 15_000
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


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], capture_output=True, text=True
    ).stdout.split()
    files = {path: Path(path).read_text() for path in sorted(set(listed)) if Path(path).exists()}
    code = {path: text for path, text in files.items() if not path.startswith("tests/")}
    lines = {path: text.count("\n") for path, text in code.items()}
    functions = [
        (node.end_lineno - node.lineno + 1, f"{path}:{node.lineno} {node.name}")
        for path, text in code.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    ]
    tests = sum(text.count("\n") for path, text in files.items() if path.startswith("tests/"))
    total = sum(map(code_lines, code.values()))
    print(
        f"{total:,} lines of code of at most {LIMIT_LINES:,}; with docstrings, comments and blank "
        f"lines {sum(lines.values()):,}, and {tests:,} of tests\n"
    )
    print("largest files")
    for path, number in sorted(lines.items(), key=lambda item: -item[1])[:10]:
        print(f"{number:6,}  {path}")
    print("\nlongest functions")
    for number, where in sorted(functions, reverse=True)[:10]:
        print(f"{number:6,}  {where}")
    return int(total > LIMIT_LINES)


if __name__ == "__main__":
    sys.exit(main())
