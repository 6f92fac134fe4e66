"""Shared by all tests: a fresh random generator whose seed is printed when a test fails, and what
`make faults` adds: full scale and figures for the scorecard.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from scorecard import ROWS

T = TypeVar("T")


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with token shards of two sources; test_runs.py has one made by commands."""
    from made_starts import make_tokens

    place = tmp_path_factory.mktemp("workspace")
    make_tokens(place)
    return place


@pytest.fixture
def inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A small run's state, before its first step, that skips spikes."""
    from made_guard import state_in

    monkeypatch.chdir(workspace)
    with state_in("inside", **{"guard.spike": "skip"}) as state:
        yield state


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", metavar="FILE", help="faults at full scale; their figures are added to FILE"
    )


@pytest.fixture
def scale(pytestconfig: pytest.Config) -> Callable[[T, T], T]:
    """`scale(60, 1000)`: the first in `make test`, the second in `make faults`."""
    return lambda small, full: full if pytestconfig.getoption("--faults") else small


@pytest.fixture
def score(pytestconfig: pytest.Config) -> Callable[..., None]:
    """`score(name, value, goal)`: a figure for the scorecard, kept in `make faults` only.

    The name is one of tests/scorecard.yaml; the goal is `0`, `>= 1000`, `<= 0.1` or None for a
    figure that is only shown. Figures of one name are added up, ceilings take the largest.
    """

    def add(name: str, value: float, goal: str | None = None) -> None:
        assert any(name in rows for rows in ROWS.values()), f"{name}: not in tests/scorecard.yaml"
        _record(pytestconfig, {"name": name, "value": value, "goal": goal})

    return add


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        why = report.longrepr[2] if report.skipped else str(call.excinfo and call.excinfo.value)
        line = {"test": item.nodeid, "outcome": report.outcome, "seconds": report.duration}
        _record(item.config, line | {"why": " ".join(why.split())[:200]})
    return report


def _record(config: pytest.Config, line: dict[str, Any]) -> None:
    if option := config.getoption("--faults"):
        # tests change the working folder
        path = config.invocation_params.dir / option
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
