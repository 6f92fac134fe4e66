"""The scorecard of `make faults`: goals are judged, rows that have not run are shown as such."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import scorecard
from test_repo import ROOT

TESTS = """
import pytest

@pytest.mark.parametrize("part", [1, 2])
def test_adds(score, scale, part):
    score("kills", scale(1, 500), ">= 1000")
    score("stall_s", 0.01 * part, "<= 0.1")

def test_misses(score):
    score("kills.lost", 1, "0")
    assert False, "one lost"

def test_skips():
    pytest.skip("no second disk here")

def test_unknown(score):
    score("kill", 1, "0")
"""


def test_goals() -> None:
    def judged(goal: str | None, *values: float) -> tuple[str, bool]:
        return scorecard.judged([{"value": value, "goal": goal} for value in values])

    assert judged(">= 1000", 600, 400) == ("1,000 | >= 1000 | met", False)
    assert judged(">= 1000", 600, 399) == ("999 | >= 1000 | MISSED", True)
    assert judged("<= 0.1", 0.05, 0.1) == ("0.1 | <= 0.1 | met", False)
    assert judged("<= 0.1", 0.05, 0.101)[1]
    assert judged("0", 0, 0) == ("0 | 0 | met", False)
    assert judged("0", 0, 1)[1] and judged("1", 0)[1]
    assert judged(None, 43.3) == ("43.3 | |", False)
    assert judged("0") == ("not run | |", False)


@pytest.mark.slow
def test_figures_travel_from_the_fixture_to_the_page(tmp_path: Path) -> None:
    # a copy of what belongs to it, so that the real page stays
    for name in ("tests/conftest.py", "tests/scorecard.yaml", "tests/scorecard.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests/test_it.py").write_text(TESTS)
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", ".", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "tests/test_it.py"]
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    done = run([*command, "--faults", "figures"], cwd=tmp_path, capture_output=True, text=True)
    assert "2 failed, 2 passed, 1 skipped" in done.stdout, done.stdout
    lines = [json.loads(line) for line in (tmp_path / "figures").read_text().splitlines()]
    assert [line["value"] for line in lines if line.get("name") == "kills"] == [500, 500]
    script = [sys.executable, "tests/scorecard.py", "figures"]
    shown = run(script, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 1
    page = (tmp_path / "docs/reliability.md").read_text()
    assert page in shown.stdout
    assert (
        "5 tests, which take\n0 minutes together and run in two halves, 2 failed and 1 skipped"
        in page
    )
    assert "| 1,000 | >= 1000 | met |" in page and "| 0.02 | <= 0.1 | met |" in page
    assert "| 1 | 0 | MISSED |" in page and "| not run | | |" in page
    assert "skipped: tests/test_it.py::test_skips: Skipped: no second disk here" in page
    assert "failed: tests/test_it.py::test_misses: one lost" in page
    assert "kill: not in tests/scorecard.yaml" in page
    (tmp_path / "figures").unlink()
    run(command, cwd=tmp_path, capture_output=True)
    assert not (tmp_path / "figures").exists()


def test_the_page_has_every_row() -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    for section, rows in scorecard.ROWS.items():
        assert f"## {section}\n" in text, "run make faults"
        for what in rows.values():
            assert f"| {what} |" in text, f"{what}: run make faults"
