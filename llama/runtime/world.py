"""The processes of a run: rank, size, device, and a gloo group beside the training one.

The only place that reads the environment variables of torchrun. Without torchrun the world is one
process and everything else stays the same.
"""

import gc
import os
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llama import faults
from llama.cli import UserError

START_TIMEOUT = timedelta(minutes=30)
T = TypeVar("T")
# Held here alone. A group that outlives `stop`, be it in the frame of an error, keeps its threads,
# and those abort the end of the interpreter now and then: a run that succeeded would have failed.
_groups: dict[str, dist.ProcessGroup] = {}


@dataclass(frozen=True)
class World:
    """Where this process stands. `channel` carries decisions, on CPU tensors only.

    What a save says beside them, in a thread of its own, goes through "saves".
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    under_torchrun: bool
    channel: str = "control"

    @property
    def group(self) -> dist.ProcessGroup:
        """The gloo group of `channel`, until `stop`."""
        return _groups[self.channel]

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def chip(self) -> str:
        return chip(self.device)

    def say(self, text: str) -> None:
        """Print once for the whole world."""
        if self.leads:
            # one write: a save in the background speaks too
            print(f"{text}\n", end="", flush=True)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, value: Any) -> Any:
        """Of all ranks' values the first that says something, on every rank; else None."""
        return next(filter(None, self.gather(value)), None)

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns; the first rank's `UserError` is raised on all, so none waits."""
        problem = None
        try:
            result = action()
        except UserError as error:
            problem = str(error)
        if problem := self.first(problem):
            raise UserError(problem)
        return result

    def largest(self, value: int) -> int:
        """The largest value over all ranks; no device is waited for."""
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return int(tensor)


def chip(device: torch.device) -> str:
    """The GPU as torch names it, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def launched() -> tuple[int, int, int]:
    """(rank, processes, local rank) of torchrun; those of a single process without it."""
    rank, size, local = map(os.environ.get, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return (int(rank), int(size), int(local or 0)) if rank and size else (0, 1, int(local or 0))


def own_device() -> torch.device:
    """The GPU of this process on its machine, or the CPU."""
    return torch.device("cuda", launched()[2]) if torch.cuda.is_available() else torch.device("cpu")


def start() -> World:
    """Join the process group that torchrun describes, or make one of a single process."""
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    (rank, size, local_rank), device = launched(), own_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(backend, timeout=START_TIMEOUT, **({} if size > 1 else alone))
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        problem = UserError(f"rank {rank} cannot join the others over the network: {why}")
        # every rank tells its own: the machine of one alone may be at fault
        problem.add_note(f"on rank {rank}")
        raise problem from error
    faults.point("start.joined")
    for channel in ("control", "saves"):
        _groups[channel] = dist.new_group(backend="gloo", timeout=START_TIMEOUT)
    here = World(dist.get_rank(), dist.get_world_size(), local_rank, device, under_torchrun)
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        here.say("WARNING: restarts may fail: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    return here


def set_timeout(seconds: float) -> None:
    """How long a collective may take from now on, in every group."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def peak_bytes(device: torch.device | None = None) -> int:
    """Most bytes this process has held: the allocator's on a GPU, else resident."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        # what getrusage says here includes the process that started this one
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def stop() -> None:
    """Leave the process group."""
    gc.collect()  # meshes hold groups too
    _groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
