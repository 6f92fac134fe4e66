"""Where jobs run: processes of this machine, or tasks of a Slurm or Ray cluster through datatrove.

In: work, and jobs, which are (folder, job). Out: each job with its record, or why there is none.
On a cluster every job is a task of datatrove's executor, which needs folders that all machines
share. A task runs the job in a process of its own, so that a crash is an answer as well, and leaves
the answer beside the files of the job. datatrove's own word is not believed (it ends well when
tasks failed): a task that has ended without an answer counts as lost with its machine.
"""

import inspect
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llama import cli, files
from llama.cli import UserError, expect, needed
from llama.corpus import pool

KINDS = ("local", "datatrove", "slurm", "ray")
POLL_S = 1.0
WAVES = ".wave-*"
_CLASSES = {"datatrove": "Local", "slurm": "Slurm", "ray": "Ray"}
# Arguments of datatrove's executors that are not the user's business.
_OURS = set("self pipeline tasks workers logging_dir depends skip_completed job_name".split())

# A folder and a job for it, and what does jobs.
Given = tuple[str, Any]
Work = Callable[[Any, pool.At], Any]


@dataclass(frozen=True)
class Executor:
    """How jobs are run.

    Args:
        workers: Jobs at a time.
        kind: One of `KINDS`; datatrove is its local executor.
        options: Further arguments of datatrove's executor, as in {"partition": "cpu"}.
    """

    workers: int = 1
    kind: str = "local"
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Whether all it needs is there, before anything is run."""
        expect(self.workers >= 1, f"workers is {self.workers}", "1 or more")
        if self.kind == "local":
            if self.options:
                raise UserError("--cluster has no effect with --executor local")
            return
        for module in ("datatrove", *(["ray"] if self.kind == "ray" else [])):
            needed(module, f"--executor {self.kind}", module)
        for command in ("sbatch", "srun", "squeue", "scancel") if self.kind == "slurm" else ():
            if not shutil.which(command):
                raise UserError(f"--executor slurm needs the command {command}, which is not found")
        known = inspect.signature(_class(self.kind).__init__).parameters
        for key in self.options:
            if key not in known or key in _OURS:
                allowed = ", ".join(sorted(known.keys() - _OURS))
                raise UserError(f"--cluster {key} is not one of {allowed}")
        for key, parameter in known.items():
            if parameter.default is parameter.empty and key not in {*self.options, *_OURS}:
                raise UserError(f"--executor {self.kind} needs --cluster {key}=...")

    def begin(self, folders: Sequence[Path]) -> None:
        """End the tasks of a run that was killed; what they have done stays."""
        for wave in [wave for folder in folders for wave in folder.glob(WAVES)]:
            if shutil.which("scancel"):
                subprocess.run(["scancel", "--name", wave.name], check=False)
                while _queued(wave.name):
                    time.sleep(POLL_S)
            shutil.rmtree(wave)

    def answers(self, work: Work, jobs: deque[Given]) -> Iterator[tuple[Given, Any]]:
        """Each job with what came of it; the caller may put one back, or clear `jobs` to stop."""
        if self.kind == "local":
            yield from pool.answers(work, jobs, self.workers)
            return
        while jobs:
            tasks = list(jobs)
            jobs.clear()
            yield from self._wave(work, tasks)

    def _wave(self, work: Work, tasks: list[Given]) -> Iterator[tuple[Given, Any]]:
        """All the jobs at once as tasks of one datatrove executor."""
        name = uuid.uuid4().hex[:8]
        wave = Path(tasks[0][0]).resolve() / f".wave-{name}"
        wave.mkdir()
        left: dict[Path, int] = {}
        (wave / "work").write_bytes(pickle.dumps((os.getcwd(), work)))
        for rank, (folder, job) in enumerate(tasks):
            answer = Path(folder).resolve() / f".{job.name}.{name}.answer"
            (wave / f"{rank}.task").write_bytes(pickle.dumps(((folder, job), answer)))
            left[answer] = rank
        folders = {answer.parent for answer in left}
        try:
            runs = self._launch(wave, len(tasks))
            running = True
            # to the end, also with all answers there: it still writes into the folder
            while running:
                running = runs()
                for answer in [a for folder in folders for a in folder.glob(f".*.{name}.answer")]:
                    yield tasks[left[answer]], pickle.loads(answer.read_bytes())
                    answer.unlink()
                    del left[answer]
                time.sleep(POLL_S * running)
            if left:
                logs = wave.with_name(f".lost-{name}")
                shutil.copytree(wave / "logs", logs, dirs_exist_ok=True)
                print(f"{len(left)} tasks ended without an answer: see {logs}", file=sys.stderr)
            yield from ((tasks[rank], pool.Died(None, None)) for rank in left.values())
        finally:
            if left and self.kind == "slurm":
                subprocess.run(["scancel", "--name", wave.name], check=False)
            shutil.rmtree(wave, ignore_errors=True)

    def _launch(self, wave: Path, tasks: int) -> Callable[[], bool]:
        """Start the tasks; the function returned tells whether any may still be running."""
        from loguru import logger

        # its log is in the folder of each task; here it would stand in the way of the progress
        logger.remove()
        options, path = dict(self.options), ":".join(filter(None, sys.path))
        if self.kind == "slurm":
            bin = Path(sys.executable).parent
            here = f"cd {os.getcwd()}\nexport PATH={bin}:$PATH PYTHONPATH={path}"
            options["env_command"] = "\n".join(filter(None, [options.get("env_command"), here]))
            options["job_name"] = wave.name
        if self.kind == "ray":
            import ray

            if not ray.is_initialized():
                environment = {"env_vars": {"PYTHONPATH": path}}
                ray.init(runtime_env=environment, logging_level=logging.ERROR, log_to_driver=False)
        executor = _class(self.kind)(
            [partial(_task, str(wave))],
            tasks=tasks,
            workers=self.workers,
            logging_dir=str(wave / "logs"),
            **options,
        )
        if self.kind == "slurm":
            # it would be a second job, for what nobody reads
            executor.launch_merge_stats = lambda: None
            executor.run()
            return partial(_queued, wave.name)
        thread = threading.Thread(target=_run, args=(executor,), daemon=True)
        thread.start()
        return thread.is_alive


def _class(kind: str) -> Any:
    # imported here: an extra, and slow
    import datatrove.executor

    return getattr(datatrove.executor, f"{_CLASSES[kind]}PipelineExecutor")


def _run(executor: Any) -> None:
    """What goes wrong is known by the answers that are not there."""
    try:
        executor.run()
    except Exception as error:
        print(f"datatrove: {' '.join(str(error).split())[:300]}", file=sys.stderr)


def _queued(name: str) -> bool:
    """Whether Slurm still has jobs of this name; while it does not answer, it is taken to."""
    asked = subprocess.run(
        ["squeue", "--noheader", "--name", name], capture_output=True, text=True, check=False
    )
    return bool(asked.returncode or asked.stdout.strip())


def _task(wave: str, data: Any, rank: int, world_size: int) -> None:
    """On a machine of the cluster: do a job, leave the answer."""
    here, work = pickle.loads(Path(wave, "work").read_bytes())
    job, answer = pickle.loads(Path(wave, f"{rank}.task").read_bytes())
    os.chdir(here)
    [(_, value)] = pool.answers(work, deque([job]), 1)
    files.write_atomic(answer, pickle.dumps(value))


def add_arguments(p: cli.Parser) -> None:
    """--workers, --executor and --cluster."""
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Jobs at a time.")
    p.add_argument("--executor", default="local", choices=KINDS, help="Where they run.")
    what = "Arguments of datatrove's executor, as in partition=cpu time=20:00:00."
    p.add_argument("--cluster", nargs="+", default=[], metavar="KEY=VALUE", help=what)


def from_arguments(values: Any) -> Executor:
    """The executor that the options name, checked."""
    options: dict[str, Any] = {}
    for given in values.cluster:
        key, equals, value = given.partition("=")
        if not equals:
            raise UserError(f"--cluster {given} is not of the form KEY=VALUE")
        options[key] = int(value) if value.isdigit() else value
    executor = Executor(values.workers, values.executor, options)
    executor.check()
    return executor
