"""Replicas: the same bits wherever several processes hold the same part of a tensor.

In: weights and moments, whose placements say who holds what. Out: nothing, or the end of the run
with tensor, ranks and step. Silent drift of norms between processes went unseen for weeks where
nothing compared them (BLOOM's chronicles).
"""

import math
import sys
from collections import defaultdict

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama.cli import UserError
from llama.runtime.state import State

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# 2^64 / golden ratio: consecutive rows get weights that have no pattern in common
SPREAD = 0x9E3779B97F4A7C15 - 2**64


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
    names, places, sums = [], [], []
    for name, tensor in state.tensors().items() if here.size > 1 else ():
        place, holders, local = "", here.size, tensor
        if isinstance(tensor, DTensor):
            mesh, local = tensor.device_mesh, tensor.to_local()
            cut = [dim for dim, p in enumerate(tensor.placements) if not p.is_replicate()]
            # the part that this process holds, the same text wherever it is held
            place = sys.intern(str([(dim, mesh.get_local_rank(dim)) for dim in cut]))
            holders //= math.prod(mesh.size(dim) for dim in cut)
        if holders > 1:
            names.append(name)
            places.append(place)
            sums.append(checksum(local))
    if not sums:
        return
    held: dict[tuple[str, str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, (where, values) in enumerate(here.gather((places, torch.stack(sums).tolist()))):
        for name, place, value in zip(names, where, values, strict=True):
            held[name, place][value].append(rank)
    odd = [(name, ranks) for (name, _), ranks in held.items() if len(ranks) > 1]
    if odd:
        groups = " and ".join(f"rank {', '.join(map(str, rs))}" for rs in odd[0][1].values())
        raise UserError(
            f"step {state.step}: {odd[0][0]} is not the same on {groups}, {len(odd)} tensors "
            "differ: look at those machines, then resume from a checkpoint of the steps before"
        )
