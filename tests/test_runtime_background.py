"""Saving in the background: what is saved is what was there, one at a time, failures are said."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from made_saves import loaded, plain, run_made_saves

from llama import faults, files
from llama.cli import UserError
from llama.config import CheckpointConfig
from llama.runtime import background, checkpoint, world

pytestmark = pytest.mark.faults
CFG = CheckpointConfig(keep=3)


@pytest.fixture(scope="module")
def here() -> Iterator[world.World]:
    yield world.start()
    world.stop()


@pytest.fixture
def arm(monkeypatch) -> Iterator:
    def armed(text: str) -> None:
        faults.armed.cache_clear()
        monkeypatch.setenv(faults.VARIABLE, text)

    yield armed


class Held:
    """Lets the thread of a save go on when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, real = threading.Event(), checkpoint.save

        def save(*arguments: object) -> str | None:
            assert self.go.wait(60)
            return real(*arguments)

        monkeypatch.setattr(checkpoint, "save", save)


def test_a_step_does_not_wait_and_the_copy_is_of_its_moment(
    tmp_path: Path, here, monkeypatch, capsys
) -> None:
    held, saver = Held(monkeypatch), background.Saver()
    tensors, state = plain(1), {"step": 1, "segments": [{"first_step": 0}]}
    assert saver.save(tmp_path, 1, tensors, state, here, CFG, wait=False)
    # the thread has not begun to write: the step went on without it
    assert saver.busy() and checkpoint.steps(tmp_path) == []
    for tensor in tensors.values():
        tensor.zero_()
    state["segments"][0]["first_step"] = 9
    held.go.set()
    saver.finish()
    assert not saver.busy() and saver.problem is None
    path = checkpoint.newest(tmp_path)
    assert loaded(path, here)
    assert checkpoint.read_state(path)["segments"] == [{"first_step": 0}]
    assert f"saved {path} in " in capsys.readouterr().out
    assert saver.take_stall() and saver.take_stall() is None


def test_a_second_save_waits_for_the_first_and_says_so(
    tmp_path: Path, here, monkeypatch, capsys
) -> None:
    held, saver = Held(monkeypatch), background.Saver()
    assert saver.save(tmp_path, 1, plain(1), {"step": 1}, here, CFG, wait=False)
    timer = threading.Timer(0.3, held.go.set)
    timer.start()
    assert saver.save(tmp_path, 2, plain(2), {"step": 2}, here, CFG, wait=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 2 waits: the checkpoint before it is still being written"
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [1, 2] and len(lines) == 3
    # with wait the save is made before it returns
    assert not saver.busy() and saver.take_stall() >= 0.2
    timer.join()


def test_failures_are_said_and_three_in_a_row_stop(
    tmp_path: Path, here, arm, capsys, monkeypatch
) -> None:
    saver = background.Saver()
    monkeypatch.setattr(files, "RETRY_AFTER_S", ())

    def save(step: int, wait: bool = False) -> bool:
        begun = saver.save(tmp_path, step, plain(step), {"step": step}, here, CFG, wait)
        saver.finish()
        return begun

    assert save(1)
    arm("ckpt.hashed:action=eio")
    assert save(2) and save(3)
    said = capsys.readouterr().out
    assert "WARNING: the checkpoint step-00000002 failed: rank 0: OSError: [Errno 5]" in said
    assert os.listdir(checkpoint.folder(tmp_path)) == ["step-00000001"]
    arm("")
    assert save(4)
    arm("ckpt.state:action=raise")
    # one that succeeds begins the count anew
    assert save(5) and save(6)
    assert not save(7, wait=True)
    with pytest.raises(UserError, match="3 checkpoints of .* in a row .*planted at ckpt.state"):
        save(8)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [1, 4]


def test_what_escapes_from_the_thread_is_a_failure_too(
    tmp_path: Path, here, monkeypatch, capsys
) -> None:
    saver = background.Saver()
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: 1 / 0)
    assert saver.save(tmp_path, 1, plain(1), {"step": 1}, here, CFG, wait=False)
    saver.finish()
    assert "step-00000001 failed: ZeroDivisionError" in capsys.readouterr().out


def test_in_the_foreground_where_that_is_asked_for(tmp_path: Path, here) -> None:
    saver, cfg = background.Saver(), CheckpointConfig(keep=3, background=False)
    before = threading.active_count()
    assert saver.save(tmp_path, 1, plain(1), {"step": 1}, here, cfg, wait=False)
    assert threading.active_count() == before and loaded(checkpoint.newest(tmp_path), here)


@pytest.mark.slow
def test_saves_of_two_ranks_do_not_disturb_their_collectives(tmp_path: Path, here) -> None:
    run_made_saves("collectives", tmp_path, 0, 20)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [18, 19, 20]
    assert all(loaded(path, here) for _, path in checkpoint.steps(tmp_path))


@pytest.mark.slow
def test_a_rank_that_dies_while_all_save_ends_the_others(tmp_path: Path, here) -> None:
    """Its neighbours alone see that it is gone; nobody may be left waiting for these."""
    codes = run_made_saves("lost", tmp_path, 0, 1)
    assert codes == {"ckpt.state": [-9, 1, 1, 1], "file.written": [1, 1, -9, 1]}
    assert not checkpoint.steps(tmp_path)


def test_the_stall_of_a_small_model(tmp_path: Path, here, scale, score) -> None:
    """1.3 million parameters and their moments, as many tensors as the quickstart has."""
    tensors = {f"model.{n}": torch.randn(192, 512) for n in range(3 * 13)}
    saver = background.Saver()
    for step in range(1, scale(3, 20)):
        saver.save(tmp_path, step, tensors, {"step": step}, here, CFG, wait=False)
        saver.finish()
        score("stall_s", saver.take_stall(), "<= 0.1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_copy_from_the_gpu_is_of_its_moment(tmp_path: Path, here) -> None:
    saver, tensors = background.Saver(), {n: t.cuda() for n, t in plain(1).items()}
    saver.save(tmp_path, 1, tensors, {"step": 1}, here, CFG, wait=False)
    saver.before_update()
    for tensor in tensors.values():
        tensor.zero_()
    saver.finish()
    assert loaded(checkpoint.newest(tmp_path), here)
