"""Scorecard of `make faults`: figures of the tests in, a table and docs/reliability.md out.

`python tests/scorecard.py FILE`, where FILE has a JSON line for every call of the tests' fixture
`score(name, value, goal)` and for every test. Figures of one name are added up; where the goal is
a ceiling (`<= 1`) the largest counts. Exits with 1 for a missed goal; a row of
tests/scorecard.yaml that nobody measured is shown as not run.
"""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
ROWS: dict[str, dict[str, str]] = yaml.safe_load((ROOT / "tests/scorecard.yaml").read_text())
HEAD = """# Reliability

What was done to runs, and what came of it. `make faults` writes this page: {} tests, which take
{:.0f} minutes together and run in two halves, {} failed and {} skipped, on {} cores ({} {}, torch
{}). A smaller number of the same faults is a part of `make test`.
"""


def judged(lines: list[dict[str, Any]]) -> tuple[str, bool]:
    """Cells of a row, and whether its goal is missed."""
    if not lines:
        return "not run | |", False
    goal, values = lines[0]["goal"] or "", [line["value"] for line in lines]
    sign, _, bound = goal.rpartition(" ")
    value = max(values) if sign == "<=" else sum(values)
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    if not goal:
        return f"{shown} | |", False
    low, high = sign != "<=" and value < float(bound), sign != ">=" and value > float(bound)
    return f"{shown} | {goal} | {'MISSED' if low or high else 'met'}", low or high


def page(lines: list[dict[str, Any]]) -> tuple[str, bool]:
    """The page in Markdown, and whether a goal is missed."""
    tests, missed = [line for line in lines if "test" in line], False
    failed, skipped = (sum(t["outcome"] == word for t in tests) for word in ("failed", "skipped"))
    machine = (os.cpu_count(), sys.platform, platform.machine(), version("torch").split("+")[0])
    minutes = sum(test["seconds"] for test in tests) / 60
    text = HEAD.format(len(tests), minutes, failed, skipped, *machine)
    for section, rows in ROWS.items():
        text += f"\n## {section}\n\n| what | figure | goal | |\n|---|---:|---:|---|\n"
        for name, what in rows.items():
            cells, below = judged([line for line in lines if line.get("name") == name])
            text, missed = text + f"| {what} | {cells} |\n", missed or below
    odd = [t for t in tests if t["outcome"] != "passed"]
    text += "\n## Tests that did not pass\n\n" * bool(odd)
    return text + "".join(f"- {t['outcome']}: {t['test']}: {t['why']}\n" for t in odd), missed


if __name__ == "__main__":
    text, missed = page(list(map(json.loads, Path(sys.argv[1]).read_text().splitlines())))
    (ROOT / "docs/reliability.md").write_text(text)
    print(text)
    sys.exit(missed)
