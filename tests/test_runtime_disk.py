"""Disks that fail for a moment, show files late, or are of somebody else: tried again, or told."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from made_data import tree
from made_runs import make_workspace, rows, train_here, words
from made_saves import loaded, plain
from test_repo import ROOT

import train
from llama import config, faults, files
from llama.cli import UserError
from llama.corpus import runner
from llama.runtime import checkpoint, folder, world
from llama.runtime.state import resume

pytestmark = pytest.mark.faults
PASSING = ["eio", "estale", "erofs", "etimedout", "enotconn"]


@contextmanager
def group() -> Iterator[world.World]:
    try:
        yield world.start()
    finally:
        world.stop()


@pytest.fixture
def here() -> Iterator[world.World]:
    with group() as alone:
        yield alone


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited between tries; no time passes."""
    waited: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waited.append)
    return waited


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def armed(text: str) -> None:
        faults.armed.cache_clear()
        monkeypatch.setenv(faults.VARIABLE, text)

    return armed


def _save(run: Path, step: int, here: world.World) -> str | None:
    return checkpoint.save(run, step, plain(step), {"step": step}, here, 2)


# -- moments ---------------------------------------------------------------------------------------


def test_a_moment_without_a_disk_costs_no_checkpoint(
    tmp_path: Path, here, arm, paused, scale, score, rng: random.Random, capsys
) -> None:
    """At every point of a save, once or twice, then the disk is there again."""
    points = [p for p in faults.POINTS if p.startswith(("ckpt.", "file."))]
    tried, lost = 0, 0
    for point in sorted(set(points) - {"ckpt.staged", "ckpt.protected", "ckpt.aside"}):
        if point in ("ckpt.trashed", "ckpt.pruned"):
            continue  # after the save; test_runtime_damage.py has them
        for action in rng.sample(PASSING, scale(1, len(PASSING))):
            run = tmp_path / f"{point}-{action}"
            assert _save(run, 1, here) is None
            paused.clear()
            arm(f"{point}:hit=1,action={action};{point}:hit=2,action={action}")
            problem = _save(run, 2, here)
            said = capsys.readouterr()
            arm("")
            tried += 1
            assert f"FAULT {point} " in said.err
            good = problem is None and loaded(checkpoint.path_of(run, 2), here)
            names = sorted(p.name for p in checkpoint.folder(run).iterdir())
            lost += not good or names != ["step-00000001", "step-00000002"]
            assert paused and sorted(paused) == paused, "it waits longer and longer"
    score("disk.moment", tried, ">= 60")
    score("disk.moment.lost", lost, "0")
    assert lost == 0


def test_a_full_disk_is_not_tried_again(tmp_path: Path, here, arm, paused) -> None:
    arm("ckpt.hashed:action=enospc")
    assert "no space left" in str(_save(tmp_path, 1, here))
    assert [pause for pause in paused if pause] == []


def test_a_disk_that_stays_away_is_a_reason_and_the_older_ones_stay(
    tmp_path: Path, here, arm, paused, capsys
) -> None:
    assert _save(tmp_path, 1, here) is None
    arm("file.written:action=estale")
    problem = _save(tmp_path, 2, here)
    arm("")
    assert problem and "stale" in problem.lower() and "free on the disk" in problem
    assert capsys.readouterr().out.count("WARNING: step 2 is not saved yet, trying again: ") == len(
        files.RETRY_AFTER_S
    )
    assert sorted(os.listdir(checkpoint.folder(tmp_path))) == ["step-00000001"]


def test_files_of_other_machines_may_show_late(tmp_path: Path, here, paused, monkeypatch) -> None:
    listed, shown = os.listdir, []

    def late(path: object) -> list[str]:
        names = listed(path)
        if ".tmp-" in str(path):
            shown.append(names)
            return names if len(shown) == 3 else names[1:]
        return names

    monkeypatch.setattr(os, "listdir", late)
    assert _save(tmp_path, 1, here) is None
    assert len(shown) == 3 and loaded(checkpoint.newest(tmp_path), here)


