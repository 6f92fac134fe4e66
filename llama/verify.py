"""Prove a run: `python -m llama.verify RUN` trains some of its steps again and compares the bits.

A run folder goes in; a line for everything that was checked comes out, with exit code 0 or 1. Every
file of every checkpoint and of the token shards is hashed. Then the steps behind a checkpoint are
trained once more, in memory, and compared with the rows of metrics.jsonl and with every tensor and
value of the next checkpoints. Nothing in the run folder changes. As the run was started, so is
this: `torchrun --nproc-per-node 8 -m llama.verify RUN`.
"""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
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
from llama.runtime import checkpoint, console, folder, metrics, rerun, rewind, world  # noqa: E402
from llama.runtime.state import State, contents, made_by, restore  # noqa: E402

# a next checkpoint within so many steps is reached; beyond, so many steps are trained again
NEAR_STEPS, FAR_STEPS = 50, 20
# docs/design.md, Equality: over the first 20 steps in float32; bfloat16 rounds 2^16 times coarser
OTHER_WORLD_STEPS = 20
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@dataclass
class Report:
    """What was checked, line by line; every rank knows how much differs."""

    here: world.World
    faults: int = 0

    def add(self, subject: str, what: str, problem: str | None, good: str) -> bool:
        """Say it, with the first problem of any rank; all ranks call it together."""
        found = self.here.first(problem)
        self.faults += found is not None
        self.here.say(f"{subject:<34} {what:<26} {f'DIFFERS: {found}' if found else good}")
        return found is None


# -- what is on disk -------------------------------------------------------------------------------


def check_checkpoints(run: Path, hashes: bool, report: Report) -> dict[int, Path]:
    """Every file of every checkpoint against its manifest; returns the undamaged ones by step."""
    here, whole = report.here, {}
    for number, path in here.broadcast(checkpoint.steps(run)):
        problem = checkpoint.damage(path, hashes, part=here.rank, parts=here.size)
        what = f"{'hashes' if hashes else 'sizes'} of all files"
        if report.add(f"{path.parent.name}/{path.name}", what, problem, "as written"):
            whole[number] = path
    if not whole:
        raise UserError(f"{run} holds no whole checkpoint: there is nothing to verify")
    return whole


def check_shards(cfg: Config, recorded: dict[str, str], report: Report) -> None:
    """Every file of the shards against its manifest, and the manifests against a checkpoint."""
    here = report.here
    for split, name in product(("train", "valid"), cfg.data.mixture):
        problem, n = None, 0
        try:
            source = shards.open_sources(cfg.data.path, [name], split)[name]
            n, known = len(source.shards), recorded.get(name, source.manifest_sha256)
            if split == "train" and source.manifest_sha256 != known:
                problem = f"{source.folder}/manifest.json is not what the run was trained on"
            for k in range(here.rank, n, here.size):
                problem = problem or next(iter(shards.wrong_hashes(source, k)), None)
        except UserError as error:
            problem = str(error)
        report.add(f"{name}/{split}", f"hashes of {n} shards", problem, "as made")


def recorded_rows(run: Path) -> dict[int, dict[str, Any]]:
    """Log rows of metrics.jsonl by step, without those that a rewind took back."""
    read: list[dict[str, Any]] = []
    with suppress(FileNotFoundError):
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            with suppress(orjson.JSONDecodeError):  # the last one, torn by a kill
                read.append(orjson.loads(line))
    return {row["step"]: row for row in metrics.lineage(read) if "loss" in row}


def choose(
    whole: dict[int, Path], rows: dict[int, Any], steps: int | None, only: Path | None
) -> tuple[int, int]:
    """(step to start from, last step): the newest checkpoint with so many recorded steps behind it.

    `whole` are the undamaged checkpoints by step, `only` names the one to start from. Goes no
    further than the next checkpoint, and at least to the next thing recorded.
    """
    last = max(rows, default=0)
    limits = {n: min((m for m in whole if m > n), default=last) for n in whole}
    starts = [n for n in whole if limits[n] > n and only in (None, whole[n])]
    if not starts:
        raise UserError(
            f"nothing is recorded behind {only or whole[max(whole)]}: a run proves itself with two "
            "checkpoints, or rows behind its last one; --steps 0 checks the files alone"
        )
    step = max(starts, key=lambda n: (min(limits[n] - n, steps or 1), n))
    limit = limits[step]
    first = min(n for n in (limit, *rows) if n > step)
    steps = steps or (limit - step if limit - step <= NEAR_STEPS else FAR_STEPS)
    return step, min(max(step + steps, first), limit)


def circumstances(run: Path, whole: dict[int, Path], step: int) -> tuple[Config, dict[str, Any]]:
    """What the steps behind a checkpoint were trained with, and where: `made_by` of the state."""
    later = min((n for n in whole if n > step), default=None)
    saved = checkpoint.read_state(whole[later or step])
    made = saved.get("made_by", {})
    if later:
        return config.load([f"--{k}={_text(v)}" for k, v in saved["config"].items()]), made
    # rows behind the last checkpoint are of the last start, as these two files are
    latest = files.read_object(run / "env.json")
    return config.of_run(run), made | {key: latest[key] for key in made if key in latest}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


