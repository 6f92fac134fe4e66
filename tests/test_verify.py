"""A run proves itself: its steps trained again have its bits, and whatever was changed is named."""

import fcntl
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
import torch
from made_data import tree
from made_runs import call, make_workspace, train_here, undisturbed, words

from llama import verify
from llama.cli import UserError
from llama.runtime import checkpoint, world

STEPS = 12
ONE_START = "bits are not compared"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with shards and a finished run, checkpoints at steps 4, 8 and 12."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    folder = make_workspace(tmp_path_factory.mktemp("verify me"), random.Random(seed))
    before = Path.cwd()
    os.chdir(folder)
    assert train_here("whole") == 0
    yield folder
    os.chdir(before)


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, beside a copy of the shards."""
    shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Path("runs/whole")


def _verify(*options: str) -> int:
    with undisturbed():
        return verify.main(list(options))


def _stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_whole_run_is_proven_and_not_touched(run: Path, capsys) -> None:
    before, stamps = tree(run.parent.parent), _stamps(run)
    assert _verify(str(run)) == 0
    said = capsys.readouterr().out
    assert "steps 9 to 12" in said and "4 rows of metrics.jsonl    bit-equal" in said
    assert "step-00000012" in said and "tensors                 bit-equal" in said
    assert "DIFFERS" not in said and ONE_START not in said
    # from the oldest checkpoint, through one on the way
    assert _verify(str(run), "--steps", "8") == 0
    said = capsys.readouterr().out
    assert said.count("tensors                 bit-equal") == 2 and "8 rows" in said
    # from a checkpoint that is named, some steps of what is recorded
    assert _verify(str(run / "ckpt/step-00000004"), "--steps", "3", "--hashes", "false") == 0
    said = capsys.readouterr().out
    assert "steps 5 to 7" in said and "3 rows" in said and "shards" not in said
    assert (tree(run.parent.parent), _stamps(run)) == (before, stamps)


def test_rows_behind_the_last_checkpoint_are_enough(run: Path, capsys) -> None:
    shutil.rmtree(run / "ckpt/step-00000012")
    assert _verify(str(run)) == 0
    said = capsys.readouterr().out
    assert "steps 9 to 12" in said and "bit-equal" in said and "tensors" not in said


def test_shards_may_lie_elsewhere(run: Path, capsys) -> None:
    Path("tokens").rename("else where")
    with pytest.raises(UserError, match="tokens"):
        _verify(str(run), "--hashes", "false")
    assert _verify(str(run), "--data", "else where") == 0


# -- what is changed is named ----------------------------------------------------------------------


def _last_digit(run: Path) -> str:
    """Of one number of one row."""
    path = run / "metrics.jsonl"
    rows = list(map(orjson.loads, path.read_bytes().splitlines()))
    rows[9]["grad_norm"] *= 1 + 1e-12
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return "grad_norm of step 10"


def _forge(run: Path, change: Callable[[dict[str, torch.Tensor], dict], None]) -> None:
    """Another last checkpoint, whole by all its hashes."""
    path = run / "ckpt/step-00000012"
    here = world.start()
    listed = checkpoint.Reader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size) for name, entry in listed.items()}
    checkpoint.load(path, tensors, here)
    state = checkpoint.read_state(path)
    change(tensors, state)
    shutil.rmtree(path)
    assert checkpoint.save(run, 12, tensors, state, here, keep=9) is None
    world.stop()


def _one_bit_of_a_moment(run: Path) -> str:
    def change(tensors: dict[str, torch.Tensor], state: dict) -> None:
        tensors["exp_avg.layers.0.attention.wq.weight"].view(torch.int32)[0, 3] ^= 1

    _forge(run, change)
    return "exp_avg.layers.0.attention.wq.weight: 1 bytes on rank 0"


def _the_order(run: Path) -> str:
    def change(tensors: dict[str, torch.Tensor], state: dict) -> None:
        state["segments"][0]["weights"] = {"code": 7, "mail": 4}

    _forge(run, change)
    return "segments"


def _the_random_numbers(run: Path) -> str:
    def change(tensors: dict[str, torch.Tensor], state: dict) -> None:
        state["rng"] = f"{int(state['rng'][0], 16) ^ 1:x}{state['rng'][1:]}"

    _forge(run, change)
    return "rng"


def _a_row_that_was_nan(run: Path) -> str:
    path = run / "metrics.jsonl"
    rows = list(map(orjson.loads, path.read_bytes().splitlines()))
    rows[11]["loss"] = float("nan")
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return "loss of step 12 was None"


@pytest.mark.parametrize(
    "spoil",
    [_last_digit, _one_bit_of_a_moment, _the_order, _the_random_numbers, _a_row_that_was_nan],
)
def test_whatever_differs_is_named(run: Path, capsys, spoil: Callable[[Path], str]) -> None:
    named = spoil(run)
    assert _verify(str(run)) == 1
    said = capsys.readouterr().out
    wrong = [line for line in said.splitlines() if "DIFFERS" in line]
    assert len(wrong) == 1 and named in wrong[0], said
    assert said.endswith("1 faults\n")


def test_flipped_bits_of_any_file_are_named(run: Path, capsys, rng: random.Random, scale) -> None:
    """Of checkpoints and of shards; ids stay in the vocabulary, so that only hashes tell."""
    checkpoints = [p for p in (run / "ckpt").rglob("*") if p.is_file()]
    shards = [p for p in Path("tokens").rglob("*.*") if p.suffix in (".bin", ".idx", ".hash")]
    for path in rng.sample(checkpoints, 3) + rng.sample(shards, scale(3, 20)):
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad) // 2) * 2] ^= 1
        path.write_bytes(bad)
        steps = ["--steps", "0"] if path in shards else []
        assert _verify(str(run), *steps) == 1, path
        said = capsys.readouterr().out
        wrong = [line for line in said.splitlines() if "DIFFERS" in line]
        assert len(wrong) == 1, said
        assert path.name in wrong[0] and path.parent.name in wrong[0], (path, wrong)
        # the damaged one is not started from, nor compared with
        assert path in shards or "bit-equal" in said
        path.write_bytes(good)


# -- what cannot be verified is said in a sentence -------------------------------------------------


def _refused(sentence: str, *options: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        _verify(*options)
    assert "\n" not in str(caught.value)


def test_refusals(run: Path) -> None:
    _refused("runs/none is no run folder", "runs/none")
    _refused("nothing is recorded behind .*step-00000012", str(run / "ckpt/step-00000012"))
    lock = open(run / ".lock", "a+")
    fcntl.flock(lock, fcntl.LOCK_EX)
    _refused("is being trained or verified: wait for it", str(run))
    lock.close()
    Path("tokens").rename("aside")
    _refused("tokens does not exist", str(run), "--hashes", "false", "--steps", "1")
    Path("aside").rename("tokens")
    for step in (4, 8):
        shutil.rmtree(run / f"ckpt/step-{step:08d}")
    _refused("nothing is recorded behind .*step-00000012: .*--steps 0 checks", str(run))
    assert _verify(str(run), "--steps", "0") == 0
    shutil.rmtree("tokens")
    assert _verify(str(run), "--steps", "0") == 1
    shutil.rmtree(run / "ckpt")
    _refused("holds no whole checkpoint", str(run))


def test_rows_far_apart_are_reached(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    options = {"log.every": 6, "checkpoint.every": 3, "train.tokens": 256 * 6}
    assert train_here("sparse", options) == 0
    assert _verify("runs/sparse", "--steps", "1") == 0
    said = capsys.readouterr().out
    assert "steps 4 to 6" in said and "1 rows of metrics.jsonl    bit-equal" in said


def test_a_run_continued_with_other_values_is_proven_in_its_parts(
    place: Path, monkeypatch, capsys
) -> None:
    """Each checkpoint says what it was trained with, whatever config.yaml says by now."""
    monkeypatch.chdir(place)
    assert train_here("changed", {"train.tokens": 256 * 8}) == 0
    changes = {"optim.lr": 3e-3, "data.mixture": '{"code": 0.4, "mail": 0.6}'}
    assert train_here("changed", {**changes, "checkpoint.accept_changes": True}) == 0
    for start, end in ((4, 8), (8, 12)):
        assert _verify(f"runs/changed/ckpt/step-{start:08d}", "--steps", "8") == 0
        said = capsys.readouterr().out
        assert f"steps {start + 1} to {end}" in said and said.count("bit-equal") == 2


# -- many interruptions, other worlds --------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, "{tests}")
import made_runs

random.seed({seed})
path, killed = Path("runs/killed/metrics.jsonl"), 0
while killed < {kills}:
    # not beyond the last checkpoint but one: a finished run takes no kill
    step = random.randrange(1, {steps} - 2)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(made_runs.train_here("killed", {options}))
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if path.exists() and path.read_bytes().count(b"\\n") >= step:
            time.sleep(random.random() * 0.05)
            os.kill(child, signal.SIGKILL)
            killed += 1
            os.waitpid(child, 0)
            break
    else:
        raise SystemExit("it ended unkilled")
sys.exit(made_runs.train_here("killed", {options}))
"""


