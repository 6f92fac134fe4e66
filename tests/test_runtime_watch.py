"""Runs that are stopped in every phase, hang, die and lose their launcher."""

import faulthandler
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_starts import ENV, STEPS, Run, make_tokens

from llama.config import Config, TrainConfig
from llama.runtime import checkpoint, signals, watch, world

pytestmark = [pytest.mark.slow, pytest.mark.faults]
SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("a place with spaces")
    make_tokens(place)
    return place


@pytest.fixture(scope="module")
def whole(place: Path) -> Run:
    """A run of one process that nobody disturbs."""
    run = Run(place, "whole")
    code, said = run.forked()
    assert code == 0, said
    assert [row["step"] for row in run.rows()] == list(range(1, STEPS + 1))
    assert sum("val/code" in row for row in run.rows()) == STEPS // 4
    return run


@pytest.fixture(scope="module")
def pair(place: Path) -> Run:
    """The same of two processes."""
    run = Run(place, "pair")
    said, _ = run.start(2).communicate()
    assert run.reason()["exit"] == "done", said
    return run


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are named in /proc only")
def test_a_run_that_is_over_leaves_no_thread_of_gloo(place: Path) -> None:
    # a group that is still held aborts the end of the interpreter, once in some hundred runs
    after = (
        "import pathlib, sys, train; made, here = [], train.world.World\n"
        "train.world.World = lambda *told: made.append(here(*told)) or made[0]\n"
        "code = train.main(sys.argv[1:])\n"
        "names = [p.read_text() for p in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "assert made and not [name for name in names if 'gloo' in name], names\n"
        "sys.exit(code)"
    )
    run = Run(place, "over")
    subprocess.run([sys.executable, "-c", after, *run.words()], cwd=place, env=ENV, check=True)
    assert run.reason()["exit"] == "done"


def wait_until(what: Callable[[], object], child: subprocess.Popen[str] | None = None) -> None:
    """Wait for a condition; the test's own timeout ends a wait in vain."""
    while not what():
        assert child is None or child.poll() is None or what(), child.communicate()[0]
        time.sleep(0.02)


# where the signal comes, options of that start, the step it stops at, whether a checkpoint is made
PHASES: dict[str, tuple[str, dict[str, object], int, bool]] = {
    "start-up": ("start.joined:action={}", {}, 0, False),
    "before step 1": (
        "step.reading:step=1,action={}; step.reading:step=1,action=hang,seconds=2",
        {},
        0,
        False,
    ),
    "training": ("step.begun:step=2,action={}", {}, 2, True),
    "evaluation": ("step.validating:step=4,hit=2,action={}", {}, 4, True),
    "a save": (
        "ckpt.hashed:step=6,action={}",
        {"checkpoint.every": 6, "checkpoint.background": False},
        6,
        True,
    ),
    "a save in the background": (
        "ckpt.hashed:step=7,action={}; step.begun:step=8,action=hang,seconds=2",
        {"checkpoint.every": 7},
        8,
        True,
    ),
}


def stopped_in_every_phase(run: Run, names: dict[str, str]) -> None:
    """One run, stopped in one phase after the other, then finished."""
    for phase, (where, options, step, saved) in PHASES.items():
        before = {step for step, _ in checkpoint.steps(run.folder)}
        code, said = run.forked(where.format(names[phase].lower()), **options)
        assert code == 75, (phase, said)
        assert f"{names[phase]}: stopping where it is safe" in said
        assert "Traceback" not in said
        reason = run.reason()
        assert (reason["exit"], reason["why"]) == ("requeue", names[phase]), phase
        after = {step for step, _ in checkpoint.steps(run.folder)}
        made = {step} if saved else set()
        if phase == "a save in the background":
            made.add(7)
        assert reason["step"] == step, (phase, said)
        assert after - before == made, (phase, after)
        if phase == "evaluation":
            assert "the validation of step 4 was cut short" in said
            assert [row["step"] for row in run.rows()] == [1, 2, 3]
        assert not list(run.processes())
    code, said = run.forked()
    assert code == 0 and run.reason()["exit"] == "done", said


def test_a_signal_in_every_phase(
    place: Path, whole: Run, rng: random.Random, scale: Callable[[int, int], int], score
) -> None:
    for chain in range(scale(1, 4)):
        shift = chain if scale(0, 1) else rng.randrange(4)
        names = {phase: SIGNALS[(i + shift) % 4] for i, phase in enumerate(PHASES)}
        run = Run(place, f"stopped-{chain}")
        stopped_in_every_phase(run, names)
        assert run.rows() == whole.rows()
        score("signals", len(PHASES))
    score("signals.failed", 0, "0")