def test_a_file_is_written_anew_not_synced_again(tmp_path: Path, monkeypatch, paused) -> None:
    """After a failed fsync the next one succeeds, though the data is lost."""
    handles, real = [], os.fsync

    def fsync(handle: int) -> None:
        handles.append(os.fstat(handle).st_ino)
        if len(handles) == 1:
            raise OSError(errno.EIO, "Input/output error")
        real(handle)

    keep = open(tmp_path / "keep", "w")  # so that the second file gets another number
    monkeypatch.setattr(os, "fsync", fsync)
    files.write_atomic(tmp_path / "file", b"content")
    keep.close()
    assert (tmp_path / "file").read_bytes() == b"content" and len(paused) == 1
    assert sorted(os.listdir(tmp_path)) == ["file", "keep"]


def test_a_unit_of_documents_or_shards_is_made_again(paused) -> None:
    made = []

    def work(job: object, at: object) -> dict[str, object]:
        made.append(job)
        if len(made) < 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return {"unit": job}

    works = {"folder": (work, lambda job: {})}
    assert runner._work(works, ("folder", "job"), lambda place: None)["unit"] == "job"
    assert made == ["job"] * 3
    made.clear()
    works = {"folder": (lambda job, at: made.append(job) or 1 / 0, lambda job: {})}
    with pytest.raises(ZeroDivisionError):
        runner._work(works, ("folder", "job"), lambda place: None)
    assert made == ["job"], "only what may pass is tried again"


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_damaged(
    tmp_path: Path, here, paused, monkeypatch
) -> None:
    for step in (1, 2):
        assert _save(tmp_path, step, here) is None
    real, tried = files.sha256, []

    def sha256(path: Path) -> str:
        tried.append(path)
        if len(tried) == 2:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    monkeypatch.setattr(files, "sha256", sha256)
    assert checkpoint.choose(tmp_path, here) == checkpoint.path_of(tmp_path, 2)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_one_that_stays_unreadable_is_refused_and_not_renamed(
    number: int, tmp_path: Path, here, paused, monkeypatch
) -> None:
    for step in (1, 2):
        assert _save(tmp_path, step, here) is None

    def sha256(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files, "sha256", sha256)
    with pytest.raises(UserError, match=f"step-00000002 cannot be read: .*{os.strerror(number)}"):
        checkpoint.choose(tmp_path, here)
    assert sorted(os.listdir(checkpoint.folder(tmp_path))) == ["step-00000001", "step-00000002"]


def test_a_mark_does_not_bring_a_removed_checkpoint_back(tmp_path: Path, here) -> None:
    assert _save(tmp_path, 1, here) is None
    checkpoint.path_of(tmp_path, 1).rename(tmp_path / "trash")
    with pytest.raises(FileNotFoundError):
        checkpoint.protect(checkpoint.path_of(tmp_path, 1), "a spike")
    assert checkpoint.steps(tmp_path) == []


# -- formats ---------------------------------------------------------------------------------------


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path, here, monkeypatch) -> None:
    assert _save(tmp_path, 1, here) is None
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    assert _save(tmp_path, 2, here) is None
    monkeypatch.undo()
    said = r"step-00000002 is of format 2, this version reads up to 1: go on with the version"
    for look in (lambda: checkpoint.choose(tmp_path, here), lambda: checkpoint.newest(tmp_path)):
        with pytest.raises(UserError, match=said):
            look()
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [1, 2]


def test_a_disk_without_locks_is_a_warning(tmp_path: Path, here, monkeypatch, capsys) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    with folder.held(tmp_path, here), pytest.raises(UserError, match="being trained or verified"):
        with folder.held(tmp_path, here):
            pass
    monkeypatch.setattr(files.fcntl, "flock", flock)
    with folder.held(tmp_path, here):
        said = capsys.readouterr().out
    assert "cannot be locked (Function not implemented): start it only once" in said