def _exact(run: Path) -> list[dict[str, float]]:
    """What rows say about the model, without speed and memory."""
    keep = ("step", "tokens", "loss", "lr", "grad_norm")
    rows = map(json.loads, (run / "metrics.jsonl").open())
    return [{k: v for k, v in r.items() if k in keep or k.startswith("loss/")} for r in rows]


@pytest.mark.full
@pytest.mark.faults
def test_killed_again_and_again_it_ends_with_the_same_bits(
    place: Path, monkeypatch, rng: random.Random, scale, score, capsys
) -> None:
    monkeypatch.chdir(place)
    kills, steps = scale(2, 20), 40
    options = {"train.tokens": 256 * steps, "checkpoint.every": 2, "validation.every": 5}
    assert train_here("unkilled", options) == 0
    tests = Path(__file__).parent
    settings = {"tests": tests, "seed": rng.randrange(10**6), "kills": kills, "steps": steps}
    Path("killed.py").write_text(KILLED.format(options=options, **settings))
    call("killed.py", cwd=place)
    names = ("unkilled", "killed")
    rows, states, tensors = [], [], []
    for run in (Path("runs") / name for name in names):
        newest = checkpoint.newest(run)
        rows.append(_exact(run))
        states.append(checkpoint.read_state(newest))
        states[-1]["config"].pop("name")
        reader = checkpoint.Reader(newest)
        listed = reader.read_metadata().state_dict_metadata
        found = {name: torch.empty(entry.size) for name, entry in listed.items()}
        torch.distributed.checkpoint.load(found, storage_reader=reader, no_dist=True)
        tensors.append(found)
    assert rows[0] == rows[1] and len(rows[0]) == steps
    # the random numbers, the order and the window are in here
    assert states[0] == states[1]
    assert tensors[0].keys() == tensors[1].keys()
    differing = sum(
        int((ours.view(torch.int32) != tensors[1][name].view(torch.int32)).sum())
        for name, ours in tensors[0].items()
    )
    assert _verify("runs/killed", "--hashes", "false", "--steps", "10") == 0
    score("resume.kills", kills, ">= 20")
    score("resume.differing", differing, "0")
    assert differing == 0


@pytest.mark.full
@pytest.mark.faults
def test_four_processes_prove_bits_and_another_number_losses(
    place: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(place)
    root = Path(__file__).parent.parent
    call(str(root / "train.py"), *words("shared"), cwd=place, size=4)
    assert "tensors                 bit-equal" in call(
        "-m", "llama.verify", "runs/shared", cwd=place, size=4
    )
    said = call("-m", "llama.verify", "runs/shared", cwd=place, size=2)
    assert "bits are not compared, for processes: 4 -> 2" in said
    path = Path("runs/shared/metrics.jsonl")
    rows = list(map(json.loads, path.open()))
    rows[9]["loss"] *= 1 + 1e-5
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    assert _verify("runs/shared") == 1
    said = capsys.readouterr().out
    assert "for processes: 4 -> 1" in said and "DIFFERS: loss of step 10" in said
