"""Token shards and tiny runs on them, in the test's own process or by the real command."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from made_data import make_sources

import train
from llama.data.writer import Vocabulary
from llama.runtime import signals

ROOT = Path(__file__).parent.parent
ENV = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
VOCABULARY = Vocabulary("0" * 64, 300, 1, 2)
OPTIONS: dict[str, Any] = {
    "seed": 3,
    "model.dim": 16,
    "model.n_layers": 1,
    "model.n_heads": 2,
    "data.path": "tokens",
    "data.mixture": "mixture.yaml",
    "data.seq_len": 32,
    "train.batch_tokens": 256,
    "train.tokens": 256 * 12,
    "optim.warmup_steps": 2,
    "validation.every": 0,
    "checkpoint.every": 4,
    "checkpoint.keep": 10,
    "log.every": 1,
}


def make_workspace(place: Path, rng: random.Random) -> Path:
    """A folder with shards of two sources and their mixture."""
    place.mkdir(parents=True, exist_ok=True)
    tokens = place / "tokens"
    make_sources(
        rng,
        tokens,
        {"code": 150, "mail": 90},
        vocabulary=VOCABULARY,
        pieces=300,
        valid_per_10k=2000,
    )
    (place / "mixture.yaml").write_text("code: 0.7\nmail: 0.3\n")
    return place


def words(name: str, options: dict[str, Any] | None = None) -> list[str]:
    """The command line of a run."""
    return [f"--{k}={v}" for k, v in {**OPTIONS, "name": name, **(options or {})}.items()]


@contextmanager
def undisturbed() -> Iterator[None]:
    """What train.py sets for its own process is put back."""
    # what pytest has imported is not looked through at every log step
    gc.freeze()
    out, before = sys.stdout, [signal.getsignal(number) for number in signals.STOPPING]
    try:
        yield
    finally:
        sys.stdout = out
        gc.enable()
        gc.unfreeze()
        for number, handler in zip(signals.STOPPING, before, strict=True):
            signal.signal(number, handler)


def train_here(name: str, options: dict[str, Any] | None = None) -> int:
    """Train in this process, in the working folder. Returns the exit code."""
    with undisturbed():
        return train.main(words(name, options))


def start(
    *command: str, cwd: Path, size: int = 1, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """A Python command in processes of its own, under torchrun for several."""
    launcher = [sys.executable]
    if size > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.Popen(
        [*launcher, *command],
        cwd=cwd,
        env={**ENV, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def call(
    *command: str, cwd: Path, size: int = 1, expect: int = 0, env: dict[str, str] | None = None
) -> str:
    """What a command says."""
    child = start(*command, cwd=cwd, size=size, env=env)
    said, _ = child.communicate(timeout=400)
    assert child.returncode == expect, said
    return said


def rows(run: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, (run / "metrics.jsonl").open()))