def test_a_row_made_up_for_is_written_once(place: Path, whole: Run) -> None:
    """Also where the start that makes the validation up is killed before it has saved."""
    run = Run(place, "made-up")
    for fault, expected in (
        ("step.validating:step=4,action=sigterm", 75),
        ("step.begun:step=6,action=kill", -signal.SIGKILL),
        ("step.begun:step=5,action=kill", -signal.SIGKILL),
        ("", 0),
    ):
        code, said = run.forked(fault)
        assert code == expected, said
    assert run.rows() == whole.rows()


def caught(pid: int) -> bool:
    """Whether a process has set its own handlers: that of SIGTSTP is the last."""
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(mask and int(mask[1], 16) >> (signal.SIGTSTP - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_while_torch_is_imported(place: Path, rng: random.Random) -> None:
    run = Run(place, "importing")
    child = run.start(1)
    wait_until(lambda: caught(child.pid), child)
    # torch has hundreds of files
    assert "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text()
    child.send_signal(getattr(signal, rng.choice(SIGNALS)))
    said, _ = child.communicate()
    assert child.returncode == 75 and run.reason()["exit"] == "requeue", said
    assert run.reason()["step"] == 0 and not checkpoint.steps(run.folder)


@pytest.mark.parametrize(
    ("before", "passed_on", "heard"),
    [
        ("SIG_DFL", "SIGTERM", signal.SIGHUP),
        ("SIG_IGN", "SIGTERM", 0),
        # what torchrun passes on under nohup must be heard, or it kills the run in the end
        ("SIG_IGN", "SIGTERM,SIGHUP", signal.SIGHUP),
    ],
)
def test_a_closed_terminal_stops_a_run_unless_nohup(
    before: str, passed_on: str, heard: int
) -> None:
    code = (
        f"import os, signal; signal.signal(signal.SIGHUP, signal.{before})\n"
        "from llama.runtime import signals; stop = signals.listen()\n"
        "os.kill(os.getpid(), signal.SIGHUP); print(stop.number)"
    )
    env = ENV | {"TORCHELASTIC_SIGNALS_TO_HANDLE": passed_on}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert int(said.stdout) == heard


def test_a_second_signal_ends_a_run_that_hangs(place: Path, rng: random.Random) -> None:
    run = Run(place, "hanging")
    child = run.start(1, "step.begun:step=3,action=hang")
    wait_until(lambda: (run.folder / "metrics.jsonl").exists() and len(run.rows()) == 2, child)
    first, second = rng.sample(SIGNALS, 2)
    child.send_signal(getattr(signal, first))
    assert any(f"{first}: stopping where it is safe" in line for line in child.stdout)
    time.sleep(0.5)  # sooner it would be taken for the same request
    child.send_signal(getattr(signal, second))
    said, _ = child.communicate()
    assert child.returncode == 128 + getattr(signal, second), said
    assert f"{second}: stopped at once" in said and not list(run.processes())


@pytest.mark.full
def test_a_rank_that_keeps_python_from_running_is_ended(place: Path, whole: Run) -> None:
    """Alone it has nobody who would tell: a thread of C writes the stacks and ends it."""
    run = Run(place, "held", {"train.step_timeout": 4, "checkpoint.every": 2})
    code, said = run.forked("step.begun:step=6,action=hold")
    assert code == 1, said
    stacks = (run.folder / "stacks" / "rank-0.txt").read_text()
    assert "Timeout" in stacks and "strike" in stacks and stacks.startswith("alive")
    # and what it is in time with is not ended: this one lasts longer than the timeout
    code, said = run.forked("step.begun:step=8,action=hold,seconds=5")
    assert code == 0 and run.rows() == whole.rows(), said


@pytest.mark.full
@pytest.mark.parametrize("action", ["hang", "hold"])
def test_a_start_that_hangs_is_ended(place: Path, action: str) -> None:
    run = Run(place, f"never-{action}", {"train.save_timeout": 5})
    code, said = run.forked(f"start.joined:action={action}")
    assert code == 1 and "Timeout (0:00:05)!" in said and "world.py" in said, said
    assert not run.folder.exists()


@pytest.mark.full
def test_time_while_a_run_is_stopped_does_not_count(place: Path, whole: Run) -> None:
    """Ctrl-Z, for longer than a rank may hang; not for a process that somebody stops with force."""
    run = Run(place, "asleep", {"train.step_timeout": 2, "train.save_timeout": 3})
    child = run.start(1, "step.begun:step=5,action=hang,seconds=1")
    wait_until(lambda: (run.folder / "metrics.jsonl").exists() and len(run.rows()) == 4, child)
    child.send_signal(signal.SIGTSTP)
    status = Path(f"/proc/{child.pid}/stat")
    wait_until(lambda: status.read_text().rpartition(")")[2].split()[0] == "T", child)
    time.sleep(8)
    child.send_signal(signal.SIGCONT)
    said, _ = child.communicate()
    assert child.returncode == 0 and run.rows() == whole.rows(), said


def test_data_that_is_never_read_ends_the_run_by_name(place: Path, whole: Run) -> None:
    run = Run(place, "reading", {"train.step_timeout": 3, "checkpoint.every": 2})
    code, said = run.forked("step.reading:step=7,action=hang")
    assert code == 1 and run.reason()["exit"] == "failed", said
    assert re.search(r"still reading window \d+ of tokens/(code|mail)/train", run.reason()["why"])
    code, said = run.forked()
    assert code == 0 and run.rows() == whole.rows(), said


def test_a_last_save_that_fails_is_one_sentence(place: Path, whole: Run) -> None:
    run = Run(place, "full", {"checkpoint.every": 8})
    code, said = run.forked(f"ckpt.hashed:step={STEPS},action=enospc")
    expected = (
        rf"^error: the last checkpoint, of step {STEPS}, could not .*no space left on the disk"
    )
    assert code == 2 and "Traceback" not in said and re.search(expected, said, re.MULTILINE), said
    assert run.reason()["exit"] == "failed" and run.reason()["step"] == STEPS
    code, said = run.forked()
    assert code == 0 and "resuming runs/full from step 8" in said
    assert run.rows() == whole.rows(), said


# -- two processes under torchrun ------------------------------------------------------------------


def test_an_error_a_kill_and_a_hang_then_the_same_curve(place: Path, pair: Run, score) -> None:
    """Three starts end badly at rank 1, each by another way; torchrun's fourth one finishes."""
    run = Run(place, "unlucky", {"checkpoint.every": 2, "train.step_timeout": 4})
    faults = ";".join(
        f"step.begun:rank=1,{where}"
        for where in (
            "step=4,attempt=0,action=raise",
            "step=7,attempt=1,action=kill",
            "step=10,attempt=2,action=hang",
        )
    )
    child = run.start(2, faults, "--max-restarts", "3")
    said, _ = child.communicate()
    assert child.returncode == 0 and run.reason()["exit"] == "done", said
    assert run.rows() == pair.rows()
    # the first to fail tells its own error, with its place; the others do not
    told = r"llama.faults.Fault: planted at step.begun\n(\[rank1\]: )?on rank 1 at step 3\n"
    assert re.search(told, said)
    assert "rank 0 ends: another one has failed" in said
    assert len(re.findall(r"^\S*resuming runs/unlucky from step", said, re.MULTILINE)) == 3
    # both ranks say that they hang, and where
    for rank, function in (0, "distributed_c10d.py"), (1, "strike"):
        assert (
            f"ERROR: rank {rank} hangs: nothing for 4 s, training after step 9 "
            "(train.step_timeout); stacks of every rank are in runs/unlucky/stacks"
        ) in said
        stacks = (run.folder / "stacks" / f"rank-{rank}.txt").read_text()
        assert "Timeout" in stacks and "Current thread" not in stacks
        assert "train.py" in stacks and function in stacks, stacks
    assert not list(run.processes())
    score("restarts", 3)
    score("restarts.failed", 0, "0")


@pytest.mark.full
@pytest.mark.parametrize("name", SIGNALS)
def test_torchrun_passes_a_signal_on_in_every_phase(
    place: Path, pair: Run, name: str, rng: random.Random, score
) -> None:
    """The signal strikes one rank, or all through torchrun; both stop, none is left."""
    run = Run(place, f"pair-{name}")
    for phase, (where, options, step, _) in PHASES.items():
        first, _, rest = where.partition(":")
        child = run.start(
            2, f"{first}:rank={rng.randrange(2)},{rest}".format(name.lower()), **options
        )
        said, _ = child.communicate()
        assert child.returncode == 0, said
        assert (run.reason()["exit"], run.reason()["why"]) == ("requeue", name), (phase, said)
        assert run.reason()["step"] == step and not list(run.processes()), (phase, said)
    child = run.start(2)
    wait_until(lambda: len(run.rows()) >= 9, child)
    child.send_signal(getattr(signal, name))
    child.communicate()
    assert run.reason()["exit"] in ("requeue", "done") and not list(run.processes())
    if run.reason()["exit"] == "requeue":
        said, _ = run.start(2).communicate()
    assert run.reason()["exit"] == "done" and run.rows() == pair.rows(), said
    score("signals", len(PHASES) + 1)


@pytest.mark.full
@pytest.mark.parametrize("name", SIGNALS)
def test_torchrun_is_signalled_while_its_workers_start(place: Path, name: str) -> None:
    """As soon as torchrun itself listens: whatever a worker has come to, none is left."""
    run = Run(place, f"early-{name}")
    child = run.start(2)
    wait_until(lambda: caught(child.pid), child)
    child.send_signal(getattr(signal, name))
    said, _ = child.communicate()
    print(said)
    assert child.returncode != 0 and not list(run.processes())
    assert not checkpoint.steps(run.folder)


@pytest.mark.full
def test_a_rank_that_is_stopped_is_found(place: Path) -> None:
    """Nothing runs in it any more, so the others tell."""
    run = Run(place, "stopped", {"train.step_timeout": 4})
    slow = "step.begun:step=5,action=hang,seconds=2"
    child = run.start(2, slow, "--shutdown-timeout", "2")
    beat = run.folder / "stacks" / "rank-1.txt"
    wait_until(lambda: beat.exists() and "training after step 4" in beat.read_text(), child)
    found = re.match(r"alive .*: rank 1, process (\d+) on ", beat.read_text())
    assert found
    os.kill(int(found[1]), signal.SIGSTOP)
    said, _ = child.communicate()
    assert child.returncode == 1 and "ERROR: rank 0 hangs: nothing for 4 s, training" in said
    assert run.reason()["exit"] == "failed" and "rank 0: hangs" in run.reason()["why"]
    # what docs/operations.md looks for: the rank whose file does not begin with `hung`
    stacks = run.folder / "stacks"
    assert (stacks / "rank-0.txt").read_text().startswith("hung")
    assert beat.read_text().startswith("alive") and not list(run.processes())


@pytest.mark.full
def test_workers_end_with_their_torchrun(place: Path, score) -> None:
    run = Run(place, "orphaned")
    child = run.start(2, "step.begun:step=5,action=hang,rank=0")
    wait_until(lambda: (run.folder / "metrics.jsonl").exists() and len(run.rows()) == 4, child)
    assert len(list(run.processes())) == 3
    child.kill()
    child.wait()
    wait_until(lambda: not list(run.processes()))
    said, _ = child.communicate()
    assert "torchrun is gone" in said
    score("orphans", 0, "0")


# -- time limits -----------------------------------------------------------------------------------


class Made(SimpleNamespace):
    """Unlike its parent it can be referred to weakly, also in Python 3.11."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The monotonic clock of a watch, set by hand; the one on the wall jumps about."""
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch.time, "time", lambda: random.uniform(0, 2e9))
    heard = signals.Stop.__new__(signals.Stop)
    heard.number, heard.began = 0, now[0]
    monkeypatch.setattr(signals, "listen", lambda: heard)
    yield now
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("where", ["key", "slurm", "both"])
def test_it_stops_while_a_step_and_a_save_still_fit(
    where: str, clock: list[float], tmp_path: Path, monkeypatch, capsys, rng: random.Random
) -> None:
    limit = {"key": 600.0, "slurm": None, "both": 3000.0}[where]
    if where != "key":
        monkeypatch.setattr(watch, "job_seconds_left", lambda: 600.0)
    here, waits = world.start(), []
    monkeypatch.setattr(world, "set_timeout", waits.append)
    try:
        cfg = Config(train=TrainConfig(time_limit=limit))
        cfg.model.vocab_size = 512
        saver = SimpleNamespace(write_s=20.0)
        state = Made(cfg=cfg, world=here, run=tmp_path, step=0, saver=saver)
        found = watch.Watch(state)
        key = "train.time_limit" if where == "key" else "the job's end"
        assert f"10m 00s left ({key})" in capsys.readouterr().out
        longest, step = 0.0, 0
        while not found.asked:
            found.poll("waiting for data")
            if not found.asked:
                # the first one compiles
                spent = rng.uniform(5, 15) if step else 100.0
                longest = max(longest, spent) if step else 0.0
                step += 1
                found.beat("training")
                clock[0] += spent
        left = 1600 - clock[0]
    finally:
        world.stop()
    assert found.asked == "the time limit"
    # peers of a run that is stopped over night are not gone
    assert waits and min(waits) > 24 * 3600
    # another step would have left less than a step and two saves; and none is given away
    assert left < 1.5 * (longest + 40) + 2 <= left + 15
    assert left > longest + 40


def test_slurms_end_is_read_and_a_stale_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in (
        ("", math.inf),
        ("0", math.inf),
        ("Unknown", math.inf),
        ("5", math.inf),
        ("²", math.inf),
    ):
        monkeypatch.setenv("SLURM_JOB_END_TIME", text)
        assert watch.job_seconds_left() == expected
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.5)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1700000500")
    assert watch.job_seconds_left() == 499.5


@pytest.mark.full
def test_a_run_stops_before_its_limit(place: Path, whole: Run) -> None:
    run = Run(place, "limited")
    slow = "step.begun:action=hang,seconds=4"
    code, said = run.forked(slow, **{"train.time_limit": 40})
    assert code == 75 and run.reason()["why"] == "the time limit", said
    step = run.reason()["step"]
    assert 0 < step < STEPS and [s for s, _ in checkpoint.steps(run.folder)] == [step]
    code, said = run.forked()
    assert code == 0 and run.rows() == whole.rows(), said
