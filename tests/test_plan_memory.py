"""Planned memory: a step of train.py against torch's tracker, on a GPU against its allocator."""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from llama import costs, optim
from llama.config import Bytes, Config, Count, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from llama.costs import Layout
from llama.model import Transformer
from llama.parallel import apply, fsdp
from llama.plan import layouts, published
from llama.runtime.background import Saver
from llama.runtime.guard import Guard


@contextmanager
def first_rank(
    model_cfg: ModelConfig, at: Layout, device: torch.device
) -> Iterator[tuple[Any, ...]]:
    """State, tokens and sources of a step of train.py on rank 0, its processes pretended."""
    world, passes = at.gpus, 1 + 2 * at.accumulates
    dtype: Any = {2: "bfloat16", 4: "float32"}[at.element_bytes]
    windows, ranks = passes * at.micro_batch, at.replicate * at.shard
    cfg = Config(
        model=model_cfg,
        data=DataConfig(seq_len=at.seq_len, attend_across_documents=not at.documents),
        train=TrainConfig(
            batch_tokens=Count(windows * ranks * at.seq_len),
            micro_batch=at.micro_batch,
            dtype=dtype,
            compile=False,
        ),
        parallel=ParallelConfig(
            replicate=at.replicate,
            shard=at.shard,
            tensor=at.tensor,
            context=at.context,
            recompute=at.recompute,  # type: ignore[arg-type]
            budget=Bytes(at.budget) or None,
            reshard=at.reshard,
            prefetch=at.prefetch,
            accumulate=at.accumulate,  # type: ignore[arg-type]
        ),
    )
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        with torch.device("meta"):
            model = Transformer(cfg.model, attention="sdpa")
        place = fsdp.place(cfg.parallel, device.type)
        averaged = apply.apply(model, cfg, place, train.DTYPES[dtype])
        model.to_empty(device=device)
        model.init_weights(0)
        optimizer = optim.build(model, cfg.optim)
        segment = SimpleNamespace(batch_windows=windows * ranks)
        here: Any = SimpleNamespace(device=device, size=world)
        state: Any = SimpleNamespace(
            cfg=cfg,
            world=here,
            model=model,
            optimizer=optimizer,
            steps=100,
            step=0,
            place=place,
            guard=Guard(cfg.guard, here),
            saver=Saver(),
            averaged_over=averaged,
            micro_batch=at.micro_batch,
            window=torch.zeros(1, 2, dtype=torch.float64, device=device),
            eos_id=2,
            order=SimpleNamespace(segment=lambda step: segment),
        )
        tokens = torch.randint(0, model_cfg.vocab_size or 0, (windows, at.seq_len + 1))
        yield [state, tokens.to(device), torch.zeros(windows, dtype=torch.long, device=device)]
    finally:
        dist.destroy_process_group()
        # it knows groups by name, and the next world has others
        _clear_sharding_prop_cache()


def tracked(model_cfg: ModelConfig, at: Layout, monkeypatch: pytest.MonkeyPatch) -> int:
    """Most bytes of a step on a CPU, as torch's tracker counts them."""
    cpu = torch.device("cpu")
    with first_rank(model_cfg, at, cpu) as (state, *batch):
        tracker: Any = MemTracker()
        if isinstance(state.model, FSDPModule):
            tracker = FSDPMemTracker(state.model, state.optimizer)
        else:
            tracker.track_external(state.model, state.optimizer)
        forward = train.forward

        def anew(*args: Any) -> Any:
            # the tracker wants to be told that a model is called a second time
            tracker.reset_mod_stats()
            return forward(*args)

        with monkeypatch.context() as patch, tracker:
            patch.setattr(train, "forward", anew)
            train.step(state, *batch)
        return int(tracker.get_tracker_snapshot("peak")[cpu]["Total"])


