"""The folder of a run: one writer, one configuration, and the reason it ended.

runs/<name>/{config.yaml, env.json, metrics.jsonl, train.log, EXIT_REASON, stacks/, ckpt/}
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import orjson
import torch

from llama import config, files
from llama.cli import UserError
from llama.config import Config
from llama.data import schedule
from llama.runtime import checkpoint
from llama.runtime.metrics import Tee
from llama.runtime.world import World

RUNS = Path("runs")
EXIT_REASON = "EXIT_REASON"
# By a run alone; what a report is writing meanwhile is not.
WRITTEN = "config.yaml", "env.json", "metrics.jsonl", EXIT_REASON, schedule.REWINDS, "profile/*"


@contextmanager
def held(run: Path, here: World) -> Iterator[None]:
    """Hold the run folder for this run; the kernel lets go of it when rank 0 dies."""
    problem = f"{run} is being trained or verified: wait for it or use --name other"
    with here.together(lambda: files.locked(run, problem) if here.leads else nullcontext()):
        yield


def check(run: Path, cfg: Config, here: World, checkpoint_bytes: int) -> None:
    """Refuse a folder of another configuration and a full disk, before anything is changed."""

    def look() -> None:
        if here.leads:
            _refuse_changes(run, cfg)
            checkpoint.refuse_small_disk(run, checkpoint_bytes, cfg.checkpoint.keep)

    here.together(look)


def record(run: Path, cfg: Config, here: World) -> None:
    """Make the folder this run's, once nothing can refuse it any more; sweep what a kill left."""
    if here.leads:
        checkpoint.sweep(run)
        for part in [path for name in WRITTEN for path in run.glob(f"{name}.part*")]:
            part.unlink(missing_ok=True)
        files.write_atomic(run / "config.yaml", config.to_yaml(cfg))
        files.write_json(run / "env.json", environment(here))
        (run / EXIT_REASON).unlink(missing_ok=True)
        sys.stdout = Tee(run / "train.log")  # type: ignore[assignment]


def _refuse_changes(run: Path, cfg: Config) -> None:
    if not (run / "config.yaml").exists():
        return
    every = config.differences(config.to_dict(config.of_run(run)), config.to_dict(cfg))
    changed = [line for line in every if not line.startswith(config.FREE_KEYS)]
    if changed and not cfg.checkpoint.accept_changes:
        raise UserError(
            f"{run} has another configuration ({'; '.join(changed)}): use --name other for a "
            "new run, or --checkpoint.accept_changes true to go on with the new values"
        )
    if changed:
        print("going on with changed values:", *changed, sep="\n  ")


def environment(world: World) -> dict[str, Any]:
    """Versions and hardware, for env.json. No variables or arguments: they may hold secrets."""
    here = Path(__file__).parent
    git = ""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        git = done.stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": git or None,
        "platform": f"{sys.platform} {platform.machine()}",
        "device": world.chip,
        "processes": world.size,
        "threads": torch.get_num_threads(),
    }


def exit_reason(run: Path, verdict: str, why: str, step: int) -> bool:
    """Write EXIT_REASON: `done`, `requeue` or `failed`, for scripts that cannot see exit codes.

    Of the ranks that have failed, the first one is told: False for those that come later.
    """
    if verdict == "failed" and has_failed(run):
        return False
    line = orjson.dumps({"exit": verdict, "why": why, "step": step})
    try:
        files.write_atomic(run / EXIT_REASON, line + b"\n")
    except OSError as error:
        print(f"WARNING: {run / EXIT_REASON} cannot be written: {os.strerror(error.errno or 0)}")
    return True


def has_failed(run: Path) -> bool:
    """Whether a rank has written that it failed."""
    with suppress(OSError):
        return b'"failed"' in (run / EXIT_REASON).read_bytes()
    return False
