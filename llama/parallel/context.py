"""Context parallelism: each sequence divided over processes, which exchange keys and values.

Of 2c equal pieces process r of c holds the r-th from the front and the r-th from the back: the
causal mask then leaves everyone the same work (Llama 3, §3.3.2). Before attention the pieces of
keys and values are gathered, and each of the two own pieces of queries attends to all up to itself.
Rotations and document ids go with the pieces; targets are taken apart as tokens are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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


def apply(model: Any, group: dist.ProcessGroup, modes: Sequence[str]) -> None:
    """Let a model take `part` of each sequence, with `doc_ids` of the whole, in place.

    What was gathered is not kept: it is gathered again, by those `modes` of recompute that do not
    compute all of attention again anyway.
    """
    rank, size = group.rank(), group.size()
    ends = rank + 1, 2 * size - rank
    backend: str = model.attention

    def documents(ids: Tensor, T: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(document_mask(ids[:, : n * T // 2], T // 2, backend, dtype) for n in ends)

    rotations = model.rotations

    def own_rotations(positions: int, device: torch.device) -> Tensor:
        table: Tensor = rotations(positions * size, device)
        return part(table.unsqueeze(0), rank, size).squeeze(0)

    model.documents, model.rotations = documents, own_rotations
    for block, mode in zip(model.layers, modes, strict=True):
        again = mode in ("none", "manual")
        attend = torch.compiler.disable(_attend) if again else _attend
        block.attention.attend = partial(attend, group, backend, ends, again)


def _attend(
    group: dist.ProcessGroup, backend: str, ends: tuple[int, int], again: bool,
    q: Tensor, k: Tensor, v: Tensor, docs: tuple[Tensor, ...] | None,
) -> Tensor:  # fmt: skip
    """Attention of this process's (B, T, H, D) queries to the keys and values of all."""
    own, T, K = torch.cat((k, v), dim=2), q.shape[1], k.shape[2]
    whole, out = _in_order(Gather.apply(group, own), group.size()), []
    with _made_again(whole, own.detach(), group) if again else nullcontext():
        for end, queries, seen in zip(ends, q.chunk(2, dim=1), docs or (None, None), strict=True):
            before = whole[:, : end * T // 2]
            out.append(attention(queries, before[:, :, :K], before[:, :, K:], seen, backend))
    return torch.cat(out, dim=1)


def _in_order(gathered: Tensor, size: int) -> Tensor:
    """Sequences from the pieces of all processes, one process after the other."""
    pieces = gathered.chunk(2 * size, dim=1)
    return torch.cat((*pieces[0::2], *reversed(pieces[1::2])), dim=1)


@contextmanager
def _made_again(whole: Tensor, own: Tensor, group: dist.ProcessGroup) -> Iterator[None]:
    """Autograd keeps no view of `whole`: the backward pass gathers it again, once for all views."""
    storage, views = whole.untyped_storage().data_ptr(), 0
    made: list[Tensor] = []

    def pack(x: Tensor) -> Any:
        nonlocal views
        if x.untyped_storage().data_ptr() != storage:
            return x
        views += 1
        return x.shape, x.stride(), x.storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if not made:
            made.extend([_in_order(Gather.apply(group, own), group.size())] * views)
        return made.pop().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
