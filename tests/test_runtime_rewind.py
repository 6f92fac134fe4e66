"""Runs that are rewound: what they pass over, what a kill leaves of it, and where it ends."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_guard import SPIKE, STEPS, go, run
from made_starts import Run, make_tokens

import train
from llama.data import ledger, schedule
from llama.data.order import Order
from llama.runtime import checkpoint, metrics

pytestmark = pytest.mark.faults


# -- the order and the rows ------------------------------------------------------------------------


def test_a_passed_over_range_outlives_a_resume_before_it_and_a_ramp(inside: train.State) -> None:
    cfg = inside.cfg
    cfg.train.batch_ramp = [(128, 10), (192, 15)]
    order = schedule.plan(cfg, inside.sources)
    skipping = schedule.skip(cfg, order, 6, 9)
    saved = json.loads(train.config.json.dumps([vars(s) for s in skipping.segments]))
    for step in (2, 6, 8, 12, 30):
        again, _ = schedule.go_on(cfg, inside.sources, saved, step, set())
        assert again.segments == skipping.segments, step
    assert [s.batch_windows for s in skipping.segments] == [4, 4, 6, 8]
    passed = _windows(order.batch(step) for step in range(6, 9))
    assert not set(passed) & set(_windows(skipping.batch(step) for step in range(40)))


def _windows(batches: Any) -> list[tuple[int, int, int]]:
    return [row for b in batches for row in zip(*(c.tolist() for c in b), strict=True)]


def test_rows_of_an_abandoned_branch_stay_in_the_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "branch": 0} for s in range(1, 8)]
    rows += [{"step": s, "branch": 1} for s in range(4, 7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')
    metrics.keep_rows(path, 5, 1)
    kept = list(map(json.loads, path.open()))
    assert kept == rows[:-1]
    stands = metrics.lineage(kept)
    assert [(r["step"], r["branch"]) for r in stands] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]


def test_of_abandoned_checkpoints_the_last_ones_stay(tmp_path: Path) -> None:
    """Each rewind leaves some: without an end they would fill the disk."""
    for branch in range(1, 6):
        for step in (10, 20, 30):
            path = checkpoint.path_of(tmp_path, step)
            path.mkdir(parents=True, exist_ok=True)
            (path / "state.json").write_text(json.dumps({"branch": branch - 1, "step": step}))
        checkpoint.abandon(tmp_path, 10, branch, 2)
    names = {path.name for path in checkpoint.folder(tmp_path).iterdir()}
    assert names == {"step-00000010", "abandoned-8", "abandoned-9"}
    kept = [checkpoint.read_state(tmp_path / f"ckpt/abandoned-{n}") for n in (8, 9)]
    assert [(s["branch"], s["step"]) for s in kept] == [(4, 20), (4, 30)]


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rewound(workspace: Path) -> tuple[Run, str]:
    new = run(workspace, "rewound", **{"guard.spike": "rewind", "checkpoint.resume": "never"})
    return new, go(new, SPIKE)


@pytest.mark.slow
def test_a_rewind_passes_over_the_named_batches(rewound: tuple[Run, str]) -> None:
    whole, said = rewound
    rows, folder = whole.rows(), whole.folder
    assert "step 30 is a sudden spike" in said and "back to step 20, branch 1" in said
    assert [row["step"] for row in rows if row["branch"] == 0] == list(range(1, 31))
    assert [row["step"] for row in rows if row["branch"] == 1] == list(range(21, STEPS + 1))
    # up to the first batch that is passed over, the steps are the same bits again
    assert rows[30:35] == [{**row, "branch": 1} for row in rows[20:25]]
    assert rows[35]["loss"] != rows[25]["loss"]
    names = {path.name for path in checkpoint.folder(folder).iterdir()}
    assert names == {"abandoned-0", "abandoned-1", *(f"step-{s:08d}" for s in range(5, 41, 5))}
    abandoned = [checkpoint.read_state(folder / f"ckpt/abandoned-{n}") for n in (0, 1)]
    assert [(s["step"], s["branch"]) for s in abandoned] == [(25, 0), (30, 0)]


@pytest.mark.slow
def test_the_ledger_knows_what_was_passed_over(
    rewound: tuple[Run, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = rewound
    monkeypatch.chdir(whole.place)
    cfg, order, _, done = ledger.open_run(whole.folder)
    assert done == STEPS
    plan = Order(cfg.seed, order.segments[:1])
    trained = _windows(order.batch(step) for step in range(STEPS))
    as_planned = _windows(plan.batch(step) for step in range(STEPS + 8))
    passed = _windows(plan.batch(step) for step in range(25, 33))
    assert not set(passed) & set(trained)
    assert trained[: 25 * 8] == as_planned[: 25 * 8]
    assert sum(order.source_tokens(STEPS).values()) == 256 * STEPS
    counts = {name: [w[0] for w in passed].count(i) for i, name in enumerate(order.names)}
    assert order.skipped(STEPS) == counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "file.synced:name=rewinds.json,action=kill",
        "file.renamed:name=rewinds.json,action=kill",
        pytest.param("step.begun:step=27,hit=2,action=kill", marks=pytest.mark.full),
        pytest.param("step.begun:step=33,hit=1,action=kill", marks=pytest.mark.full),
    ],
)
def test_a_kill_does_not_undo_a_rewind(
    rewound: tuple[Run, str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = rewound
    # a save in flight would decide by chance which one is the newest
    options = {"guard.spike": "rewind", "checkpoint.background": False}
    killed = run(whole.place, re.sub(r"\W", "-", fault), **options)
    go(killed, f"{SPIKE};{fault}", expect=-9)
    decided = (killed.folder / "rewinds.json").exists()
    assert decided != fault.startswith("file.synced")
    monkeypatch.chdir(whole.place)
    cfg, order, _, done = ledger.open_run(killed.folder)
    # a decision counts from the moment it is written, whatever the newest checkpoint is
    assert done == {False: 30, True: 20 if fault.startswith("file") else done}[decided]
    # the same fault again where it was not acted upon: the checkpoint holds what was not read yet
    go(killed)
    assert [r for r in killed.rows() if r["branch"] == 1] == [
        r for r in whole.rows() if r["branch"] == 1
    ]
    steps = [r["step"] for r in killed.rows() if r["branch"] == 0]
    assert steps == list(range(1, 31))
    assert ledger.open_run(killed.folder)[1].segments == ledger.open_run(whole.folder)[1].segments


@pytest.mark.full
@pytest.mark.slow
def test_a_validation_made_up_for_is_not_made_again_by_a_rewind(workspace: Path) -> None:
    options = {"guard.spike": "rewind", "validation.every": 20, "checkpoint.background": False}
    cut = run(workspace, "cut", **options)
    go(cut, "step.validating:step=20,action=sigterm", expect=75)
    go(cut, f"{SPIKE};step.begun:step=33,action=kill", expect=-9)
    said = go(cut)
    assert "resuming runs/cut from step 30" in said and "branch" in cut.rows()[-1]
    found = [(row["branch"], row["step"]) for row in cut.rows()]
    assert found == [(0, n) for n in range(1, 31)] + [(1, n) for n in range(21, STEPS + 1)]


@pytest.mark.slow
def test_rewinds_to_one_place_and_steps_without_a_change_come_to_an_end(workspace: Path) -> None:
    again = run(workspace, "again", **{"guard.spike": "rewind", "guard.rewinds": 2})
    said = go(again, "step.graded:step=24,action=spike", expect=2)
    assert "guard.rewinds to step 10 are used up" in said and said.count("error: ") == 1
    assert again.reason()["exit"] == "failed"
    assert {row["branch"] for row in again.rows()} == {0, 1, 2}
    hopeless = run(workspace, "hopeless", **{"guard.patience": 5})
    said = go(hopeless, "step.graded:action=nan", expect=2)
    assert "step 5 changed nothing" in said and "the last of 5 steps (guard.patience)" in said
    # its statistics are read a step later, where the run then stands
    assert hopeless.reason()["exit"] == "failed" and hopeless.reason()["step"] == 6
    early = run(workspace, "early", **{"guard.spike": "rewind", "checkpoint.every": 1000})
    assert "no rewind: there is no checkpoint of this data before it" in go(early, SPIKE)


@pytest.mark.slow
def test_a_rewind_goes_no_further_back_than_other_shards_and_still_passes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tokens(tmp_path)
    first = run(tmp_path, "changed", **{"guard.spike": "rewind"})
    go(first, **{"train.tokens": 256 * 20})
    shutil.rmtree(tmp_path / "tokens/mail")
    make_tokens(tmp_path, seed=1, names=("mail",))
    said = go(first, SPIKE.replace("30", "24"), **{"checkpoint.accept_changes": True})
    # ten steps before it there is a checkpoint, but of the shards that are gone
    assert "mail starts a new epoch" in said and "back to step 20, branch 1" in said
    monkeypatch.chdir(tmp_path)
    _, order, _, done = ledger.open_run(first.folder)
    plan = Order(order.seed, [s for s in order.segments if s.first_step == 20][:1])
    passed = {row for step in range(20, 27) for row in _windows([plan.batch(step)])}
    trained = set(_windows(order.batch(step) for step in range(20, STEPS)))
    assert done == STEPS and sum(order.skipped(STEPS).values()) == 7 * 8 == len(passed)
    assert not passed & trained


@pytest.mark.full
def test_a_rewind_of_a_sharded_model_over_several_processes(workspace: Path) -> None:
    options = {"guard.spike": "rewind", "guard.replicas_every": 1, "parallel.replicate": 2}
    options |= {"train.batch_tokens": 512, "train.tokens": 512 * STEPS}
    whole = run(workspace, "whole4", **options)
    said = go(whole, SPIKE, 4)
    assert "step 30 is a sudden spike" in said and whole.rows()[-1]["branch"] == 1
