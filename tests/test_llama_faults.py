"""The fault registry: what strikes where, what is refused, and that every point is in the code."""

import ast
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_repo import ROOT

from llama import faults, files
from llama.cli import UserError


def _arm(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    faults.armed.cache_clear()
    monkeypatch.setenv(faults.VARIABLE, text)


def test_points_listed_and_points_in_the_code_are_the_same() -> None:
    used = set()
    for path in [ROOT / "train.py", *(ROOT / "llama").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "faults.point":
                name = node.args[0]
                assert isinstance(name, ast.Constant), f"{path}: {ast.unparse(node)}"
                used.add(name.value)
    assert used == set(faults.POINTS)


def test_conditions_and_counts(monkeypatch, capsys) -> None:
    _arm(monkeypatch, "ckpt.hashed:step=3,rank=1,action=raise; ckpt.*:action=enospc,hit=2,step=5")
    faults.point("ckpt.hashed", step=3, rank=0)
    faults.point("ckpt.hashed", step=4, rank=1)
    with pytest.raises(faults.Fault):
        faults.point("ckpt.hashed", step=3, rank=1)
    assert "FAULT ckpt.hashed rank=1 attempt=0 step=3: raise" in capsys.readouterr().err
    faults.point("ckpt.folder", step=5)
    faults.point("file.opened", name="x", step=5)
    with pytest.raises(OSError, match="No space left") as caught:
        faults.point("ckpt.renamed", step=5)
    assert caught.value.errno == errno.ENOSPC
    faults.point("ckpt.named", step=5)


def test_rank_and_attempt_come_from_torchrun(monkeypatch) -> None:
    _arm(monkeypatch, "start.joined:rank=2,attempt=0,action=raise")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    faults.point("start.joined")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(faults.Fault):
        faults.point("start.joined")


def test_chance_is_seeded(monkeypatch) -> None:
    def struck() -> list[int]:
        _arm(monkeypatch, "ckpt.state:action=raise,chance=0.3,seed=5")
        found = []
        for number in range(200):
            try:
                faults.point("ckpt.state")
            except faults.Fault:
                found.append(number)
        return found

    first = struck()
    assert first == struck() and 30 < len(first) < 90


def test_a_hang_ends_and_a_flip_changes_one_bit(monkeypatch, rng) -> None:
    _arm(monkeypatch, "ckpt.state:action=hang,seconds=0.2")
    began = time.monotonic()
    faults.point("ckpt.state")
    assert time.monotonic() - began >= 0.2

    _arm(monkeypatch, f"ckpt.written:action=flip,seed={rng.randrange(10**6)}")
    before = torch.randn(30, 7)
    after = torch.nn.Parameter(before.clone())
    faults.point("ckpt.written", after)
    pairs = zip(before.numpy().tobytes(), after.detach().numpy().tobytes(), strict=True)
    assert sum((a ^ b).bit_count() for a, b in pairs) == 1

    _arm(monkeypatch, "ckpt.written:action=nan")
    faults.point("ckpt.written", before)
    assert int(before.isnan().sum()) == 1


@pytest.mark.parametrize(
    "text, said",
    [
        ("ckpt.hash:action=kill", "'ckpt.hash' is no point of start.joined"),
        (
            "ckpt.hashed:action=explode",
            "is 'explode', expected one of kill raise hang hold flip nan",
        ),
        ("ckpt.hashed", "the action of ckpt.hashed is ''"),
        ("ckpt.hashed:action=kill,hit=soon", "could not convert string to float: 'soon'"),
    ],
)
def test_a_fault_that_cannot_strike_is_a_users_error(monkeypatch, text: str, said: str) -> None:
    _arm(monkeypatch, text)
    with pytest.raises(UserError, match=f"^LLAMA_FAULTS: .*{said}"):
        faults.point("start.joined")


@pytest.mark.parametrize("action, number", [("kill", 9), ("sigterm", 15), ("sigusr1", 10)])
def test_signals(action: str, number: int) -> None:
    code = "from llama import faults; faults.point('start.joined')"
    env = {**os.environ, faults.VARIABLE: f"start.*:action={action}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == -number and "FAULT start.joined" in done.stderr


def test_an_atomic_file_struck_anywhere_is_old_or_new(monkeypatch, tmp_path: Path) -> None:
    path = tmp_path / "file"
    monkeypatch.setattr(files, "RETRY_AFTER_S", ())
    for number, point in enumerate(p for p in faults.POINTS if p.startswith("file.")):
        before = path.read_bytes() if path.exists() else None
        _arm(monkeypatch, f"{point}:name=file,action=eio")
        with pytest.raises(OSError, match="Input/output error"):
            files.write_atomic(path, b"%d" % number)
        after = path.read_bytes() if path.exists() else None
        assert after == (b"%d" % number if point == "file.renamed" else before)
        assert [p for p in tmp_path.iterdir() if p.name != "file"] == []
