"""Replicas: what several processes hold is compared, bit by bit."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_guard import HSDP, go, run, state_in
from made_starts import forked
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from llama.cli import UserError
from llama.runtime import checkpoint, replicas, world

pytestmark = pytest.mark.faults


@pytest.mark.slow
def test_one_ranks_bad_gradient_is_skipped_by_all(
    workspace: Path,
) -> None:
    """Replicas are compared after every step: had one of them changed, the run would have ended."""
    options = {"guard.replicas_every": 1, "train.tokens": 256 * 13}
    one = run(workspace, "one-rank", **HSDP, **options)
    assert "step 5 changed nothing" in go(one, "step.graded:rank=1,step=5,action=nan", 2)
    assert one.rows()[-1]["skipped_steps"] == 1


@pytest.mark.slow
def test_a_replica_that_drifts_ends_the_run(workspace: Path) -> None:
    drift = run(workspace, "drift", **HSDP, **{"guard.replicas_every": 4})
    said = go(drift, "step.graded:rank=1,step=6,action=spike", 2, expect=2)
    assert "step 8: model.tok_embeddings.weight is not the same on rank 0 and rank 1" in said
    assert drift.reason()["exit"] == "failed" and "machines" in drift.reason()["why"]
    assert [step for step, _ in checkpoint.steps(drift.folder)] == [5]


def _flip_and_compare(seed: int, flips: int) -> int:
    with state_in("flips", **HSDP) as state:
        return _missed(state, random.Random(seed), flips)


def _missed(state: Any, draws: random.Random, flips: int) -> int:
    here = state.world
    replicas.compare(state)
    missed = 0
    for _ in range(flips):
        name, tensor = draws.choice(list(state.tensors().items()))
        local = tensor.to_local().view(-1).view(torch.int32)
        place, mask = draws.randrange(len(local)), 1 << draws.randrange(31)
        if here.rank == 1:
            local[place] ^= mask
        try:
            replicas.compare(state)
            missed += 1
        except UserError as error:
            assert f"step 0: {name} is not the same on rank 0 and rank 1" in str(error)
        if here.rank == 1:
            local[place] ^= mask
    with torch.no_grad():  # the drift of a whole norm, where all elements are alike
        state.model.norm.weight.to_local().mul_(1 + here.rank)  # type: ignore[operator, union-attr]
    with pytest.raises(UserError, match=r"model.norm.weight is not"):
        replicas.compare(state)
    return missed


def test_every_flipped_bit_of_a_replica_is_found(
    workspace: Path, rng: random.Random, score: Callable
) -> None:
    """Weights and moments of both kinds of layout, one element at a time, the norms included."""
    seed, flips = rng.randrange(2**32), 200

    action = partial(_flip_and_compare, seed, flips)
    code, said = forked(workspace, action, 2, "", workspace / "flips.out")
    score("sdc.replicas", flips)
    score("sdc.replicas.missed", code, "0")
    assert code == 0, said


def _look(odd_one: int) -> int:
    here = world.start()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    generator = torch.Generator().manual_seed(0)
    whole = {n: torch.randn(8, 6, generator=generator) for n in "abcd"}
    cuts = {
        "a": [Replicate(), Replicate()],
        "b": [Shard(0), Replicate()],
        "c": [Replicate(), Shard(1)],
        "d": [Shard(0), Shard(1)],
    }
    tensors = {n: distribute_tensor(t, mesh, cuts[n]) for n, t in whole.items()}
    tensors["plain"] = torch.ones(5)
    state: Any = SimpleNamespace(world=here, step=7, tensors=lambda: tensors)
    replicas.compare(state)
    # each rank has a part of its own here: nothing to compare
    with torch.no_grad():
        tensors["d"].to_local().add_(here.rank)
    replicas.compare(state)
    holders = {"a": [0, 1, 2, 3], "plain": [0, 1, 2, 3]}
    holders["b"] = [r for r in range(4) if r // 2 == odd_one // 2]
    holders["c"] = [r for r in range(4) if r % 2 == odd_one % 2]
    for name, ranks in holders.items():
        tensor = tensors[name]
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        kept = local.clone()
        if here.rank == odd_one:
            local.view(-1)[0] *= 1 + 2**-22
        with pytest.raises(UserError) as caught:
            replicas.compare(state)
        others = ", ".join(str(r) for r in ranks if r != odd_one)
        assert f"step 7: {name} is not the same on rank " in str(caught.value)
        assert f"rank {odd_one}" in str(caught.value) and f"rank {others}" in str(caught.value)
        local.copy_(kept)
    replicas.compare(state)
    world.stop()
    return 0


def test_replicas_are_found_from_placements_whatever_the_mesh(
    tmp_path: Path, rng: random.Random
) -> None:
    """Two dimensions, as with tensor parallelism: norms whole everywhere, matrices cut in one."""
    odd_one = rng.randrange(4)
    print(f"rank {odd_one} drifts")

    code, said = forked(tmp_path, partial(_look, odd_one), 4, "", tmp_path / "out")
    assert code == 0, said
