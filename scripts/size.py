"""Lines of the project: the total without tests, the largest files, the longest functions."""

import ast
import subprocess
from pathlib import Path

LIMIT_LINES = 15_000


def main() -> None:
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
    print(f"{sum(lines.values()):,} lines of at most {LIMIT_LINES:,}, and {tests:,} of tests\n")
    print("largest files")
    for path, number in sorted(lines.items(), key=lambda item: -item[1])[:10]:
        print(f"{number:6,}  {path}")
    print("\nlongest functions")
    for number, where in sorted(functions, reverse=True)[:10]:
        print(f"{number:6,}  {where}")


if __name__ == "__main__":
    main()