OLD = ROOT / "tests/checkpoint_format_1.tar.xz"


@pytest.mark.parametrize("path", [OLD], ids=lambda path: path.name)
def test_a_checkpoint_of_a_released_format_is_gone_on_from(
    path: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A run of 8 steps with its shards, cut off after step 4; what it came to is in it too."""
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    expected = json.loads(Path("expected.json").read_text())
    found = checkpoint.newest("runs/golden")
    listed = checkpoint.Reader(found).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size) for name, entry in listed.items()}
    with group() as alone:
        assert checkpoint.choose("runs/golden", alone) == found
        checkpoint.load(found, tensors, alone)
    hashes = {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in tensors.items()}
    assert hashes == expected["tensors"]
    assert train_here("golden", expected["options"]) == 0
    assert "resuming runs/golden from step 4" in capsys.readouterr().out
    losses = [row["loss"] for row in rows(Path("runs/golden"))]
    # another machine adds up in another order
    assert losses == pytest.approx(expected["losses"], rel=1e-5)


def test_changed_values_of_the_optimizer_win_over_saved_ones(tmp_path: Path, monkeypatch) -> None:
    """Whoever lowers beta2 after a spike must not train on with the old one."""
    with tarfile.open(OLD) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    changes = {"optim.betas": "[0.8, 0.9]", "optim.weight_decay": 0.3}
    options = json.loads(Path("expected.json").read_text())["options"] | changes
    cfg = config.load(words("golden", options | {"checkpoint.accept_changes": "true"}))
    with group() as alone:
        state = train.build(cfg, alone, Path("runs/golden"))
        assert resume(state) and state.step == 4
        train.step(state, *train.loader.Loader(state.sources, state.order).batch(4, 0, 4))
        groups = state.optimizer.param_groups
        assert {tuple(g["betas"]) for g in groups} == {(0.8, 0.9)}
        assert {g["weight_decay"] for g in groups} == {0.3, 0.0}


# -- of somebody else ------------------------------------------------------------------------------

OTHER_USER = """
import os, sys
sys.path.insert(0, "tests")
from pathlib import Path
import made_runs, train

os.chdir(sys.argv[1])
os.setgroups([]), os.setgid(65534), os.setuid(65534)
os.environ["HOME"] = "/nonexistent"
sys.argv[1:] = made_runs.words(sys.argv[2])
train.cli.run(train.main)
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root may be another")
def test_what_another_user_owns_is_told_and_kept(rng: random.Random) -> None:
    # pytest's own folders are closed to others
    place = Path(tempfile.mkdtemp(prefix="another user ", dir="/tmp"))
    before = Path.cwd()
    try:
        make_workspace(place, rng)
        os.chdir(place)
        assert train_here("theirs") == 0
        os.chdir(before)
        place.chmod(0o755), (place / "runs").chmod(0o777)
        run = place / "runs/theirs"
        run.chmod(0o777)
        cases = {
            "the lock": (run / ".lock", 0o600),
            "the checkpoints": (run / "ckpt", 0o700),
            "a checkpoint": (run / "ckpt/step-00000012", 0o700),
        }
        (run / ".lock").chmod(0o666), (run / "stacks/rank-0.txt").chmod(0o666)
        contents = tree(run / "ckpt")
        for name, (path, mode) in cases.items():
            usual = path.stat().st_mode
            path.chmod(mode)
            done = subprocess.run(
                [sys.executable, "-c", OTHER_USER, str(place), "theirs"],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            said = done.stdout + done.stderr
            path.chmod(usual)
            assert done.returncode == 2 and "Traceback" not in said, said
            line = [line for line in said.splitlines() if line.startswith("error: ")]
            assert len(line) == 1 and "ermission denied" in line[0] and path.name in line[0], said
            assert tree(run / "ckpt") == contents, name
    finally:
        os.chdir(before)
        shutil.rmtree(place)
