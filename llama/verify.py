"""Prove a run: `python -m llama.verify RUN` trains some of its steps again and compares the bits.

A run folder goes in; a table of what was checked comes out, with exit code 0 or 1. Every file of
every checkpoint and of the token shards is hashed. Then steps behind a checkpoint are trained once
more, in memory, and compared with the rows of metrics.jsonl and, where it is within reach, with
every tensor and value of the next checkpoint. Nothing in the run folder changes. As the run was
started, so is this: `torchrun --nproc-per-node 8 -m llama.verify RUN`.
"""

import fcntl
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import torch
from torch.distributed.tensor import DTensor

# train.py lies beside the packages, in none of them
sys.path.append(str(Path(__file__).parent.parent))

import train  # noqa: E402
from llama import cli, config, files  # noqa: E402
from llama.cli import UserError  # noqa: E402
from llama.config import Config, ParallelConfig  # noqa: E402
from llama.data import loader, shards  # noqa: E402
from llama.runtime import checkpoint, console, folder, metrics, world  # noqa: E402
from llama.runtime.state import State, contents, made_by, restore  # noqa: E402

# a next checkpoint within so many steps is reached; beyond, so many steps are trained again
NEAR_STEPS, FAR_STEPS = 50, 20
# docs/design.md, Equality: over the first 20 steps in float32. bfloat16 rounds 2^16 times coarser.
OTHER_WORLD_STEPS = 20
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
# of the attention backends these give the same bits twice on a GPU
REPEATABLE = ("triton", "gluon", "reference")


@dataclass
class Report:
    """What was checked, line by line; every rank knows whether anything differs."""

    here: world.World
    faults: int = 0

    def add(self, subject: str, what: str, problem: str | None, good: str) -> bool:
        """Say it, with the first problem of any rank; all ranks call it together."""
        found = next((text for text in self.here.gather(problem) if text), None)
        self.faults += found is not None
        self.here.say(f"{subject:<34} {what:<26} {f'DIFFERS: {found}' if found else good}")
        return found is None


@dataclass
class Evidence:
    """A checkpoint to start from, and what the run has recorded of the steps behind it.

    Args:
        start: The checkpoint.
        step: Its step; the first one trained again comes after it.
        end: The last step trained again.
        rows: Rows of metrics.jsonl by step.
        ends: Later checkpoints on the way, by step.
        cfg: What the steps were trained with.
        made_by: Where they were trained, as `llama.runtime.state.made_by` says it.
    """

    start: Path
    step: int
    end: int
    rows: dict[int, dict[str, Any]]
    ends: dict[int, Path]
    cfg: Config
    made_by: dict[str, Any]


# -- finding what can be proven --------------------------------------------------------------------


def evidence(
    run: Path, whole: dict[int, Path], steps: int | None, only: Path | None = None
) -> Evidence:
    """The newest checkpoint with so many recorded steps behind it, or with as many as there are.

    `whole` are the run's undamaged checkpoints by step, `only` names the one to start from. Raises
    `UserError` where nothing is recorded within these steps.
    """
    rows = _rows(run / "metrics.jsonl")
    limits = {n: _limit(n, whole, rows) for n in whole if only in (None, whole[n])}
    starts = [n for n, limit in limits.items() if limit > n]
    if not starts:
        raise UserError(
            f"nothing is recorded behind {only or whole[max(whole)]}: a run proves itself with two "
            "checkpoints, or rows behind its last one; --steps 0 checks the files alone"
        )
    step = max([n for n in starts if n + (steps or 1) <= limits[n]], default=min(starts))
    later = sorted(n for n in whole if step < n <= limits[step])
    ahead = sorted(n for n in {*rows, *later} if step < n <= limits[step])
    if not steps:
        near = later and later[0] - step <= NEAR_STEPS
        steps = later[0] - step if near else max(FAR_STEPS, ahead[0] - step)
    end = min(step + steps, limits[step])
    if end < ahead[0]:
        raise UserError(
            f"nothing is recorded within {steps} steps behind {whole[step]}: "
            f"--steps {ahead[0] - step} reaches something"
        )
    recorded = checkpoint.read_state(whole[later[0] if later else step])
    made = dict(recorded.get("made_by", {}))
    if not later and (run / "env.json").exists():
        # rows behind the last checkpoint are of the last start, as env.json is
        env = files.read_object(run / "env.json")
        made |= {key: env[key] for key in made if key in env}
    return Evidence(
        start=whole[step],
        step=step,
        end=end,
        rows={n: rows[n] for n in ahead if n in rows and n <= end},
        ends={n: whole[n] for n in later if n <= end},
        cfg=_configuration(recorded["config"]) if later else config.of_run(run),
        made_by=made,
    )


