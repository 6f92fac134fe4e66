"""Every layout trains the model of a single process: losses, gradients, norms, weights.

One start of four gloo processes works through a list of layouts with the real `build` and `step`.
"""

import os
import random
import socket
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
import torch.distributed as dist
import torch.multiprocessing as mp
from made_data import make_source, random_documents
from torch import Tensor
from torch.distributed import _symmetric_memory
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from llama import optim
from llama.config import Config, Count, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from llama.data.writer import Vocabulary
from llama.model import Transformer
from llama.parallel import context, recompute, tensor
from llama.runtime import checkpoint, world

pytestmark = pytest.mark.slow

STEPS, PIECES = 10, 512
FUSED = "fused_all_gather_matmul", "fused_matmul_reduce_scatter", "_c10d_functional.all_gather"
VOCABULARY = Vocabulary("0" * 64, PIECES, 1, 2)
SIZES = ("replicate", "shard", "context", "tensor")
# (replicate, shard, context, tensor), recompute, other options
Case = tuple[tuple[int, int, int, int], str, dict[str, Any]]
CASES: dict[str, Case] = {
    "tensor and shards": ((1, 2, 1, 2), "manual", {}),
    "tensor and replicas": ((2, 1, 1, 2), "selective", {}),
    "context and tensor": ((1, 1, 2, 2), "manual", {"documents": True}),
    "context and shards": ((1, 2, 2, 1), "full", {"documents": True}),
}
MORE: dict[str, Case] = {
    "tensor": ((1, 1, 1, 4), "none", {}),
    "tensor by hand": ((1, 1, 1, 4), "manual", {"documents": True}),
    "tensor, full": ((1, 1, 1, 4), "full", {}),
    "context": ((1, 1, 4, 1), "none", {"documents": True}),
    "context by hand": ((1, 1, 4, 1), "manual", {}),
    "context and tensor, selective": ((1, 1, 2, 2), "selective", {}),
    "context and replicas": ((2, 1, 2, 1), "none", {}),
    "shards": ((1, 4, 1, 1), "manual", {}),
    "shards and replicas": ((2, 2, 1, 1), "none", {"documents": True}),
    "tensor, compiled": ((1, 1, 1, 4), "none", {"compile": True}),
    "tensor and shards, compiled": ((1, 2, 1, 2), "selective", {"compile": True}),
    "context, compiled": ((1, 2, 2, 1), "full", {"compile": True, "documents": True}),
}
EIGHT: dict[str, Case] = {
    "all four": ((1, 2, 2, 2), "manual", {"documents": True}),
    "with replicas": ((2, 1, 2, 2), "selective", {}),
    "many shards": ((2, 2, 1, 2), "none", {}),
    "long sequences": ((1, 1, 4, 2), "full", {"documents": True}),
}


def config(place: Path, case: Case) -> Config:
    sizes, recompute, options = case
    parallel = ParallelConfig(**dict(zip(SIZES, sizes, strict=True)), recompute=recompute)  # type: ignore[arg-type]
    data = DataConfig(
        path=str(place),
        mixture={"web": 0.75, "code": 0.25},
        seq_len=32,
        attend_across_documents=not options.get("documents", False),
        boundary_loss=not options.get("documents", False),
    )
    return Config(
        model=ModelConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, ffn_dim=136),
        data=data,
        train=TrainConfig(
            tokens=Count(512 * STEPS),
            batch_tokens=Count(512),
            micro_batch=2,
            dtype="float32",
            compile=options.get("compile", False),
        ),
        optim=replace(Config().optim, warmup_steps=2, lr=5e-3),
        parallel=parallel,
    )


