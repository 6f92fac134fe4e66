"""Checkpoints: round trip, retention, refusals. Kills and damage have files of their own."""

import io
import pickle
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import pytest
import torch

from llama import files
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


def test_every_so_many_steps_and_marked_ones_stay(tmp_path: Path, here) -> None:
    for step in range(1, 13):
        assert checkpoint.save(tmp_path, step, _tensors(step), {"step": step}, here, 2, 5) is None
        if step in (2, 3, 7):
            # as the guard does, for the checkpoint before a spike
            checkpoint.protect(checkpoint.path_of(tmp_path, step), f"a spike after step {step}")
    # the newest two, those of every fifth step, the newest two that are marked
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [3, 5, 7, 10, 11, 12]
    marked = checkpoint.path_of(tmp_path, 7)
    assert (marked / checkpoint.KEEP).read_text() == "a spike after step 7\n"
    assert checkpoint.damage(marked) is None
    (marked / checkpoint.KEEP).unlink()
    checkpoint.prune(tmp_path, 1)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [3, 12]
    _loads(tmp_path, 12, here)


class _Older(pickle.Pickler):
    """Writes the members of enums as Python 3.11.0 to 3.11.3 does."""

    def reducer_override(self, value: object) -> object:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_of_another_python_is_read(tmp_path: Path, here) -> None:
    _save(tmp_path, 1, here)
    written = tmp_path / "ckpt" / "step-00000001" / checkpoint.METADATA
    metadata = pickle.loads(written.read_bytes())
    _Older(buffer := io.BytesIO()).dump(metadata)
    assert b"getattr" in buffer.getvalue()
    written.write_bytes(buffer.getvalue())
    read = checkpoint.Reader(written.parent).read_metadata()
    assert read.state_dict_metadata == metadata.state_dict_metadata


def test_no_checkpoint_is_none_and_newest_says_where_it_looked(tmp_path: Path, here) -> None:
    assert checkpoint.choose(tmp_path, here) is None
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        checkpoint.newest(tmp_path)


def test_all_damaged_is_an_error_not_a_new_run(tmp_path: Path, here) -> None:
    _save(tmp_path, 1, here)
    (checkpoint.folder(tmp_path) / "step-00000001" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="every checkpoint in"):
        checkpoint.choose(tmp_path, here)


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


def test_a_disk_for_fewer_than_are_kept_is_a_warning(tmp_path: Path, here, capsys) -> None:
    free = files.free_bytes(tmp_path)
    checkpoint.refuse_small_disk(tmp_path, free // 8, keep=2)
    assert capsys.readouterr().out == ""
    checkpoint.refuse_small_disk(tmp_path, free // 2, keep=2)
    said = capsys.readouterr().out
    assert "WARNING" in said and "there will be 3 more (checkpoint.keep 2)" in said
    # those that are there already take no more
    _save(tmp_path, 1, here)
    _save(tmp_path, 2, here)
    checkpoint.refuse_small_disk(tmp_path, int(files.free_bytes(tmp_path) / 1.5), keep=2)
    assert capsys.readouterr().out == ""
