"""The same bytes from every executor, and a word about every task that did not end well."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from made_data import make_documents, make_tokenizer, tree
from test_corpus_engine import all_ids, ids_in, made, misbehave, odd_only, plan_of, quarantine

from llama.cli import UserError
from llama.corpus import engine, executors, runner
from llama.corpus.executors import Executor
from llama.corpus.journal import stamp
from llama.corpus.plan import header
from llama.corpus.runner import Stage, Task

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not find_spec("datatrove"), reason="datatrove is not installed")

# Slurm in 30 lines: a job is a background process that does the tasks of its array in turn.
SBATCH = """#!/bin/bash
folder=$(dirname "$0")/jobs; mkdir -p "$folder"
for script; do :; done
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
cp "$script" "$folder/$name"
export SLURM_NODELIST=here SLURM_JOB_ID=$$ RUN_OFFSET=0
(
  for i in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$i bash "$folder/$name"; done
  rm "$folder/$name.pid"
) >"$folder/$name.log" 2>&1 &
echo $! > "$folder/$name.pid"
echo "Submitted batch job $$"
"""
SQUEUE = """#!/bin/bash
[ -e "$(dirname "$0")/jobs/${!#}.pid" ] && echo "${!#} RUNNING" || true
"""
SCANCEL = """#!/bin/bash
pid="$(dirname "$0")/jobs/${!#}.pid"
[ -e "$pid" ] && pkill -P $(cat "$pid"); kill $(cat "$pid") && rm "$pid" || true
echo "${!#}" >> "$(dirname "$0")/cancelled"
"""
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do [ "$1" = -n ] && shift; shift; done
exec "$@"
"""
STUBS = {
    "sbatch": SBATCH,
    "squeue": SQUEUE,
    "scancel": SCANCEL,
    "srun": SRUN,
    "scontrol": "#!/bin/bash\necho here\n",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stubs of Slurm's commands; returns their folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in STUBS.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(executors, "POLL_S", 0.1)
    return folder


@pytest.fixture
def ray(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(executors, "POLL_S", 0.1)
    yield
    ray.shutdown()


SLURM = {"time": "1:00:00", "partition": "cpu"}
STEPS = [odd_only, partial(misbehave, how="raise", ids=["b:3", "c:5"])]


def same_as_local(tmp_path: Path, executor: Executor, names: str = "abcde") -> None:
    engine.run(plan_of(*names), STEPS, tmp_path / "local", 1, 1.0)
    engine.run(plan_of(*names), STEPS, tmp_path / executor.kind, executor, 1.0)
    assert made(tmp_path / executor.kind) == made(tmp_path / "local")
    assert not list(tmp_path.glob("*/.wave-*")) and not list(tmp_path.glob("*/.*.answer"))


def test_datatrove_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "POLL_S", 0.1)
    same_as_local(tmp_path, Executor(2, "datatrove"))


@pytest.mark.slow
def test_slurm_gives_the_same_bytes(tmp_path, slurm):
    same_as_local(tmp_path, Executor(2, "slurm", SLURM))
    [job] = (slurm / "jobs").glob(".wave-????????")
    assert "#SBATCH --partition=cpu" in job.read_text() and "--array=0-2%2" in job.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slurm", "ray"])
def test_tokens_are_the_same_bytes_from_a_command(tmp_path, slurm, rng, kind):
    """As a command: what it sends to other machines must not be named after `__main__`."""
    if kind == "ray" and not find_spec("ray"):
        pytest.skip("ray is not installed")
    make_documents(rng, tmp_path / "documents", "web", 3, 20)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")

    def tokens(kind: str, *cluster: str) -> dict[str, bytes]:
        command = [sys.executable, "-m", "llama.data.tokenize", "--tokenizer", str(tokenizer)]
        command += ["--input", str(tmp_path / "documents"), "--output", str(tmp_path / kind)]
        command += ["--executor", kind, *cluster]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        return tree(tmp_path / kind)

    cluster = ["--cluster", "time=1:00:00", "partition=cpu"] if kind == "slurm" else []
    assert tokens(kind, *cluster) == tokens("local")


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path, ray):
    options = {"mem_per_cpu_gb": 0.1}
    same_as_local(tmp_path, Executor(2, "ray", options))