def whole(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def trained(cfg: Config, here: world.World, place: Path, before: Path | None) -> dict[str, Any]:
    """Losses, norms and validation of some steps, gradients of the first, weights at the end.

    The checkpoint of another layout, `before`, is loaded to begin with, as `loaded`.
    """
    state = train.build(cfg, here, place / cfg.name)
    named = dict(state.model.named_parameters())
    found: dict[str, Any] = {"losses": [], "norms": [], "gradients": {}}
    if before:
        checkpoint.load(checkpoint.newest(before), state.tensors(), here)
        found["loaded"] = {name: whole(x) for name, x in state.tensors().items()}
        state.model.init_weights(cfg.seed)  # type: ignore[operator]
        for name, moment in state.tensors().items():
            if not name.startswith("model."):
                moment.zero_()
    found["initial"] = {name: whole(p) for name, p in named.items()}
    plain_step = optim.step

    def noting(optimizer: Any, **options: Any) -> Any:
        if not found["gradients"]:
            factor = options["grad_factor"]
            grads = {
                name: whole(p.grad) * factor for name, p in named.items() if p.grad is not None
            }
            found["gradients"] = grads
        return plain_step(optimizer, **options)

    train.optim.step = noting  # type: ignore[assignment]
    reader = train.loader.Loader(state.sources, state.order)
    try:
        for step in range(STEPS):
            low = state.place.data_rank * (16 // state.place.data_size)
            high = low + 16 // state.place.data_size
            measured = train.step(state, *reader.batch(step, low, high))
            found["losses"].append(float(measured.loss))
            found["norms"].append(float(measured.grad_norm))
    finally:
        train.optim.step = plain_step
        reader.close()
    never: Any = SimpleNamespace(poll=lambda phase: False, asked="")
    found["valid"] = train.validate(state, never, {})
    found["saved"] = {name: whole(x) for name, x in state.tensors().items()}
    assert train.save(state)
    return found


def work(rank: int, size: int, port: int, place: Path, cases: Mapping[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    here = world.start()
    before = None
    for name, case in cases.items():
        cfg = replace(config(place, case), name=name)
        found = trained(cfg, here, place, before)
        before = place / name
        if here.leads:
            torch.save(found, place / f"{name}.pt")
    world.stop()


def spawn(place: Path, cases: Mapping[str, Any], size: int = 4) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (size, port, place, cases), nprocs=size)
    return {name: torch.load(place / f"{name}.pt") for name in cases}


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def compare(place: Path, cases: Mapping[str, Any], size: int = 4) -> None:
    everything = spawn(place, cases, size)
    here = world.start()
    truths = {}
    for documents in (False, True):
        alone: Case = ((1, 1, 1, 1), "none", {"documents": documents})
        cfg = replace(config(place, alone), name=f"alone{documents}")
        # the last layout's checkpoint, by a single process
        truths[documents] = trained(cfg, here, place, place / list(cases)[-1])
    world.stop()
    saved: dict[str, Tensor] = {}
    for found in (*everything.values(), truths[False]):
        assert found.get("loaded", {}).keys() == saved.keys()
        for key, truth in saved.items():
            assert torch.equal(found["loaded"][key], truth), key
        saved = found["saved"]
    for name, found in everything.items():
        truth = truths[cases[name][2].get("documents", False)]
        for key, weight in found["initial"].items():
            assert torch.equal(weight, truth["initial"][key]), (name, key)
        assert found["losses"] == pytest.approx(truth["losses"], rel=1e-5), name
        assert found["norms"][0] == pytest.approx(truth["norms"][0], rel=1e-5), name
        # by then the weights have drifted, as far as is allowed below
        assert found["norms"] == pytest.approx(truth["norms"], rel=1e-3), name
        assert found["valid"] == pytest.approx(truth["valid"], rel=1e-4), name
        assert found["gradients"].keys() == truth["gradients"].keys(), name
        for key, gradient in found["gradients"].items():
            assert relative(gradient, truth["gradients"][key]) <= 1e-5, (name, key)
        for key, weight in found["saved"].items():
            if key.startswith("model."):
                assert relative(weight, truth["saved"][key]) <= 1e-3, (name, key)


def test_the_compiler_overlaps_what_async_tensor_is_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward pass of a block its gathers and reductions, in the backward pass its gathers:
    what is reduced there is the sum of several products. No other gather is left."""
    found = []

    def look(graph: torch.fx.Graph) -> None:
        targets = [str(node.target) for node in graph.nodes]
        found.append([sum(name in target for target in targets) for name in FUSED])

    # what was compiled before with other shapes would make these symbols
    torch.compiler.reset()
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tensor",))
        with torch.device("meta"):
            model = Transformer(ModelConfig(dim=64, n_layers=1, n_heads=8, vocab_size=64), "sdpa")
        options: Any = {"_micro_pipeline_tp": False, "post_grad_custom_post_pass": look}
        with (
            inductor.patch(force_disable_caches=True, **options),
            torch.library._scoped_library("symm_mem", "IMPL") as operators,
        ):
            for name in FUSED[:2]:
                plain = getattr(_symmetric_memory, f"_{name}_fallback")
                operators.impl(name, plain, "CPU")
            tensor.apply(model, mesh)
            tensor.overlap(mesh)
            model.layers[0].compile()
            model.to_empty(device="cpu")
            model.init_weights(0)
            tokens = torch.zeros(2, 64, dtype=torch.int64)
            model(tokens, tokens)[0].sum().backward()
    finally:
        dist.destroy_process_group()
    assert found == [[2, 2, 0], [2, 0, 0]]


@pytest.mark.parametrize("mode", ["none", "manual", "full"])
def test_keys_and_values_of_others_are_not_kept(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def noted(gathered: Tensor, size: int) -> Tensor:
        made.append(weakref.ref(whole := in_order(gathered, size)))
        assert whole.shape[1] == 4 * 8
        return whole

    in_order = context._in_order
    monkeypatch.setattr(context, "_in_order", noted)
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        model = Transformer(ModelConfig(dim=32, n_layers=3, n_heads=4, vocab_size=64), "sdpa")
        model.init_weights(0)
        context.apply(model, dist.group.WORLD, [mode] * 3)  # type: ignore[arg-type]
        recompute.apply(model, [mode] * 3)
        tokens = torch.zeros(2, 8, dtype=torch.int64)
        losses, _ = model(tokens, tokens)
        assert len(made) == 3 and not any(ref() is not None for ref in made)
        losses.sum().backward()
        # each block gathers once more, for both pieces of queries
        assert len(made) == 6 and not any(ref() is not None for ref in made)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def place(tmp_path: Path, rng: random.Random) -> Path:
    for name, n in {"web": 500, "code": 300}.items():
        documents = random_documents(rng, name, n, pieces=PIECES)
        make_source(tmp_path / name, [documents], VOCABULARY, valid_per_10k=2000)
    return tmp_path


def test_four_processes_train_the_model_of_one(place: Path) -> None:
    compare(place, CASES)


@pytest.mark.full
def test_so_they_do_in_more_layouts(place: Path) -> None:
    compare(place, MORE)


@pytest.mark.full
def test_eight_processes_do_too(place: Path) -> None:
    compare(place, EIGHT, 8)
