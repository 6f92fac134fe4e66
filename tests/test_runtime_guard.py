"""Bad numbers in synthetic curves, in a step, and in runs rewound, killed and gone on with."""

import json
import math
import multiprocessing
import os
import random
import re
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from made_data import make_source, random_documents
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import train
from llama import cli, config
from llama.cli import UserError
from llama.data import ledger, schedule
from llama.data.order import Order
from llama.data.writer import Vocabulary
from llama.runtime import checkpoint, metrics, replicas, stragglers, world
from llama.runtime.guard import Guard

pytestmark = pytest.mark.faults

STEPS = 40
OPTIONS: dict[str, Any] = {
    "seed": 3,
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "data.path": "tokens",
    "data.mixture": "mixture.yaml",
    "data.seq_len": 32,
    "train.batch_tokens": 256,
    "train.tokens": 256 * STEPS,
    "optim.warmup_steps": 2,
    "validation.every": 0,
    "checkpoint.every": 5,
    "checkpoint.keep": 20,
    "log.every": 1,
    "guard.window": 16,
    "guard.rewind_steps": 10,
    "guard.skip_steps": 8,
}
ALONE = SimpleNamespace(size=1, device=torch.device("cpu"), leads=True)


# -- the judge -------------------------------------------------------------------------------------


def judged(losses: Any, norms: Any, spike: str = "off") -> tuple[np.ndarray, Guard]:
    """Which steps of two curves are called spikes."""
    guard = Guard(config.GuardConfig(spike=spike), ALONE)  # type: ignore[arg-type]
    found, before = [], 0.0
    for loss, norm in zip(losses, norms, strict=True):
        guard.judge(torch.tensor(loss), torch.tensor(norm))
        found.append(float(guard.counts[0]) > before)
        before = float(guard.counts[0])
    return np.array(found), guard


