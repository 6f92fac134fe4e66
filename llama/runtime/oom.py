"""Out of memory in one sentence: phase, layer and rank, planned against peak, and what would fit.

`with explained("step 3", cfg, here, state):` turns the allocator's error into `OutOfMemory`. The
arithmetic is that of `llama.costs`; what it misses (the CUDA context, fragmentation, Python) is
taken as a constant, so that a change is offered only where it leaves room for that too.
"""

import os
import re
import resource
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from llama import costs
from llama.cli import UserError, show_bytes
from llama.config import Config, ModelConfig
from llama.parallel import fsdp
from llama.runtime.state import State
from llama.runtime.world import World

# What torch, cuBLAS, CUDA and the C++ library say when an allocation fails.
ALLOCATORS = re.compile(
    "can't allocate memory|CUDA out of memory|CUDA error: out of memory|ALLOC_FAILED|bad_alloc"
)
ROOM = 0.95  # share of the memory that a change may fill and still be called fitting
MOST_PROCESSES = 4096


class OutOfMemory(UserError):
    """Memory ran out; any rank may be the only one to know, so each tells it itself."""


@dataclass(frozen=True)
class Plan:
    """What decides the bytes of a process; `shard` processes hold one copy of the states."""

    model: ModelConfig
    tokens: int
    micro_batch: int
    element_bytes: int
    recompute: bool
    shard: int
    gathers: bool

    def states(self) -> int:
        """Weights, gradients and both moments of AdamW in float32."""
        return 16 * costs.parameters(self.model) // self.shard

    def activations(self) -> int:
        """What the backward pass waits for, and with recompute one block of it at a time."""
        per_token = costs.activation_bytes_per_token(self.model, self.element_bytes)
        if self.recompute:
            layers, inputs = self.model.n_layers, self.element_bytes * self.model.dim
            per_token = layers * inputs + per_token // layers
        return self.micro_batch * self.tokens * per_token

    def working(self) -> int:
        """The loss's gradient of the head; with FSDP, the root and two blocks gathered."""
        assert self.model.vocab_size
        head = self.model.vocab_size * self.model.dim
        block = (costs.parameters(self.model) - 2 * head) // self.model.n_layers
        gathered = self.element_bytes * (2 * head + 2 * block) if self.gathers else 0
        return 4 * head + gathered

    def total(self) -> int:
        return self.states() + self.activations() + self.working()

    def __str__(self) -> str:
        parts = {
            "weights, gradients and moments": self.states(),
            "activations": self.activations(),
            "loss and gathered weights" if self.gathers else "loss": self.working(),
        }
        return ", ".join(f"{name} {show_bytes(n)}" for name, n in parts.items() if n)


@contextmanager
def explained(phase: str, cfg: Config, here: World, state: State | None = None) -> Iterator[None]:
    """Raise `OutOfMemory` for any failed allocation of the block; other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemory(sentence(error, phase, cfg, here, state)) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on any device."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or bool(ALLOCATORS.search(str(error)))


def sentence(
    error: BaseException, phase: str, cfg: Config, here: World, state: State | None
) -> str:
    """Where memory ran out, the plan, the peak, and the changes that would fit."""
    asked, peak, there = requested(str(error)), peak_bytes(here.device), available(here.device)
    used = f"peak {show_bytes(peak)}"
    used += f" and {show_bytes(asked)} more asked for" if asked else ""
    text = f"out of memory in {where(error, phase, state)} on rank {here.rank} ({here.device}): "
    if not cfg.model.vocab_size:
        return f"{text}{used}, of {show_bytes(there)}"
    plan = plan_of(cfg, here, state)
    need = max(plan.total(), peak + asked, there)
    return (
        f"{text}planned {show_bytes(plan.total())} ({plan}), {used}, of {show_bytes(there)}"
        f"{_waste(here.device)}; {advice(plan, need, there, here.device.type)}"
    )


# -- where -----------------------------------------------------------------------------------------


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
        layer = _unfinished(state.model)
    return f"{phase}{', ' + part if part else ''}{' of ' + layer if layer else ''}"


def _unfinished(model: nn.Module) -> str:
    """The block the backward pass has come to: the last one with a weight that has no gradient.

    Nothing where gradients are left of an earlier micro-batch.
    """
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is None:
            return ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])
    return ""


# -- how much --------------------------------------------------------------------------------------


def plan_of(cfg: Config, here: World, state: State | None) -> Plan:
    """The plan of a run; while it is built there are no activations yet."""
    names = {"float32": 4, "bfloat16": 2}
    element_bytes = names.get(cfg.train.dtype, 2 if here.device.type == "cuda" else 4)
    return Plan(
        model=cfg.model,
        tokens=cfg.data.seq_len,
        micro_batch=state.micro_batch if state else 0,
        element_bytes=element_bytes,
        recompute=cfg.parallel.recompute == "full",
        shard=fsdp.layout(cfg.parallel, here.size)[1],
        gathers=here.size > 1 or element_bytes < 4,
    )


def requested(message: str) -> int:
    """Bytes of the allocation that failed, as the allocator puts it; 0 where it does not."""
    match = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB|TiB)", message)
    sizes = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    return int(float(match[1]) * sizes[match[2]]) if match else 0


def peak_bytes(device: torch.device) -> int:
    """Most bytes this process has held: the allocator's on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes
    return peak if sys.platform == "darwin" else 1024 * peak


