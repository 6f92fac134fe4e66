"""Numbers of a run: one line a log step on the terminal, every number in metrics.jsonl.

metrics.jsonl is the record: rows are appended by rank 0, steps strictly increase within a branch,
also over interruptions (rows behind the step a run resumes from are dropped). A rewind begins the
next branch and the rows of the last one stay: `lineage` leaves out those it took back. wandb and
tensorboard get the same rows; neither can stop a run.
"""

import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import orjson

from llama import files
from llama.cli import needed, show_count, show_seconds
from llama.config import LogConfig


class Metrics:
    """Writes rows; made on rank 0 only."""

    def __init__(
        self, run: Path, cfg: LogConfig, step: int, settings: dict[str, Any], branch: int = 0
    ) -> None:
        self.path = run / "metrics.jsonl"
        # over the whole record, so that it only grows, also where a rewind takes steps back
        self._number = keep_rows(self.path, step, branch) if self.path.exists() else 0
        self._rows, self._late = b"", False
        self._sinks = [s for s in (_wandb(run, cfg, settings), _tensorboard(run, cfg)) if s]

    def row(self, step: int, values: dict[str, Any]) -> None:
        """Append one row; None values are left out. A full disk is said once, never fatal."""
        row = {"step": step, **{k: v for k, v in values.items() if v is not None}}
        self._rows += orjson.dumps(row) + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._late:
                print(f"WARNING: {self.path} cannot be written: {error.strerror}; training goes on")
            self._late = True
        for sink in list(self._sinks):
            try:
                sink(self._number, row)
            except Exception as error:  # any logger's failure: a logger must never end a run
                print(f"WARNING: {sink.__qualname__.split('.')[0]} failed and is off now: {error}")
                self._sinks.remove(sink)
        self._number += 1

    def _write(self) -> None:
        """Append what is not in the file yet, by a new handle: an old one may be stale."""
        with open(self.path, "ab", buffering=0) as file:
            while self._rows:
                self._rows = self._rows[file.write(self._rows) :]

    def close(self) -> None:
        """Write what a full disk has kept waiting, and make the rows durable."""
        with suppress(OSError):
            self._write()
        sync(self.path.parent)


def sync(run: Path) -> None:
    """Make the rows that are written durable, from a thread that no step waits for."""
    with suppress(OSError):
        files.fsync(run / "metrics.jsonl")


class Clock:
    """Time and tokens since the last row, without what was spent on validation and saving."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._pause_s, self._since = tokens, 0.0, time.monotonic()
        self._waited_s = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the speed."""
        began = time.monotonic()
        yield
        self._pause_s += time.monotonic() - began

    def read(self, tokens: int, waited_s: float) -> tuple[float, float]:
        """(tokens per second, percent of the time waiting for data) since the last reading."""
        now = time.monotonic()
        spent = max(now - self._since - self._pause_s, 1e-9)
        rate = (tokens - self._tokens) / spent
        waiting = 100 * (waited_s - self._waited_s) / spent
        self._tokens, self._pause_s, self._since, self._waited_s = tokens, 0.0, now, waited_s
        return rate, waiting


def keep_rows(path: Path, last_step: int, branch: int = 0) -> int:
    """Drop rows of `branch` after `last_step`, later branches, and a row cut off by a kill.

    Returns how many stay.
    """
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        of = row.get("branch", branch)
        if of < branch or of == branch and row["step"] <= last_step:
            kept.append(line + b"\n")
    files.write_atomic(path, b"".join(kept))
    return len(kept)


def lineage(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the run as it stands: without the steps that a later branch made again."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and "step" in row and kept[-1].get("step", 0) >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


HEADER = (
    f"{'step':>13}  {'tokens':>7}  {'loss':>6}  {'lr':>7}  {'gnorm':>5}  "
    f"{'tok/s/gpu':>9}  {'mfu':>4}  {'mem':>5}  {'eta':>7}"
)


def line(step: int, steps: int, row: dict[str, Any]) -> str:
    """The terminal's line of a row, under `HEADER`: 79 columns."""
    mfu = row.get("mfu_causal")
    lr = f"{row['lr']:.1e}".replace("e-0", "e-")
    return (
        f"{f'{step}/{steps}':>13}  {show_count(row['tokens']):>7}  {row['loss']:>6.3f}  {lr:>7}  "
        f"{row['grad_norm']:>5.2f}  {show_count(row['tokens_per_s_gpu']):>9}  "
        f"{f'{100 * mfu:.0f}%' if mfu is not None else '-':>4}  "
        f"{row['memory_gib']:>4.1f}G  {show_seconds(row['eta_s']):>7}"
    )


def validation_line(step: int, losses: dict[str, float]) -> str:
    """The terminal's line of a validation."""
    return f"validation at step {step}: " + ", ".join(f"{n} {v:.4f}" for n, v in losses.items())


def _wandb(run: Path, cfg: LogConfig, settings: dict[str, Any]) -> Any:
    if cfg.wandb == "disabled":
        return None
    wandb = needed("wandb", f"log.wandb {cfg.wandb}", "'llama-pretraining[wandb]'")
    mode = cfg.wandb
    # what it would note of the machine has the command line in it, and that may hold a secret
    private = dict(disable_git=True, disable_code=True, x_disable_meta=True)
    try:
        host, key = wandb.setup().settings.base_url, wandb.api.api_key
        if mode == "online" and not (key and _answers(host)):
            lacks = "its server does not answer" if key else "there is no API key"
            print(f"WARNING: log.wandb is online but {lacks}: logging offline")
            mode = "offline"
        tracked = wandb.init(
            project="llama-pretraining",
            name=run.name,
            id=run.name,
            resume="allow",
            dir=str(run),
            mode=mode,
            config=settings,
            settings=wandb.Settings(init_timeout=5, **private),
        )
        # its own steps must never fall, and after a rewind ours do
        tracked.define_metric("*", step_metric="step")
    except Exception as error:  # unreachable server, full disk: a logger must never end a run
        # addresses may have a password in them
        why = re.sub(r"//\S*@", "//", " ".join(str(error).split()))
        print(f"WARNING: wandb cannot start ({why}); training goes on without it")
        return None
    return lambda number, row: tracked.log(row, step=number)


def _answers(url: str) -> bool:
    """Whether a server does, directly or through the proxy that the environment names."""
    try:
        with suppress(HTTPError):
            urlopen(url, timeout=3).close()
    except OSError:
        return False
    return True


def _tensorboard(run: Path, cfg: LogConfig) -> Any:
    if not cfg.tensorboard:
        return None
    extra = "'llama-pretraining[tensorboard]'"
    module = needed("torch.utils.tensorboard", "log.tensorboard", extra)
    writer = module.SummaryWriter(str(run / "tensorboard"))

    def tensorboard_sink(number: int, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if isinstance(value, int | float) and key != "step":
                writer.add_scalar(key, value, row["step"])
        writer.flush()

    return tensorboard_sink


class Tee:
    """Standard output that is also appended to train.log."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", buffering=1, encoding="utf-8")
        self._out = sys.stdout

    def write(self, text: str) -> int:
        # a full disk loses a copy, not the run, and so does a terminal that is gone
        for file in (self._file, self._out):
            with suppress(OSError):
                file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._out.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)