def curve(draws: np.random.Generator, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(loss, gradient norm, loss without noise) of a clean run that falls fast, then slowly."""
    t = np.arange(steps)
    fall = 8.5 * np.exp(-t / draws.uniform(5, 150)) if draws.random() < 0.5 else 8 / np.sqrt(1 + t)
    base = 2 + fall + 0.5 * (1 + t / 200) ** -0.3
    loss = base + draws.uniform(0.002, 0.05) * draws.standard_normal(steps)
    norm = (0.3 + 3 * np.exp(-t / draws.uniform(5, 150))) * (
        1 + draws.uniform(0.02, 0.2) * draws.standard_normal(steps)
    )
    return loss, norm, base


def test_a_clean_falling_curve_raises_no_alarm(
    rng: random.Random, scale: Callable, score: Callable
) -> None:
    draws = np.random.default_rng(rng.randrange(2**32))
    steps, alarms = 0, 0
    for _ in range(scale(4, 40)):
        loss, norm, _ = curve(draws, 1000)
        alarms += int(judged(loss, norm)[0].sum())
        steps += 1000
    score("spikes.steps", steps)
    score("spikes.alarms", alarms, f"<= {steps / 1e4}")
    assert alarms / steps < 1e-4, (alarms, steps)


@pytest.mark.parametrize("length", [20, 60, 120, 200])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_fall_that_ends_is_no_spike(length: int, noise: float, rng: random.Random) -> None:
    draws = np.random.default_rng(rng.randrange(2**32))
    t = np.arange(length + 200)
    loss = np.maximum(10 - 8 * t / length, 2) + noise * draws.standard_normal(len(t))
    assert not judged(loss, np.ones(len(t)))[0].any()


def test_every_spike_beyond_six_sigma_is_found(
    rng: random.Random, scale: Callable, score: Callable
) -> None:
    """Of the noise where the curve is flat, and of the whole window where it falls."""
    draws = np.random.default_rng(rng.randrange(2**32))
    for _ in range(scale(3, 30)):
        loss, norm, _ = curve(draws, 1200)
        places = np.arange(140 + draws.integers(100), 1200, 140)
        for place in places:
            values = (loss, norm)[draws.integers(2)]
            window = values[place - 128 : place]
            values[place] = window.mean() + draws.choice([6.01, 7, 20]) * window.std(ddof=1)
        found, _ = judged(loss, norm)
        score("spikes", len(places))
        score("spikes.missed", int((~found[places]).sum()), "0")
        assert found[places].all() and found.sum() == len(places)


def test_bad_numbers_never_enter_the_window_and_a_spike_hides_no_other(rng: random.Random) -> None:
    draws = np.random.default_rng(rng.randrange(2**32))
    loss, norm = 3 + 0.01 * draws.standard_normal(200), 1 + 0.01 * draws.standard_normal(200)
    for place, bad in ((150, math.nan), (151, math.inf), (152, -math.inf)):
        (loss, norm)[rng.randrange(2)][place] = bad
    loss[160], norm[161], loss[162] = 30, 1000, 30
    found, guard = judged(loss, norm)
    assert np.flatnonzero(found).tolist() == [160, 161, 162]
    assert guard.history[-64:].isfinite().all() and float(guard.history.max()) < 4
    assert guard.counts.tolist() == [3, 3, 0]
    _, skipping = judged(loss, norm, "skip")
    assert skipping.counts.tolist() == [3, 6, 0]


def test_a_lasting_change_is_accepted() -> None:
    loss = np.where(np.arange(400) < 200, 3.0, 4.0) + 0.01 * np.sin(np.arange(400))
    found, _ = judged(loss, np.ones(400))
    assert found[200] and not found[300:].any()


def test_the_window_is_the_same_after_json(rng: random.Random) -> None:
    draws = np.random.default_rng(rng.randrange(2**32))
    loss, norm, _ = curve(draws, 300)
    loss[250] = 40
    cut = int(draws.integers(1, 299))
    whole, _ = judged(loss, norm)
    _, guard = judged(loss[:cut], norm[:cut])
    saved = orjson.loads(orjson.dumps(guard.state()))
    again = Guard(guard.cfg, ALONE, saved=saved)  # type: ignore[arg-type]
    for at in range(cut, 300):
        before = float(again.counts[0])
        again.judge(torch.tensor(loss[at]), torch.tensor(norm[at]))
        assert (float(again.counts[0]) > before) == whole[at]


def test_numbers_are_read_one_step_late() -> None:
    guard = Guard(config.GuardConfig(), ALONE)  # type: ignore[arg-type]
    guard.judge(torch.tensor(1.0), torch.tensor(2.0))
    assert guard.read() is None
    guard.judge(torch.tensor(3.0), torch.tensor(math.nan))
    first = guard.read()
    assert first and (first[:2], first[-1]) == ([1.0, 2.0], 0.0)
    # what was not read yet goes on with the checkpoint
    saved = orjson.loads(orjson.dumps(guard.state()))
    second = Guard(guard.cfg, ALONE, saved=saved).read()  # type: ignore[arg-type]
    assert second and second[0] == 3.0 and second[1] > 1e300 and second[-1] == 1.0


# -- a step ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("guarded")
    draws = random.Random(1)
    for name in ("code", "mail"):
        documents = random_documents(draws, name, 150, longest=200, pieces=64)
        vocabulary = Vocabulary("0" * 64, 64, 1, 2)
        make_source(place / "tokens" / name, [documents], vocabulary, valid_per_10k=1000)
    (place / "mixture.yaml").write_text("code: 0.7\nmail: 0.3\n")
    return place


def words(**options: Any) -> list[str]:
    return [f"--{key}={value}" for key, value in {**OPTIONS, **options}.items()]


@pytest.fixture
def inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[train.State]:
    monkeypatch.chdir(workspace)
    here = world.start()
    options = {"name": "inside", "guard.spike": "skip"}
    yield train.build(config.load(words(**options)), here, Path("runs/inside"))
    world.stop()


def batch(state: train.State) -> tuple[torch.Tensor, torch.Tensor]:
    reader = train.loader.Loader(state.sources, state.order)
    return reader.batch(state.step, 0, 8)


def bits(state: train.State) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
    return tensors | {"adam": torch.tensor(train.optim.step_count(state.optimizer))}


def unchanged(state: train.State, before: dict[str, torch.Tensor]) -> bool:
    now = bits(state)
    return all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_a_spike_to_be_skipped_changes_no_bit(inside: train.State) -> None:
    for _ in range(17):
        train.step(inside, *batch(inside))
    before, window = bits(inside), inside.window.clone()
    weight = inside.model.output.weight  # type: ignore[union-attr]
    hook = weight.register_hook(lambda grad: 1000 * grad)
    train.step(inside, *batch(inside))
    assert unchanged(inside, before) and torch.equal(inside.window, window)
    hook.remove()
    assert inside.guard.counts.tolist() == [1, 1, 1]
    train.step(inside, *batch(inside))
    assert not unchanged(inside, before) and inside.guard.counts.tolist() == [1, 1, 0]


def test_a_bad_parameter_changes_no_bit(inside: train.State, rng: random.Random) -> None:
    train.step(inside, *batch(inside))
    with torch.no_grad():
        victim = rng.choice([p for p in inside.model.parameters() if p.dim() > 1])
        victim[: len(victim)] = rng.choice([math.nan, math.inf])
    before = {name: t.nan_to_num(7, 8, 9) for name, t in bits(inside).items()}
    train.step(inside, *batch(inside))
    now = {name: t.nan_to_num(7, 8, 9) for name, t in bits(inside).items()}
    assert all(torch.equal(now[name], t) for name, t in before.items())
    assert inside.guard.counts.tolist() == [0, 1, 1]


def test_a_batch_without_targets_makes_no_nan(
    inside: train.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = train.loader.drop_boundary_targets
    inside.cfg.data.boundary_loss = False
    monkeypatch.setattr(
        train.loader, "drop_boundary_targets", lambda i, t, eos: torch.full_like(t, -100)
    )
    measured = train.step(inside, *batch(inside))
    assert float(measured.loss) == 0 and float(measured.grad_norm) == 0
    assert all(t.isfinite().all() for t in bits(inside).values())
    assert inside.guard.history.isnan().all(), "it says nothing about what is usual"
    monkeypatch.setattr(train.loader, "drop_boundary_targets", drop)
    assert float(train.step(inside, *batch(inside)).loss) > 0


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


# -- slow ranks ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("ranks", "factor"), [(2, 1.2), (4, 1.2), (5, 3), (4, 1.05)])
def test_a_slow_rank_is_named_once(
    ranks: int, factor: float, monkeypatch: pytest.MonkeyPatch, rng: random.Random, capsys
) -> None:
    slow = rng.randrange(ranks)
    times = [[0.1 * rng.uniform(0.98, 1.02) for _ in range(30)] for _ in range(ranks)]
    times[slow] = [factor * t for t in times[slow]]
    times[(slow + 1) % ranks][7] = 5.0  # one hiccup is no slow rank
    all_of_them = paces(times, monkeypatch)
    values = [(stragglers.median(pace.own_s), "node") for pace in all_of_them]
    here: Any = world.World(0, ranks, 0, torch.device("cpu"), False)
    monkeypatch.setattr(world.World, "gather", lambda self, value: values)
    for _ in range(2):
        row = stragglers.compare(all_of_them[0], here)
    said = capsys.readouterr().out
    if factor == 1.05:
        assert not said
    else:
        assert row["slowest_rank"] == slow and said.count(f"rank {slow} on node is") == 1
        assert row["own_s_max"] / row["own_s"] == pytest.approx(factor, rel=0.06)


# -- runs ------------------------------------------------------------------------------------------


def forked(place: Path, size: int, action: Callable[[], Any], faults: str = "") -> tuple[list, str]:
    """(exit codes, output) of `action` in processes that have imported train, joined in one world.

    They are forked from a server: this process has threads of torch's, which no fork survives.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, ranks = place / "output", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log.write_bytes(b"")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train"])
    children = []
    for rank in range(size):
        env = {"LLAMA_FAULTS": faults}
        if size > 1:
            env |= ranks | {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
        children.append(server.Process(target=_alone, args=(place, action, env, log)))
        children[-1].start()
    children[0].join()
    for child in children[1:]:
        if children[0].exitcode:
            child.terminate()  # as torchrun does
        child.join()
    return [child.exitcode for child in children], log.read_text()


def _alone(place: Path, action: Callable[[], Any], env: dict[str, str], log: Path) -> None:
    code = 1
    try:
        os.chdir(place)
        os.environ |= env
        handle = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1), os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        torch.set_num_threads(1)
        try:
            cli.run(lambda _: action())
        except SystemExit as end:
            code = int(end.code or 0)
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


class Run:
    """A run of train.py in processes of its own."""

    def __init__(self, place: Path, name: str, size: int = 1, **options: Any) -> None:
        self.place, self.size, self.options = place, size, {"name": name, **options}
        self.folder = place / "runs" / name

    def go(self, faults: str = "", expect: int = 0) -> str:
        action = partial(train.main, words(**self.options))
        codes, said = forked(self.place, self.size, action, faults)
        # which rank tells a fault that all see is a matter of luck, the other ends with 1
        assert codes[0] == expect or expect == 2 in codes, said
        return said

    def rows(self) -> list[dict[str, Any]]:
        """What a row says about the model."""
        keep = ("step", "branch", "tokens", "loss", "lr", "grad_norm", "spikes", "skipped_steps")
        found = map(json.loads, (self.folder / "metrics.jsonl").open())
        return [{k: v for k, v in r.items() if k in keep or k[:5] == "loss/"} for r in found]

    def reason(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "EXIT_REASON").read_text()))


