"""FSDP2 as it is tuned, in gloo processes: what is reduced when, what is gathered ahead, and that
gradients are those of one process whatever is chosen."""

import random
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from llama.config import ModelConfig, ParallelConfig
from llama.model import Transformer
from llama.parallel import fsdp

CFG = ModelConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=80, vocab_size=131)
UNITS = CFG.n_layers + 1
MICRO_BATCHES, WINDOWS, T = 3, 2, 16
# accumulate, reshard, prefetch, whether there are replicas
CHOICES: list[tuple[Any, bool, int, bool]] = [
    ("sharded", True, 1, False),
    ("sharded", True, 2, False),
    ("sharded", False, 1, True),
    ("unsharded", True, 2, True),
    ("unsharded", False, 1, False),
    ("replica_deferred", True, 1, False),
    ("replica_deferred", True, 2, True),
    ("replica_deferred", False, 1, True),
]
NAMES = {
    "_allgather_base_": "gather",
    "_reduce_scatter_base_": "reduce",
    "allreduce_": "all-reduce",
}


class Recorded(TorchDispatchMode):
    """Notes every collective when it is asked for."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.log.append(NAMES[func._opname])
        return func(*args, **(kwargs or {}))


def batches(seed: int, size: int) -> torch.Tensor:
    """Token windows (rank, micro-batch, window, T + 1)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size, MICRO_BATCHES, WINDOWS, T + 1)
    return torch.randint(0, CFG.vocab_size or 0, shape, generator=generator)


def model() -> Transformer:
    with torch.device("meta"):
        return Transformer(CFG)


def backward(of: torch.nn.Module, windows: torch.Tensor, factor: float) -> None:
    losses, _ = of(windows[:, :-1], windows[:, 1:])
    (losses.sum() * factor).backward()


def in_a_process(rank: int, size: int, path: str, seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=size)
    data = batches(seed, size)
    log: list[str] = []
    found = []
    for accumulate, reshard, prefetch, replicas in CHOICES:
        cfg = ParallelConfig(
            replicate=2 if replicas else 1, reshard=reshard, prefetch=prefetch,
            accumulate=accumulate,
        )  # fmt: skip
        sharded = model()
        fsdp.apply(sharded, fsdp.place(cfg, "cpu").weights, torch.float32, cfg)
        sharded.to_empty(device="cpu")
        sharded.init_weights(seed)
        for i, block in enumerate(sharded.layers):
            inner = block.feed_forward
            inner.register_forward_pre_hook(lambda *_, i=i: log.append(f"forward {i}"))
            inner.register_full_backward_pre_hook(lambda *_, i=i: log.append(f"backward {i}"))
        log.clear()
        for n in range(MICRO_BATCHES):
            fsdp.prepare(sharded, cfg, last=n == MICRO_BATCHES - 1)
            with Recorded(log):
                backward(sharded, data[rank, n], size / data[..., 1:].numel())
        order = list(log)
        gradients = {
            name: p.grad.full_tensor()  # type: ignore[union-attr]
            for name, p in sharded.named_parameters()
        }
        # as in a validation: nothing stays gathered, or a checkpoint would hold it twice
        with torch.no_grad():
            sharded(data[rank, 0])
        fsdp.reshard(sharded)
        local = sum(p.to_local().numel() for p in sharded.parameters())  # type: ignore[attr-defined]
        warned = list(fsdp.without_effect(sharded, cfg, MICRO_BATCHES))
        found.append((order, gradients, local, warned))
    if rank == 0:
        torch.save(found, f"{path}/found")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What every choice did in four processes, and the gradients of one."""
    place, seed = tmp_path_factory.mktemp("fsdp"), random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    mp.spawn(in_a_process, (4, str(place), seed), nprocs=4)
    alone = model().to_empty(device="cpu")
    alone.init_weights(seed)
    data = batches(seed, 4)
    for windows in data.flatten(0, 1):
        backward(alone, windows, 1 / data[..., 1:].numel())
    truth = {name: p.grad for name, p in alone.named_parameters()}
    found = torch.load(f"{place}/found", weights_only=False)
    return {"truth": truth, **dict(zip(CHOICES, found, strict=True))}


@pytest.mark.slow
def test_gradients_are_those_of_one_process(runs: dict[Any, Any]) -> None:
    for choice in CHOICES:
        for name, gradient in runs[choice][1].items():
            truth = runs["truth"][name]
            off = (gradient - truth).norm() / truth.norm()
            assert off < 1e-5, (choice, name, off)


@pytest.mark.slow
def test_collectives_of_a_step(runs: dict[Any, Any]) -> None:
    for accumulate, reshard, prefetch, replicas in CHOICES:
        counts = Counter(runs[accumulate, reshard, prefetch, replicas][0])
        # the root is gathered once a micro-batch, a block in both directions
        gathers = MICRO_BATCHES * (2 * CFG.n_layers + 1) if reshard else UNITS
        reductions = UNITS * (1 if accumulate == "unsharded" else MICRO_BATCHES)
        over_replicas = UNITS * (MICRO_BATCHES if accumulate == "sharded" else 1)
        expected = {"gather": gathers, "reduce": reductions, "all-reduce": replicas * over_replicas}
        assert {name: counts[name] for name in expected} == expected, (accumulate, reshard)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefetch", "ahead"),
    [
        # the root and the first block, then each before the one ahead of it computes
        (1, "gather gather gather forward 0, gather forward 1, forward 2"),
        (2, "gather gather gather gather forward 0, forward 1, forward 2"),
    ],
)
def test_blocks_are_gathered_before_they_are_needed(
    runs: dict[Any, Any], prefetch: int, ahead: str
) -> None:
    behind = {
        # the last block's weights and those before it; reductions before the next block computes
        1: "gather gather backward 2, reduce gather backward 1, reduce backward 0, reduce reduce",
        2: "gather gather gather backward 2, reduce backward 1, reduce backward 0, reduce reduce",
    }[prefetch]
    order = runs["sharded", True, prefetch, False][0]
    expected = " ".join(f"{ahead} {behind}".replace(",", "").split())
    assert " ".join(order[: len(order) // MICRO_BATCHES]) == expected
    assert order == order[: len(order) // MICRO_BATCHES] * MICRO_BATCHES


@pytest.mark.slow
def test_nothing_stays_gathered_after_a_forward_pass_alone(runs: dict[Any, Any]) -> None:
    held = {choice: runs[choice][2] for choice in CHOICES}
    parameters = sum(p.numel() for p in model().parameters())
    for (*_, replicas), local in held.items():
        # rows are divided rounded up
        assert (
            parameters / (2 if replicas else 4) <= local < 1.1 * parameters / (2, 4)[not replicas]
        )


@pytest.mark.slow
def test_what_has_no_effect_is_said(runs: dict[Any, Any]) -> None:
    said = "parallel.accumulate replica_deferred has no effect: it needs several micro-batches, "
    for choice in CHOICES:
        useless = choice[0] == "replica_deferred" and not choice[3]
        assert runs[choice][3] == [said + "replicas"] * useless


def test_what_has_no_effect_in_one_process() -> None:
    cfg = ParallelConfig(reshard=False, prefetch=2, accumulate="unsharded")
    assert list(fsdp.without_effect(model(), ParallelConfig(), 1)) == []
    assert [sentence.split(": ")[0] for sentence in fsdp.without_effect(model(), cfg, 2)] == [
        "parallel.accumulate unsharded has no effect",
        "parallel.reshard False has no effect",
        "parallel.prefetch 2 has no effect",
    ]
