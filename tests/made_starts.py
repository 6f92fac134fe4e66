"""Tiny runs of train.py to do things to: shards made in a second, starts in processes of their own.

`forked` starts train.py in a copy of a process that has imported it.
"""

import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from made_data import make_source, random_documents

import train
from llama.data.writer import Vocabulary

ROOT = Path(__file__).parent.parent
# what the server of forks imports train from
os.environ["PYTHONPATH"] = str(ROOT)
STEPS = 12
OPTIONS: dict[str, Any] = {
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "data.path": "tokens",
    "data.mixture": '{"code": 0.7, "mail": 0.3}',
    "data.seq_len": 64,
    "train.batch_tokens": 512,
    "train.tokens": 512 * STEPS,
    "optim.warmup_steps": 2,
    "validation.every": 4,
    "validation.tokens": 4096,
    "checkpoint.every": 1000,
    "checkpoint.keep": 100,
    "log.every": 1,
}
ENV = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone",
    "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGUSR2", "--shutdown-timeout", "20",
]  # fmt: skip


def make_tokens(place: Path, seed: int = 0, names: Sequence[str] = ("code", "mail")) -> None:
    """Token shards of these sources in place/tokens."""
    rng = random.Random(seed)
    for name in names:
        documents = random_documents(rng, name, 600, pieces=512)
        vocabulary = Vocabulary("0" * 64, 512, 1, 2)
        make_source(place / "tokens" / name, [documents], vocabulary, valid_per_10k=3000)


@dataclass
class Run:
    """A run in a folder that holds tokens; started again it goes on."""

    place: Path
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.place / "runs" / self.name

    def words(self, **more: Any) -> list[str]:
        options = {**OPTIONS, "name": self.name, **self.options, **more}
        return [f"--{key}={value}" for key, value in options.items()]

    def start(
        self, size: int, faults: str = "", *launch: str, **more: Any
    ) -> subprocess.Popen[str]:
        """train.py in `size` processes; without torchrun where it is one."""
        start = (
            [*TORCHRUN, "--nproc-per-node", str(size), *launch] if size > 1 else [sys.executable]
        )
        return subprocess.Popen(
            [*start, str(ROOT / "train.py"), *self.words(**more)],
            cwd=self.place,
            env={**ENV, "LLAMA_FAULTS": faults},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def forked(self, faults: str = "", size: int = 1, **more: Any) -> tuple[int, str]:
        """train.py in copies of this process, without torchrun: exit code and what was said."""
        log = self.place / f"{self.name}.out"
        return forked(self.place, partial(_train, self.words(**more)), size, faults, log)

    def rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says about the model, without speed and memory."""
        keep = ("step", "branch", "tokens", "loss", "lr", "grad_norm", "spikes", "skipped_steps")
        rows = map(json.loads, (self.folder / "metrics.jsonl").open())
        return [
            {k: v for k, v in row.items() if k in keep or k.startswith(("loss/", "val/"))}
            for row in rows
        ]

    def reason(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "EXIT_REASON").read_text()))

    def processes(self) -> Iterator[int]:
        """Processes of this run that live, wherever they came from."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode(errors="replace").split("\0")
                state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
                here = (path.parent / "cwd").resolve() == self.place.resolve()
            except OSError:
                continue
            if state != "Z" and here and f"--name={self.name}" in words:
                yield int(path.parent.name)


def forked(
    place: Path, action: Callable[[], Any], size: int, faults: str, log: Path
) -> tuple[int, str]:
    """(exit code, output) of `action` in processes that have imported train, joined in one world.

    The code is rank 0's, or that of a user's error: which rank tells one that all see is luck.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.write_bytes(b"")
    # from a process of its own: in this one torch has threads, which no fork survives
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train"])
    children = []
    for rank in range(size):
        env = {"LLAMA_FAULTS": faults}
        if size > 1:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            env |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
        children.append(server.Process(target=_child, args=(place, action, env, log)))
        children[-1].start()
    children[0].join()
    for child in children[1:]:
        if children[0].exitcode:
            child.terminate()  # as torchrun does
        child.join()
    codes = [child.exitcode for child in children]
    assert codes[0] is not None
    return 2 if 2 in codes else codes[0] or max(map(abs, codes)), log.read_text()


def _train(words: list[str]) -> None:
    train.signals.listen()
    train.cli.run(lambda _: train.main(words))


def _child(place: Path, action: Callable[[], Any], env: dict[str, str], log: Path) -> None:
    code = 1
    try:
        os.chdir(place)
        os.environ |= env
        handle = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1), os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        if "RANK" in env:
            train.torch.set_num_threads(1)
        try:
            code = int(action() or 0)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
