"""A run's model spread over a cluster that is not there, checked weight by weight.

A configuration and a number of processes in; out, bytes of a process by part, beside those of
`llama.costs`. The model is built on the meta device and parallelised as a run's is, by
`llama.parallel.apply`, in a process group that only pretends: no weight takes memory.
"""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from llama import cli, costs, optim
from llama.cli import UserError, show_bytes
from llama.config import Config
from llama.costs import Layout
from llama.model import Transformer
from llama.parallel import apply, fsdp
from llama.parallel.layout import resolve


def spread(cfg: Config, processes: int) -> str:
    """A table of what the first process holds, which has most, and the last one.

    Raises `UserError` for a layout that cannot work, and, with its name, for a weight of which a
    process holds another shape than the arithmetic has.
    """
    at = resolve(cfg, processes)
    phase, planned = costs.peak(cfg.model, at)
    held = []
    for rank in (0, processes - 1):
        dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
        try:
            held.append(_held(cfg, at, rank))
        finally:
            dist.destroy_process_group()
    rows = []
    for name, size in [*planned.items(), ("together", sum(planned.values()))]:
        found = (show_bytes(h[name]) if name in h else "" for h in held)
        rows.append((name, show_bytes(size), *found))
    header = (f"fullest moment: {phase}", "planned", "rank 0", f"rank {processes - 1}")
    return cli.table(header, rows)


def _held(cfg: Config, at: Layout, rank: int) -> dict[str, int]:
    """Bytes of a process by part; no shape is other than the arithmetic's."""
    with torch.device("meta"):
        model = Transformer(cfg.model, attention="reference")
    # there, unlike on this machine, auto is bfloat16 and collectives can overlap
    wide, p = at.element_bytes == 4, replace(cfg.parallel, async_tensor=False)
    train = replace(cfg.train, dtype="float32" if wide else "bfloat16")
    dtype = torch.float32 if wide else torch.bfloat16
    apply.apply(model, replace(cfg, parallel=p, train=train), fsdp.place(p, "cpu"), dtype)
    _check(model, cfg, at, rank)
    moments = optim.state_tensors(optim.build(model, cfg.optim), model).values()
    return {
        "parameters": sum(_local(p).nbytes for p in model.parameters()),
        "optimizer": sum(_local(moment).nbytes for moment in moments),
    }


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _check(model: nn.Module, cfg: Config, at: Layout, rank: int) -> None:
    block, shapes = costs.shapes(cfg.model, at.tensor)
    for i in range(cfg.model.n_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in block.items()}
    found = {name.removesuffix(".weight"): p for name, p in model.named_parameters()}
    if odd := found.keys() ^ shapes.keys():
        raise UserError(f"{min(odd)} is a weight of the model or of llama.costs, not of both")
    index = rank // at.tensor % at.shards
    for name, (rows, columns) in shapes.items():
        most = math.ceil(rows / at.shards)
        expected = (max(0, min(most, rows - index * most)), columns)
        local = _local(found[name])
        shape = tuple(local.shape) if local.dim() > 1 else (*local.shape, 1)
        if shape != expected or local.dtype != torch.float32:
            raise UserError(
                f"{name} is {shape} in {local.dtype} on rank {rank} of {at.gpus}, "
                f"llama.costs has {expected} in float32"
            )
