"""The model under FSDP2 in gloo processes: the same initial bits, the same logits."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from llama.config import ModelConfig
from llama.model import Transformer

# An odd vocabulary, of several chunks of rows.
CFG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=80, vocab_size=701)
SEED = 5
pytestmark = pytest.mark.slow


def sharded(layout: str, size: int, policy: MixedPrecisionPolicy) -> Transformer:
    """A model made as train.py makes it: on the meta device, sharded, then filled."""
    mesh = init_device_mesh("cpu", (size,))
    if layout == "replicas":
        mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("replicate", "shard"))

    def by_columns(parameter: nn.Parameter) -> Shard | None:
        # FSDP splits columns evenly or not at all
        return Shard(1) if layout == "columns" and parameter.dim() > 1 else None

    with torch.device("meta"):
        model = Transformer(CFG)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=by_columns)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.detach().to_local().fill_(torch.nan)  # type: ignore[attr-defined]
    model.init_weights(SEED)
    return model


def plain(dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(CFG)
    model.init_weights(SEED)
    return model.to(dtype)


def check(rank: int, size: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    tokens = torch.arange(60).view(2, 30) * 11 % 701
    truth_losses, _ = plain()(tokens[:, :-1], tokens[:, 1:])
    for layout in ("rows", "columns", "replicas"):
        model = sharded(layout, size, MixedPrecisionPolicy())
        for (name, p), truth in zip(model.named_parameters(), plain().parameters(), strict=True):
            assert isinstance(p, DTensor)
            assert torch.equal(p.full_tensor(), truth), (layout, name)
        losses, _ = model(tokens[:, :-1], tokens[:, 1:])
        assert torch.equal(losses, truth_losses), layout
    # parameters and activations are cast, RoPE's table is not
    model = sharded("rows", size, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert torch.equal(model(tokens), plain(torch.bfloat16)(tokens))
    dist.destroy_process_group()


def test_shards_hold_the_bits_of_the_whole_model(tmp_path: Path) -> None:
    mp.spawn(check, (2, str(tmp_path / "store")), nprocs=2)
