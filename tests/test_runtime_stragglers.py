"""Slow ranks: by a clock of the test's own, and one that sleeps."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from made_guard import HSDP, go, run
from made_starts import make_tokens

from llama.runtime import stragglers, world

pytestmark = pytest.mark.faults


def paces(times: list[list[float]], monkeypatch: pytest.MonkeyPatch) -> list[stragglers.Pace]:
    """Ranks whose steps take `times` by a clock of our own, one of two seconds waiting apart."""
    made, now = [], [0.0]
    monkeypatch.setattr(stragglers.time, "monotonic", lambda: now[0])
    waited = stragglers._waited()
    for steps in times:
        pace = stragglers.Pace()
        pace.mark()
        for own in steps:
            now[0] += own + 2
            waited[0] += 2
            pace.mark()
        made.append(pace)
    return made


def gathered(values: list[Any], monkeypatch: pytest.MonkeyPatch) -> world.World:
    """Rank 0 of a world whose ranks say `values`."""
    monkeypatch.setattr(world.World, "gather", lambda self, value: values)
    return world.World(0, len(values), 0, torch.device("cpu"), False)


@pytest.mark.parametrize(("ranks", "factor"), [(2, 1.2), (4, 1.2), (5, 3), (4, 1.05)])
def test_a_slow_rank_is_named_once(
    ranks: int, factor: float, monkeypatch: pytest.MonkeyPatch, rng: random.Random, capsys
) -> None:
    slow = rng.randrange(ranks)
    times = [[0.1 * rng.uniform(0.98, 1.02) for _ in range(30)] for _ in range(ranks)]
    times[slow] = [factor * t for t in times[slow]]
    times[(slow + 1) % ranks][7] = 5.0  # one hiccup is no slow rank
    all_of_them = paces(times, monkeypatch)
    here = gathered(
        [(stragglers.median(p.own_s), None, True, "node") for p in all_of_them], monkeypatch
    )
    for _ in range(2):
        row = stragglers.compare(all_of_them[0], here)
    said = capsys.readouterr().out
    if factor == 1.05:
        assert not said
    else:
        assert row["slowest_rank"] == slow and said.count(f"rank {slow} on node is") == 1
        assert row["own_s_max"] / row["own_s"] == pytest.approx(factor, rel=0.06)


def test_on_gpus_a_slow_product_or_a_host_that_never_waits_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Of hosts that wait for their device, or for another host, none keeps the others waiting."""
    pace = paces([[0.1] * 20], monkeypatch)[0]
    assert list(pace.step_s) == pytest.approx([2.1] * 20)
    ranks: list[Any] = [(0.1, 2.0, False, "a"), (0.1, 2.0, False, "b"), (0.3, 2.0, False, "c")]
    row = stragglers.compare(pace, gathered(ranks, monkeypatch), 2.0)
    assert row["own_s"] == row["own_s_max"] == 2.0 and not capsys.readouterr().out
    ranks[2] = (0.3, 2.0, True, "c")
    stragglers.compare(pace, gathered(ranks, monkeypatch), 2.0)
    assert "rank 2 on c is 3.00 x slower" in capsys.readouterr().out
    ranks[1] = (0.1, 2.5, False, "b")
    row = stragglers.compare(pace, gathered(ranks, monkeypatch), 2.0)
    assert row["slowest_rank"] == 1 and row["own_s_max"] == 2.5
    assert "rank 1 on b is 1.25 x slower" in capsys.readouterr().out


@pytest.mark.full
def test_a_rank_that_sleeps_is_named(tmp_path: Path) -> None:
    """Three seconds a step: the other one's own part is less, also where the machine is busy."""
    make_tokens(tmp_path)
    slow = run(tmp_path, "slow", **HSDP, **{"train.tokens": 256 * 12})
    said = go(slow, "step.begun:rank=1,action=hang,seconds=3", 2)
    assert "WARNING: rank 1 on" in said and "x slower than the median rank" in said