SPIKE = "step.graded:step=30,hit=1,action=spike"


@pytest.fixture(scope="module")
def rewound(workspace: Path) -> tuple[Run, str]:
    run = Run(workspace, "rewound", **{"guard.spike": "rewind", "checkpoint.resume": "never"})
    return run, run.go(SPIKE)


@pytest.mark.slow
def test_a_rewind_passes_over_the_named_batches(rewound: tuple[Run, str]) -> None:
    run, said = rewound
    rows, folder = run.rows(), run.folder
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
    run, _ = rewound
    monkeypatch.chdir(run.place)
    cfg, order, _, done = ledger.open_run(run.folder)
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
    run = Run(whole.place, re.sub(r"\W", "-", fault), **options)
    run.go(f"{SPIKE};{fault}", expect=-9)
    decided = (run.folder / "rewinds.json").exists()
    assert decided != fault.startswith("file.synced")
    monkeypatch.chdir(whole.place)
    cfg, order, _, done = ledger.open_run(run.folder)
    # a decision counts from the moment it is written, whatever the newest checkpoint is
    assert done == {False: 30, True: 20 if fault.startswith("file") else done}[decided]
    # the same fault again where it was not acted upon: the checkpoint holds what was not read yet
    run.go()
    assert [r for r in run.rows() if r["branch"] == 1] == [
        r for r in whole.rows() if r["branch"] == 1
    ]
    steps = [r["step"] for r in run.rows() if r["branch"] == 0]
    assert steps == list(range(1, 31))
    assert ledger.open_run(run.folder)[1].segments == ledger.open_run(whole.folder)[1].segments