# -- training again --------------------------------------------------------------------------------


def replay(
    state: State, whole: dict[int, Path], rows: dict[int, Any], end: int, made: Any, report: Report
) -> None:
    """Train the steps behind the state's again, to `end`, and report every difference."""
    here, first, tolerance = state.world, state.step + 1, 0.0
    if why_not := reasons(state, made):
        end, tolerance = min(end, state.step + OTHER_WORLD_STEPS), TOLERANCE[state.dtype]
        here.say(f"bits are not compared, for {'; '.join(why_not)}")
    here.say(f"steps {first} to {end} are trained again\n{metrics.HEADER}")
    apart: list[tuple[float, str]] = []
    reader, clock = loader.Loader(state.sources, state.order), metrics.Clock(state.tokens)
    for _, tokens, source in reader.steps(state.step, end, partial(train.rows_of, state)):
        measured = train.step(state, tokens, source)
        rewind.readings(state)
        if train.is_logged(state):
            row = console.log_row(state, measured, clock, reader.waited_s)
            apart += differences(rows.get(state.step, {}), row)
    reader.close()
    if end in whole and not why_not:
        compare_checkpoint(state, whole[end], report)
    compared = sum(first <= n <= end for n in rows)
    problem = next((text for much, text in apart if much > tolerance), None)
    if why_not and not compared:
        problem = "nothing but bits could be compared"
    worst = max((much for much, _ in apart), default=0.0)
    good = f"equal to {tolerance:.0e}, largest difference {worst:.0e}" if why_not else "bit-equal"
    report.add(f"steps {first} to {end}", f"{compared} rows of metrics.jsonl", problem, good)


def reasons(state: State, made: dict[str, Any]) -> list[str]:
    """Why these steps may have other bits here than where they were first trained."""
    why = config.differences(made, made_by(state))
    if not rerun.repeatable(state.cfg, state.backend, state.world.device):
        why.append(f"the backward pass of {state.backend} on a GPU sums in any order")
    return why


def differences(recorded: dict[str, Any], row: dict[str, Any]) -> Iterator[tuple[float, str]]:
    """(relative difference, in words) of every value of a row that is not what was recorded."""
    row = orjson.loads(orjson.dumps(row))  # as it was written: NaN is null
    for key, old in recorded.items():
        new = row.get(key)
        compared = key in ("loss", "lr", "grad_norm") or key.startswith("loss/")
        if compared and new != old:
            numbers = isinstance(new, float) and isinstance(old, float)
            much = abs(new - old) / max(abs(old), 1e-300) if numbers else math.inf
            # a norm is promised to 1e-5 where a loss is to 1e-6
            much /= 10 if key == "grad_norm" else 1
            yield much, f"{key} of step {recorded['step']} was {old!r}, is {new!r}"


def compare_checkpoint(state: State, path: Path, report: Report) -> None:
    """Every tensor and value of a checkpoint against the state, bit by bit."""
    saved = checkpoint.read_state(path)
    now = orjson.loads(orjson.dumps(contents(state), option=orjson.OPT_NON_STR_KEYS))
    del saved["config"], now["config"]
    changed = next(iter(config.differences(saved, now)), "")[:80]
    what = f"{len(config.flat(now))} values of state.json"
    report.add(path.name, what, changed and f"state.json: {changed}", "equal")
    problem, tensors = None, state.tensors()
    for name, tensor in tensors.items():
        # one at a time: twice the whole state might not fit
        other = torch.empty_like(tensor)
        checkpoint.load(path, {name: other}, state.world)
        wrong = int((_bytes(tensor) != _bytes(other)).sum())
        if wrong and not problem:
            problem = f"{name}: {wrong} bytes on rank {state.world.rank}"
    report.add(path.name, f"{len(tensors)} tensors", problem, "bit-equal")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor as it lies in memory: NaN and -0.0 count too."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().contiguous().reshape(-1).view(torch.uint8)


# -- the command -----------------------------------------------------------------------------------


def verify(path: Path, steps: int | None, hashes: bool, data: str | None) -> int:
    """Check a run, or one checkpoint of it. Returns the exit code, the same on every rank."""
    only = path if checkpoint.STEP_FOLDER.fullmatch(path.name) else None
    run = path.parent.parent if only else path
    latest = config.of_run(run)
    latest.data.path = data or latest.data.path
    here = world.start()
    report = Report(here)
    # what cannot be written is not being trained
    with folder.held(run, here) if os.access(run, os.W_OK) else nullcontext():
        whole = check_checkpoints(run, hashes, report)
        if hashes:
            newest = checkpoint.read_state(whole[max(whole)])
            check_shards(latest, newest["fingerprints"]["data"], report)
        if steps != 0:
            rows = recorded_rows(run)
            step, end = choose(whole, rows, steps, only)
            cfg, made = circumstances(run, whole, step)
            cfg.data.path, cfg.train.init_from = latest.data.path, None
            if made.get("processes") == here.size:
                cfg.train.micro_batch = made["micro_batch"]
            else:
                cfg.parallel = ParallelConfig(recompute=cfg.parallel.recompute)
            state = train.build(cfg, here, run)
            restore(state, whole[step])
            replay(state, whole, rows, end, made, report)
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
