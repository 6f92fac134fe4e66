"""Small runs to give bad numbers to: options, and a state in the test's own process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import made_starts
import torch
from made_starts import Run

import train
from llama import config
from llama.runtime import world

STEPS = 40
SPIKE = "step.graded:step=30,hit=1,action=spike"
HSDP: dict[str, Any] = {"parallel.replicate": 2, "parallel.shard": 1}
OPTIONS: dict[str, Any] = {
    "seed": 3,
    "data.seq_len": 32,
    "train.batch_tokens": 256,
    "train.tokens": 256 * STEPS,
    "validation.every": 0,
    "checkpoint.every": 5,
    "checkpoint.keep": 20,
    "guard.window": 16,
    "guard.rewind_steps": 10,
    "guard.skip_steps": 8,
}


def run(place: Path, name: str, **options: Any) -> Run:
    return Run(place, name, {**OPTIONS, **options})


def go(run: Run, faults: str = "", size: int = 1, expect: int = 0, **more: Any) -> str:
    """What a run says that ends with `expect`."""
    code, said = run.forked(faults, size, **more)
    assert code == expect, said
    return said


def words(**options: Any) -> list[str]:
    values = {**made_starts.OPTIONS, **OPTIONS, **options}
    return [f"--{key}={value}" for key, value in values.items()]


@contextmanager
def state_in(name: str, **options: Any) -> Iterator[train.State]:
    """A state of the working folder's tokens, in the world that the environment describes."""
    here = world.start()
    try:
        yield train.build(config.load(words(name=name, **options)), here, Path("runs") / name)
    finally:
        world.stop()


def batch(state: train.State) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's part of the state's next batch."""
    reader = train.loader.Loader(state.sources, state.order)
    return reader.batch(state.step, *train.rows_of(state, state.step))


def bits(state: train.State) -> dict[str, torch.Tensor]:
    """Weights, moments and Adam's count, copied."""
    tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
    return tensors | {"adam": torch.tensor(train.optim.step_count(state.optimizer))}