@pytest.mark.slow
def test_rewinds_to_one_place_and_steps_without_a_change_come_to_an_end(workspace: Path) -> None:
    again = Run(workspace, "again", **{"guard.spike": "rewind", "guard.rewinds": 2})
    said = again.go("step.graded:step=24,action=spike", expect=2)
    assert "guard.rewinds to step 10 are used up" in said and said.count("error: ") == 1
    assert again.reason()["exit"] == "failed"
    assert {row["branch"] for row in again.rows()} == {0, 1, 2}
    hopeless = Run(workspace, "hopeless", **{"guard.patience": 5})
    said = hopeless.go("step.graded:action=nan", expect=2)
    assert "step 5 changed nothing" in said and "the last of 5 steps (guard.patience)" in said
    assert hopeless.reason()["exit"] == "failed" and hopeless.reason()["step"] == 6
    early = Run(workspace, "early", **{"guard.spike": "rewind", "checkpoint.every": 1000})
    assert "no rewind: there is no checkpoint before it" in early.go(SPIKE)


HSDP: dict[str, Any] = {"parallel.replicate": 2, "parallel.shard": 1}


@pytest.mark.slow
def test_one_ranks_bad_gradient_is_skipped_by_all_and_the_slow_rank_is_named(
    workspace: Path,
) -> None:
    """Replicas are compared after every step: had one of them changed, the run would have ended."""
    options = {"guard.replicas_every": 1, "train.tokens": 256 * 13}
    run = Run(workspace, "one-rank", 2, **HSDP, **options)
    said = run.go("step.graded:rank=1,step=5,action=nan;step.begun:rank=1,action=hang,seconds=0.6")
    assert "step 5 changed nothing" in said
    assert run.rows()[-1]["skipped_steps"] == 1
    assert "WARNING: rank 1 on" in said and "x slower than the median rank" in said


