"""scripts/slurm/train.sbatch with stand-ins for Slurm: two jobs of two processes, one run."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_starts import ENV, ROOT, STEPS, Run, make_tokens

SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"
# srun becomes torchrun, as a task on a node; what Slurm signals is that process.
STANDINS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\necho $$ > "$STATE/step"\nexec "$@"',
    "scontrol": (
        'case $1 in show) printf "localhost\\nnode2\\n" ;;\n'
        '*) echo "$*" >> "$STATE/scontrol" ;; esac'
    ),
    # its options win over those of the script, which it runs as a copy
    "sbatch": 'cp "$1" "$STATE/slurm script"\nshift\nexec bash "$STATE/slurm script" "$@"',
}


@pytest.fixture
def submitted(tmp_path: Path) -> Path:
    """The folder of the project, whose path has spaces."""
    place = tmp_path / "my project"
    make_tokens(place)
    (place / "train.py").symlink_to(ROOT / "train.py")
    for name, body in STANDINS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\nset -eu\n{body}\n")
        path.chmod(0o755)
    return place


def sbatch(place: Path, *words: str, restart: int = 0, faults: str = "") -> subprocess.Popen[str]:
    state = place.parent
    here = {
        "PATH": f"{state / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "STATE": str(state),
        "SLURM_SUBMIT_DIR": str(place),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_RESTART_COUNT": str(restart),
        "LLAMA_FAULTS": faults,
    }
    return subprocess.Popen(
        ["sbatch", str(SCRIPT), *words],
        cwd=place.parent,
        env={**ENV, **here},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.faults
def test_a_job_puts_itself_back_and_the_next_one_ends_the_run(submitted: Path) -> None:
    state, run = submitted.parent, Run(submitted, "slurm", {"data.path": submitted / "tokens"})
    child = sbatch(submitted, *run.words(), faults="step.begun:step=6,action=hang,seconds=3")
    assert child.stdout
    lines = []
    for line in child.stdout:
        lines.append(line)
        if line.startswith("FAULT step.begun"):
            os.kill(int((state / "step").read_text()), signal.SIGUSR1)
            break
    said = "".join([*lines, child.communicate()[0]])
    assert child.returncode == 0 and "job 4711-0: requeue, torchrun ended with 1" in said, said
    assert (state / "scontrol").read_text() == "requeue 4711\n"
    stopped = run.reason()["step"]
    assert 6 <= stopped < STEPS and run.reason()["why"] == "SIGUSR1"
    said, _ = (child := sbatch(submitted, *run.words(), restart=1)).communicate()
    assert child.returncode == 0 and "job 4711-1: done, torchrun ended with 0" in said, said
    assert f"resuming runs/slurm from step {stopped} " in said
    assert [row["step"] for row in run.rows()] == list(range(1, STEPS + 1))
    assert (state / "scontrol").read_text() == "requeue 4711\n"


@pytest.mark.full
def test_a_start_that_is_refused_does_not_come_back(submitted: Path) -> None:
    state, run = submitted.parent, Run(submitted, "done", {"data.path": submitted / "tokens"})
    run.start(2).communicate()
    assert run.reason()["exit"] == "done"
    # a finished run is refused; the verdict of the job before must not count for this one
    said, _ = (child := sbatch(submitted, *run.words())).communicate()
    assert child.returncode == 1 and "job 4711-0: none" in said and "is finished" in said, said
    assert not (state / "scontrol").exists()
    assert run.reason()["exit"] == "done" and not list((submitted / "runs").glob(".began*"))
    said, _ = (child := sbatch(submitted, "--optim.lr", "fast")).communicate()
    assert child.returncode == 2 and "optim.lr" in said and "torchrun" not in said, said


def test_the_script_says_what_launchers_need() -> None:
    text = SCRIPT.read_text()
    for option in ("signal=USR1@300", "requeue", "open-mode=append"):
        assert re.search(rf"^#SBATCH --{option}$", text, re.MULTILINE)
    for words in (
        "srun --kill-on-bad-exit=1 --wait=60",
        "--signals-to-handle SIGTERM,SIGINT,SIGUSR1,SIGUSR2 --shutdown-timeout",
        "--rdzv-backend c10d",
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    ):
        assert words in text


def test_shellcheck_finds_nothing() -> None:
    scripts = list((ROOT / "scripts").rglob("*.s*h"))
    assert SCRIPT in [*scripts, SCRIPT]
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", SCRIPT, *scripts], check=True)