def allocated(model_cfg: ModelConfig, at: Layout) -> int:
    """Most bytes of a step on a GPU, as its allocator counts them."""
    gc.collect()  # the one before
    before = torch.cuda.memory_allocated()
    with first_rank(model_cfg, at, torch.device("cuda", 0)) as (state, *batch):
        # the first one leaves behind what is made once
        train.step(state, *batch)
        torch.cuda.reset_peak_memory_stats()
        train.step(state, *batch)
        return torch.cuda.max_memory_allocated() - before


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*layouts.MODES, "budget"])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_memory_is_within_5_percent_of_torchs_tracker(
    mode: str, element_bytes: int, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    for world in (1, 2, 4, 8):
        heads = rng.choice([2, 4, 8])
        model = ModelConfig(
            dim=heads * rng.choice([16, 32, 64]),
            n_layers=rng.randrange(3, 9),
            n_heads=heads,
            n_kv_heads=rng.choice([None, 1, 2]),
            vocab_size=rng.choice([320, 1000, 8000]),
        )
        replicate = rng.choice([1, 2]) if world > 2 else 1
        at = Layout(
            seq_len=rng.choice([64, 256, 1024]),
            micro_batch=rng.choice([1, 2, 3]),
            shard=world // replicate,
            replicate=replicate,
            recompute=mode,
            element_bytes=element_bytes,
            accumulates=rng.random() < 0.5,
            on_gpu=False,
            accumulate=rng.choice(["sharded", "unsharded", "replica_deferred"]),
            reshard=rng.random() < 0.5,
            prefetch=rng.choice([0, 1, 2]),
            documents=rng.random() < 0.5,
        )
        if mode == "budget":
            least, most = (costs.kept(model, replace(at, recompute=m)) for m in ("full", "none"))
            at = replace(at, budget=rng.randrange(least, most))
        phase, parts = costs.peak(model, at)
        planned, real = sum(parts.values()), tracked(model, at, monkeypatch)
        assert abs(planned / real - 1) < 0.05, (model, at, phase, parts, planned / real)


# (replicate, shard, tensor, context)
DIVIDED = [(1, 1, 2, 1), (2, 2, 4, 1), (1, 1, 1, 2), (1, 2, 1, 4), (2, 1, 2, 2), (1, 2, 8, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", layouts.MODES)
def test_memory_of_divided_matrices_and_sequences_is_within_5_percent(
    mode: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    for replicate, shard, tensor, context in DIVIDED:
        model = ModelConfig(
            dim=8 * rng.choice([32, 64]),
            n_layers=rng.randrange(2, 6),
            n_heads=8,
            n_kv_heads=rng.choice([None, 4]) if tensor < 8 else None,
            vocab_size=rng.choice([320, 1000]),
        )
        at = Layout(
            seq_len=rng.choice([128, 256]),
            micro_batch=rng.choice([1, 2]),
            shard=shard,
            replicate=replicate,
            tensor=tensor,
            context=context,
            recompute=mode,
            element_bytes=rng.choice([2, 4]),
            accumulates=rng.random() < 0.5,
            documents=rng.random() < 0.5,
            on_gpu=False,
        )
        planned, real = costs.needed(model, at), tracked(model, at, monkeypatch)
        assert abs(planned / real - 1) < 0.05, (model, at, costs.peak(model, at), planned / real)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("mode", layouts.MODES)
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_memory_is_within_5_percent_of_what_a_gpu_allocates(
    mode: str, element_bytes: int, rng: random.Random
) -> None:
    for replicate, shard, tensor, context in [(1, 1, 1, 1), (1, 8, 1, 1), (2, 64, 1, 1), *DIVIDED]:
        model = ModelConfig(
            dim=2048,
            n_layers=rng.randrange(2, 7),
            n_heads=16,
            n_kv_heads=rng.choice([None, 8]),
            vocab_size=rng.choice([8000, 32000]),
        )
        at = Layout(
            seq_len=rng.choice([1024, 2048]),
            micro_batch=rng.choice([1, 2, 4]),
            shard=shard,
            replicate=replicate,
            tensor=tensor,
            context=context,
            recompute=mode,
            element_bytes=element_bytes,
            accumulates=rng.random() < 0.5,
            accumulate=rng.choice(["sharded", "unsharded", "replica_deferred"]),
            reshard=rng.random() < 0.5,
            prefetch=rng.choice([1, 2]),
        )
        planned, real = costs.needed(model, at), allocated(model, at)
        assert abs(planned / real - 1) < 0.05, (model, at, costs.peak(model, at), planned / real)


def test_memory_grows_with_what_it_should(rng: random.Random) -> None:
    model = published.model("LLaMA-7B")

    def total(**changes: Any) -> int:
        at = Layout(2048, 2, shard=64, accumulates=True)
        return sum(costs.peak(model, replace(at, **changes))[1].values())

    modes = [total(recompute=mode) for mode in ("full", "manual", "selective", "none")]
    assert modes == sorted(modes)
    assert total(shard=128) < total() < total(micro_batch=3) < total(shard=8)
    assert total(shard=32, tensor=2) < total()
    assert total(accumulates=False) < total()
