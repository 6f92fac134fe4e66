"""Scorecard of `make faults`: figures of the tests in, a table and docs/reliability.md out.

`python scripts/scorecard.py FILE`, where FILE has a JSON line for every call of the tests' fixture
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

What was done to runs, and what came of it. `make faults` writes this page: {tests} tests in
{minutes:.0f} minutes on {cores} cores ({machine}), {failed} failed, {skipped} skipped. A smaller
number of the same faults is a part of `make test`.
"""


def judged(lines: list[dict[str, Any]]) -> tuple[str, bool | None]:
    """Cells of a row, and whether its goal is met; None where there is no goal to miss."""
    if not lines:
        return "not run | |", None
    goal, values = lines[0]["goal"], [line["value"] for line in lines]
    sign, _, bound = (goal or "").rpartition(" ")
    value = max(values) if sign == "<=" else sum(values)
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    if goal is None:
        return f"{shown} | |", None
    low, high = sign != "<=" and value < float(bound), sign != ">=" and value > float(bound)
    return f"{shown} | {goal} | {'MISSED' if low or high else 'met'}", not (low or high)


def page(lines: list[dict[str, Any]]) -> tuple[str, bool]:
    """The page in Markdown, and whether every goal that was measured is met."""
    tests = [line for line in lines if "test" in line]
    count = {word: sum(t["outcome"] == word for t in tests) for word in ("failed", "skipped")}
    python = f"{sys.platform} {platform.machine()}, Python {platform.python_version()}"
    machine = f"{python}, torch {version('torch').split('+')[0]}"
    minutes = sum(test["seconds"] for test in tests) / 60
    text = HEAD.format(
        tests=len(tests), minutes=minutes, cores=os.cpu_count(), machine=machine, **count
    )
    good = True
    for section, rows in ROWS.items():
        text += f"\n## {section}\n\n| what | figure | goal | |\n|---|---:|---:|---|\n"
        for name, what in rows.items():
            cells, met = judged([line for line in lines if line.get("name") == name])
            text, good = text + f"| {what} | {cells} |\n", good and met is not False
    odd = [t for t in tests if t["outcome"] != "passed"]
    text += "\n## Tests that did not pass\n\n" * bool(odd)
    text += "".join(f"- {t['outcome']}: `{t['test']}`: {t['why']}\n" for t in odd)
    return text, good


if __name__ == "__main__":
    text, good = page(list(map(json.loads, Path(sys.argv[1]).read_text().splitlines())))
    (ROOT / "docs/reliability.md").write_text(text)
    print(text)
    sys.exit(not good)