def available(device: torch.device) -> int:
    """Bytes that this process could hold: what others leave of a GPU, the least limit of a CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    limits = [resource.getrlimit(resource.RLIMIT_AS)[0]]
    limits += [int(text) for text in _cgroup_limits() if text.isdigit()]
    limits += [_physical()]
    return min(limit for limit in limits if limit > 0)


def _cgroup_limits() -> Iterator[str]:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / name
        if path.is_file():
            yield path.read_text().strip()


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _waste(device: torch.device) -> str:
    """Memory the allocator holds in pieces that are too small."""
    if device.type != "cuda":
        return ""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if unused < 0.1 * torch.cuda.mem_get_info(device)[1]:
        return ""
    setting = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    return f", {show_bytes(unused)} of them in unused pieces ({setting} joins them)"


# -- what would fit --------------------------------------------------------------------------------


def advice(plan: Plan, need: int, there: int, device_type: str) -> str:
    """Options that bring a process from `need` bytes below what is there, by the same plan."""
    found = changes(plan, need, there, device_type)
    if not found:
        return "no smaller micro-batch, recompute or sharding would fit: take a smaller model.dim"
    return " or ".join(f"{option} ({show_bytes(n)})" for option, n in found) + " would fit"


def changes(plan: Plan, need: int, there: int, device_type: str) -> list[tuple[str, int]]:
    """(options, bytes needed then): each change by itself where it suffices, else together."""
    missed = need - plan.total()

    def fits(change: Plan) -> bool:
        return change.total() + missed <= ROOM * there

    halved, recomputed = _halvings(plan), replace(plan, recompute=True)
    tries = [halved, [] if plan.recompute else [recomputed]]
    # processes on one machine share its memory, however it is cut
    sharded = _sharded(plan) if device_type == "cuda" else []
    found = [next(filter(fits, each), None) for each in (*tries, sharded)]
    if not any(found):
        together = [*_halvings(recomputed)] if not plan.recompute else []
        smallest = replace(recomputed, micro_batch=min(plan.micro_batch, 1))
        together += _sharded(smallest) if sharded else []
        found = [next(filter(fits, together), None)]
    return [(_options(plan, change), change.total() + missed) for change in found if change]


def _halvings(plan: Plan) -> list[Plan]:
    """The plan with ever smaller micro-batches."""
    sizes = [plan.micro_batch >> n for n in range(1, plan.micro_batch.bit_length())]
    return [replace(plan, micro_batch=size) for size in sizes]


def _sharded(plan: Plan) -> list[Plan]:
    """The plan over ever more processes."""
    sizes = (plan.shard << n for n in range(1, MOST_PROCESSES.bit_length()))
    return [replace(plan, shard=n, gathers=True) for n in sizes if n <= MOST_PROCESSES]


def _options(plan: Plan, change: Plan) -> str:
    words = []
    if change.micro_batch != plan.micro_batch:
        words.append(f"--train.micro_batch {change.micro_batch}")
    if change.recompute != plan.recompute:
        words.append("--parallel.recompute full")
    if change.shard != plan.shard:
        words.append(f"{change.shard} processes with --parallel.shard {change.shard}")
    return " with ".join(words)
