"""A checkpoint is complete or does not exist: kills, corruption, full disks, hostile metadata."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama.cli import UserError
from llama.runtime import checkpoint, world


@pytest.fixture(scope="module")
def here() -> Iterator[world.World]:
    yield world.start()
    world.stop()


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(40, 30, generator=generator),
        "model.b": torch.randn(7, generator=generator),
        "exp_avg.a": torch.randn(40, 30, generator=generator),
    }


def _save(run: Path, step: int, here: world.World, keep: int = 3) -> None:
    problem = checkpoint.save(run, step, _tensors(step), {"step": step}, here, keep)
    assert problem is None, problem


def _loads(run: Path, step: int, here: world.World) -> None:
    path = checkpoint.choose(run, here)
    assert path and path.name == f"step-{step:08d}"
    empty = {name: torch.zeros_like(t) for name, t in _tensors(0).items()}
    checkpoint.load(path, empty, here)
    assert all(torch.equal(empty[name], t) for name, t in _tensors(step).items())
    assert checkpoint.read_state(path) == {"step": step}


def test_round_trip_and_retention(tmp_path: Path, here) -> None:
    for step in (1, 2, 30, 400):
        _save(tmp_path, step, here, keep=2)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [30, 400]
    _loads(tmp_path, 400, here)
    assert checkpoint.newest(tmp_path).name == "step-00000400"
    left = {path.name for path in checkpoint.folder(tmp_path).iterdir()}
    assert left == {"step-00000030", "step-00000400"}


def test_no_checkpoint_is_none_and_newest_says_where_it_looked(tmp_path: Path, here) -> None:
    assert checkpoint.choose(tmp_path, here) is None
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        checkpoint.newest(tmp_path)


def _damage(path: Path, rng) -> str:
    """Spoil one file of a checkpoint in one way; returns what was done."""
    file = rng.choice([p for p in sorted(path.iterdir())])
    data = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "zeros", "cut", "delete", "swap"])
    if kind == "delete":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "zeros":
        start = rng.randrange(len(data))
        block = data[start : start + 4096]
        if not any(block):
            return _damage(path, rng)
        data[start : start + 4096] = bytes(len(block))
        file.write_bytes(data)
    elif kind == "swap":
        other = path.parent / "step-00000001" / file.name
        shutil.copy(other, file)
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    return f"{kind} {file.name}"


def test_every_corruption_is_found_and_the_older_one_taken(tmp_path: Path, here, rng) -> None:
    good = tmp_path / "good"
    for step in (1, 2):
        _save(good, step, here)
    for number in range(60):
        run = tmp_path / f"run{number}"
        shutil.copytree(good, run)
        done = _damage(checkpoint.folder(run) / "step-00000002", rng)
        found = checkpoint.choose(run, here)
        assert found and found.name == "step-00000001", done
        assert (checkpoint.folder(run) / "corrupt-0").is_dir(), done
        shutil.rmtree(run)


def test_all_damaged_is_an_error_not_a_new_run(tmp_path: Path, here) -> None:
    _save(tmp_path, 1, here)
    (checkpoint.folder(tmp_path) / "step-00000001" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="every checkpoint in"):
        checkpoint.choose(tmp_path, here)


KILLED = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from llama.runtime import checkpoint, world
sys.path.insert(0, "tests")
from test_runtime_checkpoint import _loads, _save

run, seed = Path(sys.argv[1]), int(sys.argv[2])
random.seed(seed)
lost = 0
for kill in range(int(sys.argv[3])):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        here = world.start()
        checkpoint.sweep(run)
        step = max([step for step, _ in checkpoint.steps(run)], default=0)
        while True:
            step += 1
            _save(run, step, here)
            os.write(writer, b"%d\\n" % step)
    time.sleep(0.05 + random.random() * 0.3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(writer)
    told = [int(line) for line in os.fdopen(reader).read().split()]
    newest = max([step for step, _ in checkpoint.steps(run)], default=0)
    # at most the one whose rename was done but not yet told may be newer
    assert newest >= max(told, default=0), (newest, told)
here = world.start()
_loads(run, newest, here)
checkpoint.sweep(run)
assert all(p.name.startswith("step-") for p in checkpoint.folder(run).iterdir())
print("survived", newest)
"""


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path: Path, rng) -> None:
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(rng.randrange(10**6)), "30"],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) > 5


def test_a_failed_save_leaves_the_older_ones_and_says_why(
    tmp_path: Path, here, monkeypatch
) -> None:
    _save(tmp_path, 1, here)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.files, "sha256", full)
    problem = checkpoint.save(tmp_path, 2, _tensors(2), {"step": 2}, here, keep=3)
    monkeypatch.undo()
    assert problem and "no space left" in problem
    assert [path.name for path in checkpoint.folder(tmp_path).iterdir()] == ["step-00000001"]
    _loads(tmp_path, 1, here)
    _save(tmp_path, 2, here)
    _loads(tmp_path, 2, here)


class _Payload:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.sentinel}",)


def test_hostile_metadata_runs_nothing(tmp_path: Path, here) -> None:
    _save(tmp_path, 1, here)
    path = checkpoint.folder(tmp_path) / "step-00000001"
    sentinel = tmp_path / "executed"
    (path / checkpoint.METADATA).write_bytes(pickle.dumps(_Payload(sentinel)))
    with pytest.raises(UserError, match="not allowed in checkpoint metadata"):
        checkpoint.load(path, _tensors(1), here)
    assert not sentinel.exists()


def test_another_shape_is_refused(tmp_path: Path, here) -> None:
    _save(tmp_path, 1, here)
    path = checkpoint.newest(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded into this model"):
        checkpoint.load(path, {"model.a": torch.zeros(3, 3)}, here)
    with pytest.raises(UserError, match="cannot be loaded into this model"):
        checkpoint.load(path, {"model.unknown": torch.zeros(3, 3)}, here)


def test_small_disk_is_refused_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="GB free, one checkpoint takes 1000.0 TB"):
        checkpoint.refuse_small_disk(tmp_path / "not" / "yet", 10**15)