def test_a_crash_in_a_task_costs_its_document(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "POLL_S", 0.1)
    steps = [partial(misbehave, how="segfault", ids=["a:7"])]
    engine.run(plan_of("a", "b"), steps, tmp_path, Executor(1, "datatrove"), 1.0)
    assert ids_in(tmp_path) == [id for id in all_ids("a", "b") if id != "a:7"]
    assert "SIGSEGV" in quarantine(tmp_path)["a:7"]["error"]


# -- tasks that end without an answer --------------------------------------------------------------


def copy(folder: Path, task: Task, at) -> dict:
    """Work of a stage: a file per task; some tasks kill what runs them, some fail."""
    if task.what == "lose" and not task.tried:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if task.what == "fail":
        raise ValueError("this cannot be done")
    path = folder / task.name
    path.write_text(str(task.what))
    return {"unit": task.name, "files": {task.name: stamp(path)}}


def stage_of(folder: Path, *whats: str) -> Stage:
    tasks = [Task(f"{i}", 10, what) for i, what in enumerate(whats)]
    inputs = {task.name: task.what for task in tasks}
    return Stage("test", folder, header("test", {}, inputs), tasks, partial(copy, folder))


@pytest.mark.slow
def test_a_task_that_is_lost_is_done_again_and_one_that_fails_is_named(tmp_path, slurm):
    executor = Executor(1, "slurm", SLURM)
    runner.run([stage_of(tmp_path / "a", "x", "lose", "y")], executor)
    assert [(tmp_path / f"a/{i}").read_text() for i in range(3)] == ["x", "lose", "y"]
    assert len(list((slurm / "jobs").glob(".wave-????????"))) == 2
    assert list(tmp_path.glob("a/.lost-*/logs/task_*.log"))
    with pytest.raises(UserError) as error:
        runner.run([stage_of(tmp_path / "b", "x", "fail", "y")], executor)
    assert "1 of 3 units are not done (1: ValueError: this cannot be done" in str(error.value)
    assert (tmp_path / "b/2").exists()


@pytest.mark.slow
def test_the_tasks_of_a_killed_run_are_ended_and_their_answers_are_kept(tmp_path, slurm):
    folder = tmp_path / "a"
    child = os.fork()
    if child == 0:
        try:
            stage = stage_of(folder, "x", "y", "z")
            runner.run([stage], Executor(1, "slurm", SLURM))
        finally:
            os._exit(0)
    while not list(slurm.glob("jobs/.wave-*.pid")):
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while not list(folder.glob(".*.answer")) and not (folder / "2").exists():
        time.sleep(0.05)
    runner.run([stage_of(folder, "x", "y", "z")], Executor(1))
    assert [(folder / f"{i}").read_text() for i in range(3)] == ["x", "y", "z"]
    assert (slurm / "cancelled").read_text().startswith(".wave-")
    assert not list(folder.glob(".wave-*")) and not list(folder.glob(".*.answer"))


def test_another_number_of_tasks_is_refused(tmp_path):
    runner.run([stage_of(tmp_path, "x", "y")], Executor(1))
    with pytest.raises(UserError, match=r"another plan: inputs added: 1 \(2\)"):
        runner.run([stage_of(tmp_path, "x", "y", "z")], Executor(1))


def test_several_stages_at_once_keep_their_journals(tmp_path):
    stages = [stage_of(tmp_path / "a", "x", "y"), stage_of(tmp_path / "b", "z")]
    records = runner.run(stages, Executor(3))
    assert [[record["unit"] for record in each] for each in records] == [["0", "1"], ["0"]]
    assert (tmp_path / "b/0").read_text() == "z"


def test_what_is_missing_is_said_before_the_run(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    for executor, told in (
        (Executor(0), "workers is 0"),
        (Executor(1, "local", {"time": 1}), "--cluster has no effect with --executor local"),
        (Executor(1, "slurm", SLURM), "needs the command sbatch, which is not found"),
        (Executor(1, "datatrove", {"color": 1}), "--cluster color is not one of local_rank_offset"),
        (Executor(1, "datatrove", {"tasks": 1}), "--cluster tasks is not one of"),
    ):
        with pytest.raises(UserError, match=told):
            executor.check()
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(UserError, match="--executor ray needs datatrove, .* pip install datatrove"):
        Executor(1, "ray").check()


def test_slurm_needs_a_partition_and_a_time(slurm):
    with pytest.raises(UserError, match="--executor slurm needs --cluster time=..."):
        Executor(1, "slurm", {"partition": "cpu"}).check()
