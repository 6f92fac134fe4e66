"""Tiny runs of train.py to do things to: shards made in a second, starts in processes of their own.

`forked` starts train.py in a copy of a process that has imported it.
"""

import json
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
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


def make_tokens(place: Path) -> None:
    """Token shards of two sources in place/tokens."""
    rng = random.Random(0)
    for name in ("code", "mail"):
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

    def forked(self, faults: str = "", **more: Any) -> tuple[int, str]:
        """train.py in a copy of this process, alone: its exit code and what it said."""
        log = self.place / f"{self.name}.out"
        # from a process of its own: in this one torch has threads, which no fork survives
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["train"])
        child = server.Process(target=_train, args=(self.place, self.words(**more), faults, log))
        child.start()
        child.join()
        assert child.exitcode is not None
        return child.exitcode, log.read_text()

    def rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says about the model, without speed and memory."""
        keep = ("step", "tokens", "loss", "lr", "grad_norm")
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


def _train(place: Path, words: list[str], faults: str, log: Path) -> None:
    code = 1
    try:
        os.chdir(place)
        os.environ["LLAMA_FAULTS"] = faults
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1), os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        train.signals.listen()
        try:
            train.cli.run(lambda _: train.main(words))
        except SystemExit as end:
            code = int(end.code or 0)
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