@pytest.mark.slow
def test_a_replica_that_drifts_ends_the_run(workspace: Path) -> None:
    run = Run(workspace, "drift", 2, **HSDP, **{"guard.replicas_every": 4})
    said = run.go("step.graded:rank=1,step=6,action=spike", expect=2)
    assert "step 8: model.tok_embeddings.weight is not the same on rank 0 and rank 1" in said
    assert run.reason()["exit"] == "failed" and "machines" in run.reason()["why"]
    assert [step for step, _ in checkpoint.steps(run.folder)] == [5]


def _flip_and_compare(seed: int, flips: int) -> int:
    here = world.start()
    draws = random.Random(seed)
    cfg = config.load(words(name="flips", **HSDP))
    state = train.build(cfg, here, Path("runs/flips"))
    replicas.compare(state)
    missed = 0
    for _ in range(flips):
        name, tensor = draws.choice(list(state.tensors().items()))
        local = tensor.to_local().view(-1).view(torch.int32)
        place, mask = draws.randrange(len(local)), 1 << draws.randrange(31)
        if here.rank == 1:
            local[place] ^= mask
        try:
            replicas.compare(state)
            missed += 1
        except UserError as error:
            assert f"step 0: {name} is not the same on rank 0 and rank 1" in str(error)
        if here.rank == 1:
            local[place] ^= mask
    with torch.no_grad():  # the drift of a whole norm, where all elements are alike
        state.model.norm.weight.to_local().mul_(1 + here.rank)  # type: ignore[operator, union-attr]
    with pytest.raises(UserError, match=r"model.norm.weight is not"):
        replicas.compare(state)
    world.stop()
    return missed


def test_every_flipped_bit_of_a_replica_is_found(
    workspace: Path, rng: random.Random, score: Callable
) -> None:
    """Weights and moments of both kinds of layout, one element at a time, the norms included."""
    seed, flips = rng.randrange(2**32), 200

    codes, said = forked(workspace, 2, partial(_flip_and_compare, seed, flips))
    score("sdc.replicas", flips)
    score("sdc.replicas.missed", codes[0], "0")
    assert codes == [0, 0], said


