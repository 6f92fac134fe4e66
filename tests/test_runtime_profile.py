"""A step never waits for its device, and steps that are recorded are the same steps."""

import gzip
import json
import random
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_data import make_sources
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from llama import config, trace
from llama.cli import UserError
from llama.config import Config, Count
from llama.runtime import metrics, profile, world

aten = torch.ops.aten
# what has to know a value on the host; their kernels copy it there and wait
WAITING = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select,
    aten.unique_dim, aten._unique2, aten.unique_consecutive, aten.bincount,
    aten.repeat_interleave, aten.allclose, aten.item,
}  # fmt: skip


class NeverWaits(TorchDispatchMode):
    """Fails where the host asks for a value of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves(args[1:]) if isinstance(t, torch.Tensor)]
        # an index of booleans is turned into numbers first
        masked = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            t.dtype in (torch.bool, torch.uint8) for t in tensors
        )
        assert not masked and func.overloadpacket not in WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile")
    make_sources(random.Random(7), path / "tokens", {"web": 400, "books": 300}, valid_per_10k=500)
    return path


def configured(place: Path, **parallel: Any) -> Config:
    cfg = Config(name="profiled")
    cfg.model = config.ModelConfig(dim=32, n_layers=2, n_heads=4, ffn_dim=64)
    cfg.data = config.DataConfig(str(place / "tokens"), {"web": 0.5, "books": 0.5}, seq_len=32)
    cfg.train = config.TrainConfig(Count(32 * 8 * 12), Count(32 * 8), micro_batch=4, compile=False)
    cfg.parallel = config.ParallelConfig(**parallel)
    return cfg


def trained(cfg: Config, run: Path, steps: int, mode: Any = None) -> list[float]:
    """Losses of the first steps of a run, taken as `train.loop` takes them."""
    here = world.start()
    try:
        state = train.build(cfg, here, run)
        reader = train.loader.Loader(state.sources, state.order)
        batches = reader.steps(0, state.steps, lambda step: (0, 8))
        losses = []
        with mode or nullcontext():
            for _, tokens, source in profile.recorded(batches, state, metrics.Clock(0)):
                losses.append(train.step(state, tokens, source).loss)
                if len(losses) == steps:
                    break
        reader.close()
        state.recording.close()
        return [float(loss) for loss in losses]
    finally:
        world.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {}),
        ("bfloat16", {"recompute": "full"}),
        ("bfloat16", {"recompute": "selective", "accumulate": "unsharded", "reshard": False}),
        ("bfloat16", {"recompute": "manual", "prefetch": 2}),
    ],
)
def test_the_host_never_waits_inside_a_step(
    place: Path, tmp_path: Path, dtype: Any, options: dict[str, Any]
) -> None:
    cfg = configured(place, **options)
    cfg.train.dtype = dtype
    cfg.data.attend_across_documents = cfg.data.boundary_loss = False
    assert len(trained(cfg, tmp_path, 3, NeverWaits())) == 3
    # the judge judges
    for asks in (float, bool, lambda x: x[x > 0], torch.nonzero, lambda x: torch.equal(x, x)):
        with NeverWaits(), pytest.raises(AssertionError, match="waits"):
            asks(torch.ones(1))


@pytest.mark.slow
def test_recorded_steps_are_the_same_and_can_be_read(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = configured(place)
    plain = trained(cfg, tmp_path, 12)
    cfg.log.profile = "3-4"
    assert trained(cfg, tmp_path, 12) == plain
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "rank-0-steps-3-4.json.gz"
    said = capfd.readouterr().out
    assert f"steps 3 to 4 are in {path.parent} (no memory snapshot: a CPU has none)" in said
    events = json.loads(gzip.open(path).read())["traceEvents"]
    names = Counter(event["name"] for event in events)
    # two micro-batches a step; of every phase as many as there were
    phases = {"step 3": 1, "step 4": 1, "data": 2, "forward": 4, "backward": 4, "optimizer": 2}
    assert {name: names[name] for name in phases} == phases
    assert [number for number, _ in trace.read(path)] == [3, 4]
    for _, spent in trace.read(path):
        parts = ("compute", "exposed communication", "waiting for data", "idle")
        assert sum(spent[name] for name in parts) == spent["step"]
        kinds = ("attention", "matrix products", "loss", "optimizer", "norms, elementwise")
        assert all(0 < spent[f"  {kind}"] <= spent["compute"] for kind in kinds)
        assert sum(spent[f"  {kind}"] for kind in kinds) >= spent["compute"]


@pytest.mark.slow
def test_a_run_that_stops_early_keeps_what_it_recorded(place: Path, tmp_path: Path) -> None:
    cfg = configured(place)
    cfg.log.profile = "3-6"
    trained(cfg, tmp_path, 4)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "rank-0-steps-3-4.json.gz"
    assert [number for number, _ in trace.read(path)] == [3, 4]


@pytest.mark.parametrize(
    ("moves", "name", "recorded"),
    [
        # each batch's step before it and after it: stopped early
        ([(0, 1)], None, []),
        ([(0, 1), (1, 2)], None, []),
        ([(0, 1), (1, 2), (2, 3)], "rank-0-steps-3-3", [3]),
        # taken back before what is recorded, which ends there, to one of those steps, and out of it
        ([(0, 1), (1, 0), (0, 1), (1, 2), (2, 3), (3, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)],
         "rank-0-steps-3-4", [3, 4]),
        ([(0, 1), (1, 2), (2, 3), (3, 4), (4, 3), (3, 4), (4, 5), (5, 6)],
         "rank-0-steps-3-5", [3, 4, 5, 4, 5]),
    ],
)  # fmt: skip
def test_runs_that_are_stopped_or_rewound(
    tmp_path: Path, moves: Any, name: str | None, recorded: list[int]
) -> None:
    here = SimpleNamespace(rank=0, device=torch.device("cpu"), say=print)
    log = SimpleNamespace(profile="3-5")
    state: Any = SimpleNamespace(
        cfg=SimpleNamespace(log=log),
        world=here,
        run=tmp_path,
        step=0,
        steps=12,
        recording=ExitStack(),
    )
    batches: Any = iter(moves)
    given = []
    for batch in profile.recorded(batches, state, metrics.Clock(0)):
        given.append(batch)
        assert state.step == batch[0]
        torch.ones(9).sum()
        state.step = batch[1]
    # all that there were, and then it ends as they do
    assert given == moves
    paths = list(tmp_path.glob("profile/*"))
    # a run that is stopped is saved first
    assert bool(paths) == bool(name and len(moves) > 3)
    state.recording.close()
    paths = list(tmp_path.glob("profile/*"))
    assert [path.name for path in paths] == ([f"{name}.json.gz"] if name else [])
    last = int((name or "0")[-1])
    assert [number for path in paths for number, _ in trace.read(path, last)] == recorded


@pytest.mark.slow
def test_what_cannot_be_recorded_is_said(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = configured(place)
    cfg.log.profile = "13-14"
    trained(cfg, tmp_path, 12)
    assert "log.profile 13-14 has no effect: steps 1 to 12 are to come" in capfd.readouterr().out
    cfg.log.profile = "2-2"
    (tmp_path / "profile").write_text("in the way")
    assert len(trained(cfg, tmp_path, 12)) == 12
    assert "WARNING: " in (said := capfd.readouterr().out) and "training goes on" in said


@pytest.mark.parametrize("value", ["10", "0-3", "12-10", "a-b", "1-2-3", "-1"])
def test_steps_that_are_none_are_refused(place: Path, value: str) -> None:
    cfg = configured(place)
    cfg.log.profile = value
    with pytest.raises(UserError, match=f"log.profile is '{value}', expected steps such as 10-12"):
        config.check(cfg)


def test_fewer_than_one_block_ahead_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match="parallel.prefetch is 0, expected more than 0"):
        config.check(configured(place, prefetch=0))