def _limit(step: int, whole: dict[int, Path], rows: dict[int, Any]) -> int:
    """The last step that was trained as the first one behind a checkpoint was."""
    later = sorted(n for n in whole if n > step)
    if not later:
        return max([step, *rows])
    how = [[checkpoint.read_state(whole[n]).get(k) for k in ("config", "made_by")] for n in later]
    return max(n for i, n in enumerate(later) if all(each == how[0] for each in how[: i + 1]))


def _rows(path: Path) -> dict[int, dict[str, Any]]:
    """Log rows by step; of two of a step the later one counts, a torn one not at all."""
    found = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(orjson.JSONDecodeError, KeyError, TypeError):
            row = orjson.loads(line)
            if "loss" in row:
                found[int(row["step"])] = row
    return found


def _configuration(values: dict[str, Any]) -> Config:
    """What a checkpoint says it was trained with."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_bytes(orjson.dumps(values))
        return config.load(["--config", str(path)])


# -- training again --------------------------------------------------------------------------------


def replay(state: State, found: Evidence, report: Report) -> None:
    """Train the recorded steps again and report every difference."""
    restore(state, found.start)
    here, why_not = state.world, reasons(state, found)
    end, tolerance = found.end, 0.0
    if why_not:
        end, tolerance = min(end, found.step + OTHER_WORLD_STEPS), TOLERANCE[state.dtype]
        here.say(f"bits are not compared, for {'; '.join(why_not)}")
    steps = f"steps {found.step + 1} to {end}"
    here.say(f"{steps} are trained again, from {found.start}\n{metrics.HEADER}")
    compared, worst, problem = 0, 0.0, None
    reader, clock = loader.Loader(state.sources, state.order), metrics.Clock(state.tokens)
    for _, tokens, source in reader.steps(state.step, end, partial(train.rows_of, state)):
        measured = train.step(state, tokens, source)
        if train.is_logged(state):
            row = console.log_row(state, measured, clock, reader.waited_s)
            apart, text = compare_rows(found.rows.get(state.step, {}), row, tolerance)
            compared, worst = compared + (state.step in found.rows), max(worst, apart)
            problem = problem or text
        if state.step in found.ends and not why_not:
            compare_checkpoint(state, found.ends[state.step], report)
    reader.close()
    if why_not and not compared:
        raise UserError(f"no row of metrics.jsonl lies between steps {found.step} and {end}")
    good = f"equal to {tolerance:.0e}, largest difference {worst:.0e}" if why_not else "bit-equal"
    report.add(steps, f"{compared} rows of metrics.jsonl", problem, good)


def reasons(state: State, found: Evidence) -> list[str]:
    """Why these steps may have other bits here than where they were first trained."""
    why = config.differences(found.made_by, made_by(state))
    deterministic = state.cfg.kernels.deterministic and state.backend in REPEATABLE
    if state.world.device.type == "cuda" and not deterministic:
        why.append(f"the backward pass of {state.backend} on a GPU sums in any order")
    return why


def compare_rows(
    recorded: dict[str, Any], row: dict[str, Any], tolerance: float
) -> tuple[float, str | None]:
    """(largest relative difference, the first value that differs by more than the tolerance)."""
    row = orjson.loads(orjson.dumps(row))  # as it was written: NaN is null
    worst, problem = 0.0, None
    for key, value in recorded.items():
        if key not in ("loss", "lr", "grad_norm") and not key.startswith("loss/"):
            continue
        now = row.get(key)
        if now != value:
            numbers = isinstance(now, float) and isinstance(value, float)
            apart = abs(now - value) / max(abs(value), 1e-300) if numbers else math.inf
            worst = max(worst, apart)
            if apart > tolerance * (10 if key == "grad_norm" else 1):
                problem = problem or f"{key} of step {recorded['step']} was {value!r}, is {now!r}"
    return worst, problem


def compare_checkpoint(state: State, path: Path, report: Report) -> None:
    """Every tensor and value of a checkpoint against the state, bit by bit."""
    saved = checkpoint.read_state(path)
    now = orjson.loads(orjson.dumps(contents(state), option=orjson.OPT_NON_STR_KEYS))
    del saved["config"], now["config"]
    changed = config.differences(saved, now)
    problem = f"state.json: {changed[0][:80]}" if changed else None
    report.add(path.name, f"{len(config.flat(now))} values of state.json", problem, "equal")
    problem, tensors = None, state.tensors()
    for name, tensor in tensors.items():
        # one at a time: twice the whole state might not fit
        other = torch.empty_like(tensor)
        checkpoint.load(path, {name: other}, state.world)
        ours, theirs = (_bytes(each) for each in (tensor, other))
        if not problem and not torch.equal(ours, theirs):
            where = int((ours != theirs).sum())
            problem = f"{name}: {where} of {ours.numel()} bytes on rank {state.world.rank}"
    report.add(path.name, f"{len(tensors)} tensors", problem, "bit-equal")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor as it lies in memory: NaN and -0.0 count too."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().contiguous().reshape(-1).view(torch.uint8)


# -- hashing ---------------------------------------------------------------------------------------


def check_checkpoints(run: Path, hashes: bool, report: Report) -> dict[int, Path]:
    """Every file of every checkpoint against its manifest; returns the undamaged ones by step."""
    here = report.here
    whole = {}
    for number, path in here.broadcast(checkpoint.steps(run)):
        problem = checkpoint.damage(path, hashes, part=here.rank, parts=here.size)
        what = f"{'hashes' if hashes else 'sizes'} of all files"
        if report.add(f"{path.parent.name}/{path.name}", what, problem, "as written"):
            whole[number] = path
    if not whole:
        raise UserError(f"{run} holds no whole checkpoint: there is nothing to verify")
    return whole


def check_shards(cfg: Config, recorded: dict[str, Any], report: Report) -> None:
    """Every file of the shards against its manifest, and the manifests against the checkpoint."""
    here = report.here
    for split in ("train", "valid"):
        for name in cfg.data.mixture:
            problem, n = None, 0
            try:
                source = shards.open_sources(cfg.data.path, [name], split)[name]
                n = len(source.shards)
                known = recorded.get(name, source.manifest_sha256)
                if split == "train" and source.manifest_sha256 != known:
                    problem = f"{source.folder}/manifest.json is not what the run was trained on"
                for k in range(here.rank, n, here.size):
                    problem = problem or next(iter(shards.wrong_files(source, k)), None)
            except UserError as error:
                problem = str(error)
            report.add(f"{name}/{split}", f"hashes of {n} shards", problem, "as made")


# -- the command -----------------------------------------------------------------------------------


@contextmanager
def at_rest(run: Path, here: world.World) -> Iterator[None]:
    """Keep the run from being trained meanwhile, without writing into its folder."""
    problem, lock = None, None
    if here.leads and (run / ".lock").exists():
        lock = open(run / ".lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            problem = f"{run} is being trained: wait for it, or verify a copy of the folder"
    folder.together(problem, here)
    try:
        yield
    finally:
        if lock:
            lock.close()


def verify(path: Path, steps: int | None, hashes: bool, data: str | None) -> int:
    """Check a run, or one checkpoint of it. Returns the exit code, the same on every rank."""
    only = path if checkpoint.STEP_FOLDER.fullmatch(path.name) else None
    run = path.parent.parent if only else path
    latest = config.of_run(run)
    here = world.start()
    report = Report(here)
    with at_rest(run, here):
        whole = check_checkpoints(run, hashes, report)
        latest.data.path = data or latest.data.path
        if hashes:
            recorded = checkpoint.read_state(whole[max(whole)])["fingerprints"]["data"]
            check_shards(latest, recorded, report)
        if steps != 0:
            found = evidence(run, whole, steps, only)
            cfg = found.cfg
            cfg.data.path, cfg.train.init_from = latest.data.path, None
            if found.made_by.get("processes") == here.size:
                cfg.train.micro_batch = found.made_by["micro_batch"]
            else:
                cfg.parallel = ParallelConfig(recompute=cfg.parallel.recompute)
            replay(train.build(cfg, here, run), found, report)
    here.say(f"{report.faults} faults" if report.faults else f"{run} is what it was")
    return int(report.faults > 0)


def main(argv: list[str]) -> int:
    p = cli.parser("python -m llama.verify", "Trains steps of a run again and compares the bits.")
    p.add_argument("run", type=str, help="a run folder, or one of its checkpoints")
    p.add_argument("--steps", type=int, help="how many are trained again; 0 for none")
    p.add_argument("--hashes", type=bool, default=True, help="hash all checkpoints and shards")
    p.add_argument("--data", type=str, help="where the token shards lie now")
    args = p.parse_args(argv)
    try:
        return verify(Path(args.run), args.steps, args.hashes, args.data)
    except UserError:
        if int(os.environ.get("RANK", 0)):
            time.sleep(20)  # rank 0 tells it for all, and torchrun then ends this process
        raise
    finally:
        world.stop()


if __name__ == "__main__":
    cli.run(main)
