"""Context parallelism: each sequence divided over processes, which exchange keys and values.

Of 2c equal pieces process r of c holds the r-th from the front and the r-th from the back: the
causal mask then leaves everyone the same work (Llama 3, §3.3.2). Before attention the pieces of
keys and values are gathered, and each of the two own pieces of queries attends to all up to itself.
Rotations and document ids go with the pieces; targets are taken apart as tokens are.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.attention import attention, document_mask
from llama.parallel.tensor import Gather


def part(whole: Tensor, rank: int, size: int) -> Tensor:
    """This process's two pieces of (B, T, ...), along T."""
    pieces = whole.chunk(2 * size, dim=1)
    return torch.cat((pieces[rank], pieces[2 * size - 1 - rank]), dim=1)


def order(size: int) -> list[int]:
    """Where piece i of a sequence lies among the pieces of all processes one after the other."""
    return [2 * i if i < size else 2 * (2 * size - 1 - i) + 1 for i in range(2 * size)]


def apply(model: Any, group: dist.ProcessGroup) -> None:
    """Let a model take `part` of each sequence, with `doc_ids` of the whole, in place."""
    rank, size = group.rank(), group.size()
    ends = rank + 1, 2 * size - rank
    backend: str = model.attention

    def documents(doc_ids: Tensor, T: int) -> tuple[Tensor, ...]:
        return tuple(document_mask(doc_ids[:, : end * T // 2], T // 2, backend) for end in ends)

    rotations = model.rotations

    def own_rotations(positions: int, device: torch.device) -> Tensor:
        table: Tensor = rotations(positions * size, device)
        return part(table.unsqueeze(0), rank, size).squeeze(0)

    model.documents, model.rotations = documents, own_rotations
    for block in model.layers:
        block.attention.attend = partial(_attend, group, backend, ends)


def _attend(
    group: dist.ProcessGroup, backend: str, ends: tuple[int, int],
    q: Tensor, k: Tensor, v: Tensor, docs: tuple[Tensor, ...] | None,
) -> Tensor:  # fmt: skip
    """Attention of this process's (B, T, H, D) queries to the keys and values of all."""
    size, T = group.size(), q.shape[1]
    pieces = Gather.apply(group, torch.cat((k, v), dim=2)).chunk(2 * size, dim=1)
    pieces = [pieces[place] for place in order(size)]
    out = []
    for end, queries, seen in zip(ends, q.chunk(2, dim=1), docs or (None, None), strict=True):
        keys, values = torch.cat(pieces[:end], dim=1).chunk(2, dim=2)
        assert keys.shape[1] == end * T // 2
        out.append(attention(queries, keys, values, seen, backend))
    return torch.cat(out, dim=1)
