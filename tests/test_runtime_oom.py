"""Out of memory: the sentence names where it was, and what it offers fits by its own arithmetic."""

import itertools
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import costs, optim
from llama.cli import UserError
from llama.config import Config, ModelConfig, ParallelConfig
from llama.costs import Layout
from llama.model import Transformer
from llama.parallel import recompute
from llama.runtime import oom, world

ROOT = Path(__file__).parent.parent
SMALL = ModelConfig(dim=32, n_layers=3, n_heads=4, vocab_size=100)


@pytest.fixture
def here() -> Iterator[world.World]:
    yield world.start()
    world.stop()


def state_of(cfg: Config, here: world.World) -> Any:
    """As much of a run's state as an explanation reads, with a real model in it."""
    model = Transformer(cfg.model, attention="reference")
    model.init_weights(0)
    recompute.apply(model, [cfg.parallel.recompute] * cfg.model.n_layers)
    optimizer = optim.build(model, cfg.optim)
    return SimpleNamespace(cfg=cfg, world=here, model=model, optimizer=optimizer, micro_batch=8)


def too_much(*_: Any, **__: Any) -> torch.Tensor:
    return torch.empty(1 << 50)


def one_step(state: Any) -> None:
    tokens = torch.randint(0, 100, (2, 9))
    losses, _ = state.model(tokens[:, :-1], tokens[:, 1:])
    losses.sum().backward()
    optim.step(state.optimizer, lr=1e-3, clip=1.0)


def explanation(cfg: Config, here: world.World, state: Any) -> str:
    with pytest.raises(oom.OutOfMemory) as raised, oom.explained("step 7", cfg, here, state):
        one_step(state)
    assert isinstance(raised.value, UserError) and "\n" not in str(raised.value)
    return str(raised.value)


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return too_much()


@pytest.mark.parametrize("mode", ["none", "full"])
def test_it_says_in_which_part_of_a_step_and_in_which_layer(
    here: world.World, rng: random.Random, mode: Any
) -> None:
    cfg = Config(model=SMALL, parallel=ParallelConfig(recompute=mode))
    layer, part = rng.randrange(3), rng.choice(["attention.wq", "feed_forward.w2", "ffn_norm"])
    name = f"layers.{layer}.{part}"
    state = state_of(cfg, here)
    module = state.model.get_submodule(name)
    whole = module.forward
    module.forward = too_much
    text = explanation(cfg, here, state)
    assert f"out of memory in step 7, forward pass of {name} on rank 0 (cpu): " in text
    assert "planned " in text and "peak " in text

    # only the backward pass fails: at a layer whose output has no gradient to give
    module.forward = whole
    block = state.model.layers[layer]
    block.register_forward_hook(lambda _, __, out: FailsBackward.apply(out))
    text = explanation(cfg, here, state)
    assert f"in step 7, backward pass of layers.{layer} on rank 0" in text


def test_recomputing_in_the_backward_pass_names_the_layer(here: world.World) -> None:
    cfg = Config(model=SMALL, parallel=ParallelConfig(recompute="full"))
    state = state_of(cfg, here)
    module = state.model.layers[1].feed_forward.w3
    whole, calls = module.forward, []

    def second_time(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return whole(x) if len(calls) == 1 else too_much()

    module.forward = second_time
    text = explanation(cfg, here, state)
    assert "in step 7, backward pass of layers.1.feed_forward.w3 on rank 0" in text


def test_the_optimizer_and_the_building_are_phases_too(
    here: world.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = Config(model=replace(SMALL))
    state = state_of(cfg, here)
    monkeypatch.setattr(optim, "adamw", too_much)
    assert "in step 7, optimizer on rank 0" in explanation(cfg, here, state)
    with pytest.raises(oom.OutOfMemory, match="in building the model on rank 0") as raised:
        with oom.explained("building the model", cfg, here):
            too_much()
    assert "activations" not in str(raised.value)
    with monkeypatch.context() as context:
        context.setattr(oom, "available", lambda _: 10_000)
        text = explanation(cfg, here, state)
        nothing = "no smaller micro-batch, recompute or sharding would fit: take a smaller model"
        assert nothing in text and "of 10.0 kB" in text
    cfg.model.vocab_size = None
    with pytest.raises(oom.OutOfMemory, match="peak .* and 4503.6 TB more asked for, of"):
        with oom.explained("building the model", cfg, here):
            too_much()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        MemoryError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3.00 GiB."),
    ],
)
def test_every_allocator_is_understood(error: Exception, here: world.World) -> None:
    with pytest.raises(oom.OutOfMemory) as raised:
        with oom.explained("x", Config(model=SMALL), here):
            raise error
    assert ("and 2.1 GB more asked for" in str(raised.value)) == ("2.00 GiB" in str(error))
    assert ("and 3.2 GB more asked for" in str(raised.value)) == ("3.00 GiB" in str(error))


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), UserError("no"), KeyError("x")])
def test_other_errors_pass_untouched(error: Exception, here: world.World) -> None:
    with pytest.raises(type(error)) as raised, oom.explained("x", Config(model=SMALL), here):
        raise error
    assert raised.value is error