def _look(odd_one: int) -> int:
    here = world.start()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    generator = torch.Generator().manual_seed(0)
    whole = {n: torch.randn(8, 6, generator=generator) for n in "abcd"}
    cuts = {
        "a": [Replicate(), Replicate()],
        "b": [Shard(0), Replicate()],
        "c": [Replicate(), Shard(1)],
        "d": [Shard(0), Shard(1)],
    }
    tensors = {n: distribute_tensor(t, mesh, cuts[n]) for n, t in whole.items()}
    tensors["plain"] = torch.ones(5)
    state: Any = SimpleNamespace(world=here, step=7, tensors=lambda: tensors)
    replicas.compare(state)
    # each rank has a part of its own here: nothing to compare
    with torch.no_grad():
        tensors["d"].to_local().add_(here.rank)
    replicas.compare(state)
    holders = {"a": [0, 1, 2, 3], "plain": [0, 1, 2, 3]}
    holders["b"] = [r for r in range(4) if r // 2 == odd_one // 2]
    holders["c"] = [r for r in range(4) if r % 2 == odd_one % 2]
    for name, ranks in holders.items():
        tensor = tensors[name]
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        kept = local.clone()
        if here.rank == odd_one:
            local.view(-1)[0] *= 1 + 2**-22
        with pytest.raises(UserError) as caught:
            replicas.compare(state)
        others = ", ".join(str(r) for r in ranks if r != odd_one)
        assert f"step 7: {name} is not the same on rank " in str(caught.value)
        assert f"rank {odd_one}" in str(caught.value) and f"rank {others}" in str(caught.value)
        local.copy_(kept)
    replicas.compare(state)
    world.stop()
    return 0


def test_replicas_are_found_from_placements_whatever_the_mesh(
    tmp_path: Path, rng: random.Random
) -> None:
    """Two dimensions, as with tensor parallelism: norms whole everywhere, matrices cut in one."""
    odd_one = rng.randrange(4)
    print(f"rank {odd_one} drifts")

    codes, said = forked(tmp_path, 4, partial(_look, odd_one))
    assert codes == [0] * 4, said


@pytest.mark.full
def test_a_rewind_of_a_sharded_model_over_several_processes(workspace: Path) -> None:
    options = {"guard.spike": "rewind", "guard.replicas_every": 1, "parallel.replicate": 2}
    whole = Run(workspace, "whole4", 4, **options, **{"train.batch_tokens": 512})
    whole.options["train.tokens"] = 512 * STEPS
    said = whole.go("step.graded:step=30,hit=1,action=spike")
    assert "step 30 is a sudden spike" in said and whole.rows()[-1]["branch"] == 1


def test_what_flipped_bits_do_to_a_step(
    inside: train.State, rng: random.Random, scale: Callable, score: Callable
) -> None:
    """One bit of a weight, a gradient or an activation: caught by the guard, or said honestly.

    What is not finite never reaches a weight; a lower bit may well pass for noise.
    """
    inside.cfg.optim.lr = 1e-3
    for _ in range(20):
        train.step(inside, *batch(inside))
    kept, state = bits(inside), json.dumps(inside.guard.state())
    counted, caught = dict.fromkeys(("weight", "gradient", "activation"), 0), 0
    high = {"flips": 0, "caught": 0}
    data = batch(inside)

    def flip(tensor: torch.Tensor, bit: int) -> torch.Tensor:
        flat = tensor.detach().clone().contiguous().view(-1)
        integers = flat.view(torch.int32)
        integers[rng.randrange(len(integers))] ^= -(2**31) if bit == 31 else 1 << bit
        return flat.view(tensor.shape)

    for number in range(scale(24, 200)):
        kind, bit = list(counted)[number % 3], 30 if number % 4 == 0 else rng.randrange(32)
        victim = rng.choice(list(inside.model.parameters()))
        hooks = []
        if kind == "weight":
            with torch.no_grad():
                victim.copy_(flip(victim, bit))
        elif kind == "gradient":
            hooks.append(victim.register_hook(lambda grad, bit=bit: flip(grad, bit)))
        else:
            block = rng.choice(list(inside.model.layers))  # type: ignore[union-attr, arg-type]
            hooks.append(
                block.register_forward_hook(
                    lambda m, i, out, bit=bit: out + (flip(out, bit) - out.detach())
                )
            )
        before = bits(inside)
        train.step(inside, *data)
        for hook in hooks:
            hook.remove()
        spikes, skipped, _ = inside.guard.counts.tolist()
        counted[kind] += 1
        caught += bool(spikes or skipped)
        if skipped:
            assert all(
                torch.equal(t.nan_to_num(7), before[n].nan_to_num(7))
                for n, t in bits(inside).items()
            )
        if bit == 30:  # makes a small number huge
            high["flips"] += 1
            high["caught"] += bool(spikes or skipped)
        with torch.no_grad():
            for name, tensor in inside.tensors().items():
                tensor.copy_(kept[name])
        train.optim.set_step_count(inside.optimizer, int(kept["adam"]))
        inside.guard = Guard(inside.guard.cfg, inside.world, saved=json.loads(state))
        inside.guard.counts.zero_()
    print(counted, "caught", caught, "of the highest exponent bit", high)
    score("sdc.flips", sum(counted.values()))
    score("sdc.caught", caught)
    score("sdc.high", high["flips"])
    score("sdc.high.caught", high["caught"])
