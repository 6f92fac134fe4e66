"""Out of memory in one sentence: phase, layer and rank, planned against peak, and what would fit.

`with explained("step 3", cfg, here, state):` turns the allocator's error into `OutOfMemory`. The
arithmetic is that of `llama.costs`; what it misses (the CUDA context, fragmentation, Python) is
taken as a constant, so that a change is offered only where it leaves room for that too.
"""

import itertools
import os
import re
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from llama import costs
from llama.cli import UserError, show_bytes
from llama.config import Config, ModelConfig
from llama.costs import Layout
from llama.parallel.layout import resolve, with_micro_batch
from llama.runtime.state import State
from llama.runtime.world import World, peak_bytes

# What torch, cuBLAS, CUDA and the C++ library say when an allocation fails.
ALLOCATORS = re.compile(
    "can't allocate memory|CUDA out of memory|CUDA error: out of memory|ALLOC_FAILED|bad_alloc"
)
SIZES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
ROOM = 0.95  # share of the memory that a change may fill and still be called fitting
MOST_PROCESSES = 4096


class OutOfMemory(UserError):
    """Memory ran out; any rank may be the only one to know, so each tells it itself."""


@contextmanager
def explained(phase: str, cfg: Config, here: World, state: State | None = None) -> Iterator[None]:
    """Raise `OutOfMemory` for any failed allocation of the block; other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not ALLOCATORS.search(str(error)):
            raise
        raise OutOfMemory(sentence(error, phase, cfg, here, state)) from error


def sentence(
    error: BaseException, phase: str, cfg: Config, here: World, state: State | None
) -> str:
    """Where memory ran out, the plan, the peak, and the changes that would fit."""
    peak, there = peak_bytes(here.device), available(here.device)
    match = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB|TiB)", str(error))
    asked = int(float(match[1]) * SIZES[match[2]]) if match else 0
    used = f"peak {show_bytes(peak)}"
    used += f" and {show_bytes(asked)} more asked for" if asked else ""
    text = f"out of memory in {where(error, phase, state)} on rank {here.rank} ({here.device}): "
    if not cfg.model.vocab_size:
        return f"{text}{used}, of {show_bytes(there)}"
    at = layout_of(cfg, here, state)
    planned = costs.needed(cfg.model, at)
    _, parts = costs.peak(cfg.model, at)
    holds = ", ".join(f"{name} {show_bytes(n)}" for name, n in parts.items() if n)
    found = changes(cfg.model, at, max(planned, peak + asked, there), there, here.device)
    offers = " or ".join(f"{option} ({show_bytes(n)})" for option, n in found)
    nothing = "no smaller micro-batch, recompute or sharding would fit: take a smaller model.dim"
    return (
        f"{text}planned {show_bytes(planned)} ({holds}), {used}, of {show_bytes(there)}"
        f"{_waste(here.device)}; {offers + ' would fit' if offers else nothing}"
    )


def where(error: BaseException, phase: str, state: State | None) -> str:
    """The phase, the part of a step, and the module: from the frames that raised."""
    names = {id(m): n for n, m in state.model.named_modules()} if state else {}
    layer, part = "", ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            layer, part = names[id(owner)], part or "forward pass"
        elif frame.f_code.co_name == "_engine_run_backward":
            part = "backward pass"
        elif file.parent.name == "optim" or file.name == "optim.py":
            part = "optimizer"
    if part == "backward pass" and not layer and state:
        # it has come to the last block with a weight that has no gradient; none is left to see
        # where gradients are there of an earlier micro-batch
        waiting = [name for name, p in state.model.named_parameters() if p.grad is None]
        layer = re.sub(r"^(layers\.\d+|\w+).*", r"\1", waiting[-1]) if waiting else ""
    return f"{phase}{', ' + part if part else ''}{' of ' + layer if layer else ''}"


def layout_of(cfg: Config, here: World, state: State | None) -> Layout:
    """What decides the bytes of a process; while it is built there are no activations yet."""
    at = resolve(cfg, here.size, here.device.type == "cuda")
    return with_micro_batch(cfg, at, state.micro_batch if state else 0)


def available(device: torch.device) -> int:
    """Bytes that this process could hold: what others leave of a GPU, the least limit of a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits.append(resource.getrlimit(resource.RLIMIT_AS)[0])
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup", name)
        text = path.read_text().strip() if path.is_file() else ""
        limits.append(int(text) if text.isdigit() else -1)
    return min(limit for limit in limits if limit > 0)


def _waste(device: torch.device) -> str:
    """Memory the allocator holds in pieces that are too small."""
    if device.type != "cuda":
        return ""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if unused < 0.1 * torch.cuda.mem_get_info(device)[1]:
        return ""
    setting = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    return f", {show_bytes(unused)} of them in unused pieces ({setting} joins them)"


def changes(
    model: ModelConfig, at: Layout, need: int, there: int, device: torch.device
) -> list[tuple[str, int]]:
    """(options, bytes needed then) of changes that bring a process from `need` below what is there.

    Each by itself where it suffices, else together; never a larger change than it takes.
    """
    micros = [at.micro_batch >> n for n in range(at.micro_batch.bit_length())] or [0]
    # processes on one machine share its memory, however it is cut
    most = MOST_PROCESSES if device.type == "cuda" else at.shard
    shards = [at.shard << n for n in range((most // at.shard).bit_length())] or [at.shard]
    planned, found = costs.needed(model, at), dict[tuple[str, ...], tuple[str, int]]()
    for shard, recompute, micro in itertools.product(shards, (at.recompute, "full"), micros):
        change = replace(at, shard=shard, recompute=recompute, micro_batch=micro)
        options = {
            "micro_batch": f"--train.micro_batch {micro}",
            "recompute": "--parallel.recompute full",
            "shard": f"{shard} processes with --parallel.shard {shard}",
        }
        changed = tuple(key for key in options if getattr(at, key) != getattr(change, key))
        size = need - planned + costs.needed(model, change)
        if size <= ROOM * there:
            found.setdefault(changed, (" with ".join(options[key] for key in changed), size))
    return [found[changed] for changed in found if len(changed) == 1] or list(found.values())[:1]