# -- arithmetic ------------------------------------------------------------------------------------


def test_what_is_offered_fits_and_nothing_smaller_would(rng: random.Random) -> None:
    offered = set()
    for _ in range(400):
        heads = rng.choice([8, 16, 32])
        model = ModelConfig(64 * heads, rng.randrange(2, 60), heads, vocab_size=32_000)
        plan = Layout(
            seq_len=2048,
            micro_batch=rng.choice([0, 1, 2, 5, 8, 16]),
            element_bytes=rng.choice([2, 4]),
            recompute=rng.choice(["none", "none", "full"]),
            shard=rng.choice([1, 8]),
        )
        planned = costs.needed(model, plan)
        there = int(rng.uniform(0.02, 1.3) * planned)
        need = max(planned, int(there * rng.uniform(1, 1.2)))
        on_gpu = rng.random() < 0.5
        device = torch.device("cuda" if on_gpu else "cpu")
        found = oom.changes(model, plan, need, there, device)
        missed = need - planned
        for option, size in found:
            assert size <= 0.95 * there and option
            m = re.search(r"micro_batch (\d+)", option)
            s = re.search(r"shard (\d+)", option)
            change = replace(
                plan,
                micro_batch=int(m[1]) if m else plan.micro_batch,
                recompute="full" if "recompute full" in option else plan.recompute,
                shard=int(s[1]) if s else plan.shard,
            )
            assert size == costs.needed(model, change) + missed
            assert on_gpu or not s
            # no smaller change of the same kind would do
            if m and not s and plan.micro_batch in (2, 8, 16) and 2 * int(m[1]) < plan.micro_batch:
                less = replace(change, micro_batch=2 * change.micro_batch)
                assert costs.needed(model, less) + missed > 0.95 * there
            if s and change.shard > 2 * plan.shard:
                less = replace(change, shard=change.shard // 2)
                assert costs.needed(model, less) + missed > 0.95 * there
            offered.add(re.sub(r"\d+", "N", option))
        if not found:
            micros = {plan.micro_batch >> n for n in range(5)} - {0} or {0}
            shards = [plan.shard << n for n in range(9)] if on_gpu else [plan.shard]
            for micro, again, shard in itertools.product(micros, (plan.recompute, "full"), shards):
                change = replace(plan, micro_batch=micro, recompute=again, shard=shard)
                assert change == plan or costs.needed(model, change) + missed > 0.95 * there
    assert len(offered) >= 4, offered


def test_states_are_what_the_optimizer_holds(here: world.World) -> None:
    state = state_of(Config(model=SMALL), here)
    one_step(state)
    held = [*state.model.parameters(), *(p.grad for p in state.model.parameters())]
    held += optim.state_tensors(state.optimizer, state.model).values()
    _, parts = costs.peak(SMALL, oom.layout_of(state.cfg, here, state))
    states = parts["parameters"] + parts["gradients"] + parts["optimizer"]
    assert states == sum(4 * tensor.numel() for tensor in held) == 16 * costs.parameters(SMALL)
    _, building = costs.peak(SMALL, oom.layout_of(state.cfg, here, None))
    assert building["activations"] == 0 < parts["activations"]


# -- a real one ------------------------------------------------------------------------------------

REAL = """
import os, re, resource, sys
from types import SimpleNamespace
import torch
from llama import cli
from llama.config import Config, ModelConfig, TrainConfig
from llama.model import Transformer
from llama.runtime import oom, world

def main(argv):
    here = world.start()
    cfg = Config(model=ModelConfig(dim=256, n_layers=6, n_heads=4, vocab_size=1000))
    cfg.data.seq_len = 512
    model = Transformer(cfg.model)
    model.init_weights(0)
    state = SimpleNamespace(model=model, micro_batch=256)
    tokens = torch.zeros(256, 513, dtype=torch.long)
    used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 10**9,) * 2)
    with oom.explained("step 1", cfg, here, state):
        losses, _ = model(tokens[:, :-1], tokens[:, 1:])
        losses.sum().backward()

cli.run(main)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a limit on memory works on Linux")
def test_memory_that_really_runs_out_is_told_in_one_line() -> None:
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", REAL], env=env, capture_output=True, text=True, timeout=120
    )
    print(result.stderr)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr
    pattern = (
        r"error: out of memory in step 1, forward pass of layers\.\d[\w.]* on rank 0 \(cpu\): "
        r"planned [\d.]+ GB \(.*activations [\d.]+ GB.*\), peak [\d.]+ [GM]B and [\d.]+ MB more "
        r"asked for, of [\d.]+ GB; (--train\.micro_batch \d+ \(.*\)).* would fit"
    )
    assert re.fullmatch(pattern, lines[0]), lines[0]
