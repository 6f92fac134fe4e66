"""Replicas: the same bits wherever several processes hold the same part of a tensor.

In: weights and moments, whose placements say who holds what. Out: nothing, or the end of the run
with tensor, ranks and step. Silent drift of norms between processes went unseen for weeks where
nothing compared them (BLOOM's chronicles).
"""

import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama.cli import UserError
from llama.runtime.state import State

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# 2^64 / golden ratio: consecutive rows get weights that have no pattern in common
SPREAD = 0x9E3779B97F4A7C15 - 2**64

Part = tuple[tuple[str, int], ...]


def part(tensor: Tensor, world_size: int) -> tuple[Part, int]:
    """Which part of a tensor this process holds, and how many processes share each part."""
    if not isinstance(tensor, DTensor):
        return (), world_size
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "a process outside the mesh of its own tensor"
    names = mesh.mesh_dim_names or tuple(map(str, range(mesh.ndim)))
    cut = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    parts = math.prod(mesh.size(dim) for dim in cut)
    return tuple((names[dim], coordinate[dim]) for dim in cut), world_size // parts


def checksum(tensor: Tensor) -> Tensor:
    """64 bits of a tensor's bits: the sum of its rows', each times an odd number of its own.

    One changed element always shows; so do others, unless they cancel out within a row. One pass,
    and no copy of the tensor.
    """
    bits = tensor.view(INTEGERS[tensor.element_size()])
    rows = bits.flatten(1).sum(1, dtype=torch.int64) if bits.dim() > 1 else bits.long()
    weights = torch.arange(1, len(rows) + 1, device=rows.device) * SPREAD
    return (rows * (weights ^ (weights >> 31) | 1)).sum()


@torch.no_grad()
def compare(state: State) -> None:
    """Raise `UserError` on every rank where processes hold other bits of what they share."""
    here = state.world
    # by the dimensions that cut a tensor: every process lists the same names in the same order
    names: dict[tuple[str, ...], list[str]] = defaultdict(list)
    sums: dict[Part, list[Tensor]] = defaultdict(list)
    for name, tensor in state.tensors().items() if here.size > 1 else ():
        place, holders = part(tensor, here.size)
        if holders > 1:
            names[tuple(dim for dim, _ in place)].append(name)
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            sums[place].append(checksum(local))
    if not sums:
        return
    mine = {place: torch.stack(values).tolist() for place, values in sums.items()}
    held: dict[tuple[str, Part], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, entries in enumerate(here.gather(mine)):
        for place, values in entries.items():
            for name, value in zip(names[tuple(dim for dim, _ in place)], values, strict=True):
                held[name, place][value].append(rank)
    odd = {name: ranks for (name, _), ranks in held.items() if len(ranks) > 1}
    if odd:
        name, ranks = next(iter(odd.items()))
        *others, most = sorted(ranks.values(), key=len)
        raise UserError(
            f"step {state.step}: {name} on rank {', '.join(str(r) for rs in others for r in rs)} "
            f"is not what rank {', '.join(map(str, most))} holds ({len(odd)} tensors differ): look "
            "at those machines, then resume from a checkpoint of the steps before"
        )
