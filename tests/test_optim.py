"""AdamW, clipping and schedules: against torch's own, at the boundaries, and with bad numbers."""

import copy
import math
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llama import optim
from llama.config import ModelConfig, OptimConfig
from llama.model import Transformer

CFG = OptimConfig(lr=0.01, warmup_steps=5, weight_decay=0.1, clip=1.0)


@pytest.fixture(autouse=True)
def seeded(rng: random.Random) -> None:
    torch.manual_seed(rng.randrange(2**31))


class Small(nn.Module):
    """Matrices, an embedding, a vector: everything that is grouped differently."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 7, bias=False)
        self.gain = nn.Parameter(torch.ones(7))
        # fewer rows than processes: the last one holds an empty shard
        self.out = nn.Linear(7, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.linear(self.embedding(tokens))) * self.gain)


def set_gradients(model: nn.Module, step: int, magnitude: float) -> None:
    for i, p in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        p.grad = magnitude * torch.randn(p.shape, generator=generator)


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors |= {n: t.clone() for n, t in optim.state_tensors(optimizer, model).items()}
    steps = {f"step.{i}": s["step"].clone() for i, s in enumerate(optimizer.state.values())}
    return tensors | steps


# magnitudes below and above the clipping norm; the factor corrects the number of valid tokens
@pytest.mark.parametrize("magnitude", [0.01, 3.0])
@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_step_equals_torch_with_clipping(magnitude: float, factor: float) -> None:
    model = Small()
    twin = copy.deepcopy(model)
    optimizer = optim.build(model, CFG)
    decayed = [p for p in twin.parameters() if p.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [twin.gain], "weight_decay": 0.0},
    ]
    truth = torch.optim.AdamW(groups, lr=1.0, betas=CFG.betas, eps=CFG.eps)
    for step in range(6):
        lr = optim.learning_rate(CFG, step, 6)
        set_gradients(model, step, magnitude)
        set_gradients(twin, step, magnitude * factor)
        norm, found_inf = optim.step(
            optimizer, lr, CFG.clip, grad_factor=torch.tensor(factor), loss=torch.tensor(1.0)
        )
        true_norm = nn.utils.clip_grad_norm_(twin.parameters(), CFG.clip)
        for group in truth.param_groups:
            group["lr"] = lr
        truth.step()
        torch.testing.assert_close(norm, true_norm, rtol=1e-6, atol=0)
        assert found_inf == 0
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert optim.step_count(optimizer) == 6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["first gradient", "last gradient", "loss", "factor"])
def test_a_bad_number_changes_no_bit(bad: float, where: str) -> None:
    model = Small()
    optimizer = optim.build(model, CFG)
    set_gradients(model, 0, 1.0)
    optim.step(optimizer, 0.01, 1.0)
    before = bits(model, optimizer)
    set_gradients(model, 1, 1.0)
    p = list(model.parameters())[-1 if where == "last gradient" else 0]
    assert p.grad is not None
    if where.endswith("gradient"):
        p.grad.view(-1)[-1] = bad
    loss = torch.tensor(bad if where == "loss" else 2.0)
    factor = bad if where == "factor" else 1.0
    _, found_inf = optim.step(optimizer, 0.01, 1.0, torch.tensor(factor), loss)
    assert found_inf == 1
    for name, tensor in bits(model, optimizer).items():
        assert torch.equal(tensor, before[name]), name
    # and the next good step goes on from there, as if the bad one had not been
    set_gradients(model, 2, 1.0)
    optim.step(optimizer, 0.01, 1.0)
    assert optim.step_count(optimizer) == 2
    assert not torch.equal(model.linear.weight, before["linear.weight"])


def test_what_decays() -> None:
    model = Small()
    nn.init.constant_(model.gain, 2.0)
    optimizer = optim.build(model, CFG)
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optim.step(optimizer, lr=0.5, clip=1.0)
    assert torch.equal(model.gain, before.gain)
    for name in ("embedding", "linear", "out"):
        old, new = getattr(before, name).weight, getattr(model, name).weight
        torch.testing.assert_close(new, old * (1 - 0.5 * 0.1))


def test_state_survives_a_save_and_a_load() -> None:
    model = Small()
    optimizer = optim.build(model, CFG)
    assert not any(t.any() for t in optim.state_tensors(optimizer, model).values())
    for step in range(3):
        set_gradients(model, step, 1.0)
        optim.step(optimizer, 0.01, 1.0)
    other = copy.deepcopy(model)
    loaded = optim.build(other, CFG)
    saved = optim.state_tensors(optimizer, model)
    assert set(saved) == {
        f"{moment}.{name}"
        for moment in ("exp_avg", "exp_avg_sq")
        for name, _ in model.named_parameters()
    }
    for name, tensor in optim.state_tensors(loaded, other).items():
        tensor.copy_(saved[name])
    optim.set_step_count(loaded, optim.step_count(optimizer))
    for m, o in ((model, optimizer), (other, loaded)):
        set_gradients(m, 3, 1.0)
        optim.step(o, 0.01, 1.0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def train_small(model: nn.Module, tokens: Tensor) -> tuple[list[Tensor], torch.optim.Optimizer]:
    optimizer = optim.build(model, CFG)
    norms = []
    for step in range(4):
        # bad numbers begin on one process
        bad = step == 2 and (not dist.is_initialized() or dist.get_rank() == 0)
        (model(tokens) * (math.nan if bad else 10)).square().mean().backward()
        norm, found_inf = optim.step(optimizer, 0.01, 1.0)
        assert found_inf == (step == 2)
        norms.append(norm)
        optimizer.zero_grad()
    return norms, optimizer


def check(rank: int, size: int, path: str) -> None:
    torch.set_num_threads(1)
    tokens = torch.arange(11)
    torch.manual_seed(0)
    whole = Small()
    start = copy.deepcopy(whole.state_dict())
    norms, optimizer = train_small(whole, tokens)
    moments = optim.state_tensors(optimizer, whole)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    for shape in ((size,), (1, size), (size, 1)):
        model = Small()
        model.load_state_dict(start)
        names = ("replicate", "shard")[-len(shape) :]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        # a unit within a unit: two kinds of gradients in one norm
        fully_shard(model.linear, mesh=mesh)
        fully_shard(model, mesh=mesh)
        sharded_norms, sharded_optimizer = train_small(model, tokens)
        torch.testing.assert_close(sharded_norms, norms, rtol=1e-6, atol=1e-6, equal_nan=True)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert isinstance(p, DTensor)
            torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-6, atol=1e-6)
        for name, tensor in optim.state_tensors(sharded_optimizer, model).items():
            assert isinstance(tensor, DTensor)
            torch.testing.assert_close(tensor.full_tensor(), moments[name], rtol=1e-5, atol=1e-7)
        assert optim.step_count(sharded_optimizer) == 3
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_train_like_the_whole_model(tmp_path: Path) -> None:
    mp.spawn(check, (2, str(tmp_path / "store")), nprocs=2)


def test_a_replica_counts_once(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1))
        grad = torch.randn(4, 3)
        by_rows, by_columns, whole = (
            dist.tensor.distribute_tensor(grad, mesh, placements)
            for placements in (
                [dist.tensor.Shard(0), dist.tensor.Replicate()],
                [dist.tensor.Shard(0), dist.tensor.Shard(1)],
                [dist.tensor.Replicate(), dist.tensor.Replicate()],
            )
        )
        norm = optim.global_norm([by_rows, by_columns, whole, grad])
        torch.testing.assert_close(norm, 2 * grad.norm())
        partial = DTensor.from_local(grad, mesh, [dist.tensor.Partial(), dist.tensor.Replicate()])
        with pytest.raises(AssertionError, match="not yet reduced"):
            optim.global_norm([partial])
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_step_never_waits_for_the_gpu() -> None:
    model = Transformer(ModelConfig(dim=64, n_layers=2, n_heads=4, vocab_size=500)).cuda()
    model.init_weights(0)
    optimizer = optim.build(model, CFG)
    tokens = torch.randint(0, 500, (2, 33), device="cuda")
    for mode in ("default", "error"):
        # the first step makes RoPE's table
        torch.cuda.set_sync_debug_mode(mode)
        losses, counts = model(tokens[:, :-1], tokens[:, 1:])
        losses.sum().backward()
        optim.step(optimizer, 0.01, 1.0, 64 / counts.sum(), losses.sum().detach())
        optimizer.zero_grad()
    torch.cuda.set_sync_debug_mode("default")
    assert optim.step_count(optimizer) == 2


def schedule(**changes: object) -> list[float]:
    cfg = OptimConfig(lr=0.003, warmup_steps=20, min_lr_ratio=0.1)
    for key, value in changes.items():
        setattr(cfg, key, value)
    return [optim.learning_rate(cfg, step, 200) for step in range(200)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_schedules_at_their_boundaries(name: str) -> None:
    rates = schedule(schedule=name)
    assert rates[0] == 0.003 / 20
    assert rates[19] == 0.003 == max(rates)
    assert rates[199] == 0.003 * 0.1
    steps = zip(rates, rates[1:], strict=False)
    assert all((b > a) if i < 19 else (b <= a) for i, (a, b) in enumerate(steps))
    # no jump: nowhere more than a cosine over the decay's steps is steep
    longest = max(abs(b - a) for a, b in zip(rates[19:], rates[20:], strict=False))
    assert longest <= 1.02 * math.pi / 2 * 0.0027 / (20 if name == "wsd" else 180)


def test_schedules_in_the_middle() -> None:
    # half-way down the 180 steps that follow the warm-up
    middle = 0.003 * (0.1 + 0.9 / 2)
    assert schedule(schedule="cosine")[109] == pytest.approx(middle, rel=1e-12)
    assert schedule(schedule="linear")[109] == pytest.approx(middle, rel=1e-12)
    wsd = schedule(schedule="wsd", decay_ratio=0.2)
    assert set(wsd[19:160]) == {0.003}
    assert wsd[179] == pytest.approx(middle, rel=1e-12)


def test_schedules_of_odd_lengths() -> None:
    # warm-up longer than the run, none at all, a run of one step
    assert schedule(warmup_steps=1000)[199] == pytest.approx(0.003 * 0.2)
    none = schedule(warmup_steps=0)
    assert none[0] < 0.003 and none[0] == pytest.approx(0.003, rel=1e-3)
    for name in ("cosine", "linear", "wsd"):
        cfg = OptimConfig(schedule=name, lr=1.0, warmup_steps=0, min_lr_ratio=0.1)  # type: ignore[arg-type]
        assert optim.learning_rate(cfg, 0, 1) == 0.1
        cfg.warmup_steps = 1
        assert optim.learning_rate(cfg, 0, 1) == 1.0
