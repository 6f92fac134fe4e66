"""A suspicious step is computed again: the data gives the same bits, broken hardware others."""

import math
import random
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from made_guard import batch, bits, go, run, state_in
from made_starts import forked

import train
from llama import config
from llama.cli import UserError
from llama.runtime import rerun
from llama.runtime.guard import Guard

pytestmark = pytest.mark.faults
SAME = "the same bits: the data or the learning rate, not the hardware"


def test_a_bad_batch_gives_the_same_bits_and_the_policy_holds(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(workspace)
    with state_in("batch", **{"guard.rerun": True, "guard.spike": "skip"}) as state:
        for _ in range(20):
            train.step(state, *batch(state))
        assert "computed again" not in capsys.readouterr().out
        tokens, source = batch(state)
        before = bits(state)
        train.step(state, torch.full_like(tokens, 7), source)
        said = capsys.readouterr().out
        assert "WARNING: step 21, loss" in said and SAME in said
        assert all(torch.equal(t, before[name]) for name, t in bits(state).items())
        assert state.guard.counts.tolist() == [1, 1, 1]


def _once(tensor: torch.Tensor, struck: list[int]) -> torch.Tensor:
    """A tensor with a wrong element, the first time only."""
    wrong = tensor.detach().clone().contiguous()
    if not struck:
        # less than infinite would vanish in the norm behind a block
        wrong.view(-1)[3] = math.inf
    struck.append(1)
    return wrong


def _broken(where: str) -> int:
    """Rank 1 computes one wrong number; the step must be what it is without."""
    name = f"broken-{where}"
    with state_in(name, **{"guard.rerun": True, "train.micro_batch": 2}) as state:
        for _ in range(17):
            train.step(state, *batch(state))
        kept, guard = bits(state), state.guard.state()
        train.step(state, *batch(state))
        right = bits(state)
        with torch.no_grad():
            for name, tensor in state.tensors().items():
                tensor.copy_(kept[name])
        train.optim.set_step_count(state.optimizer, int(kept["adam"]))
        state.guard, state.step = Guard(state.guard.cfg, state.world, saved=guard), 17
        struck: list[int] = []

        def forward(module: Any, inputs: Any, out: torch.Tensor) -> torch.Tensor | None:
            if where == "forward":
                return out + (_once(out, struck) - out.detach())
            out.register_hook(lambda grad: _once(grad, struck))
            return None

        if state.world.rank == 1:
            state.model.layers[1].register_forward_hook(forward)  # type: ignore[index, union-attr]
        train.step(state, *batch(state))
        # micro-batches, twice
        assert len(struck) == 4 * state.world.rank
        assert all(torch.equal(t, right[name]) for name, t in bits(state).items())
        assert state.guard.counts.tolist() == [0, 0, 0]
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_that_computed_other_bits_is_named_and_its_error_has_no_effect(
    workspace: Path, where: str
) -> None:
    """Sums over ranks spread the error before it is seen: every rank holds wrong gradients."""
    log = workspace / f"{where}.out"
    code, said = forked(workspace, partial(_broken, where), 2, "", log)
    assert code == 0, said
    assert "WARNING: step 18, loss" in said
    assert "bad hardware: other bits are what rank 1 on" in said
    assert said.count("computed\n") == 1 and "rank 0" not in said


@pytest.mark.slow
def test_a_flipped_bit_and_a_batch_are_told_apart_in_a_run(
    workspace: Path, rng: random.Random
) -> None:
    size = 512 * 32 * 4 // 2  # bytes of half the embedding's gradient
    for seed in count(rng.randrange(10**6)):
        draws = random.Random(seed)
        draws.random()
        if draws.randrange(size) % 4 == 3 and draws.randrange(8) == 6:
            break  # the highest bit of an exponent
    flip = f"step.graded:rank=1,step=18,hit=1,action=flip,seed={seed}"
    two = run(workspace, "told", **{"guard.rerun": True, "train.tokens": 256 * 22})
    said = go(two, f"{flip};step.graded:rank=0,step=20,action=spike", 2)
    assert "guard.rerun: each step waits" in said
    assert "WARNING: step 18," in said and "rank 1 on" in said and "holds gradients of" in said
    told = said[said.index("WARNING: step 20,") :]
    assert told.splitlines()[0].endswith(SAME)
    rows = two.rows()
    assert [row["step"] for row in rows] == list(range(1, 23))
    assert rows[-1]["spikes"] == 1 and rows[18]["spikes"] == 0


def test_bits_that_never_repeat_are_not_compared(workspace: Path) -> None:
    cfg, gpu = config.Config(), torch.device("cuda")
    cfg.guard.rerun = True
    rerun.refuse(cfg, "triton", gpu)
    rerun.refuse(cfg, "sdpa", torch.device("cpu"))
    with pytest.raises(UserError, match="attention triton: not sdpa"):
        rerun.refuse(cfg, "sdpa", gpu)
    cfg.kernels.deterministic = False
    with pytest.raises(UserError, match=r"guard.rerun needs kernels.deterministic"):
        rerun.refuse(cfg, "triton", gpu)
