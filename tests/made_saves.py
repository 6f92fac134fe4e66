"""Processes that save and are killed: torch is imported once, each process is a fork.

`python tests/made_saves.py WHAT FOLDER SEED TIMES` prints one JSON object of figures. WHAT is
`kills` (SIGKILL at random moments), `points` (SIGKILL at named points, of one process and of each
of two), `two` (two checkpoints that two processes save), `collectives` (two processes that talk to
each other while they save), `lost` (one of four is killed while they save), `torch_save` or
`dcp_save` (what saving in place comes to).
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from llama import faults
from llama.config import CheckpointConfig
from llama.runtime import background, checkpoint, world


def plain(seed: int, rows: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(rows, 31, generator=generator),
        "model.b": torch.randn(7, generator=generator),
        "exp_avg.a": torch.randn(rows, 31, generator=generator),
    }


def sharded(seed: int, here: world.World) -> dict[str, torch.Tensor]:
    """The same numbers, the matrices spread over the processes unevenly."""
    if here.size == 1:
        return plain(seed)
    mesh = init_device_mesh("cpu", (here.size,))
    places = {"model.a": Shard(1), "model.b": Replicate(), "exp_avg.a": Shard(0)}
    return {
        name: distribute_tensor(t, mesh, [places[name]], src_data_rank=None)
        for name, t in plain(seed).items()
    }


def loaded(path: Path, here: world.World) -> bool:
    """Whether a checkpoint holds, bit for bit, what was saved at its step."""
    step = checkpoint.read_state(path)["step"]
    empty = {name: torch.zeros_like(t) for name, t in plain(0).items()}
    checkpoint.load(path, empty, here)
    same = all(torch.equal(empty[name], t) for name, t in plain(step).items())
    return same and path.name == f"step-{step:08d}"


def survived(run: Path, told: int, at_least: int) -> tuple[bool, int]:
    """Whether nothing that was told is lost, and the newest step. In a fork: choosing moves."""
    here = world.start()
    complete = [p for _, p in checkpoint.steps(run) if not checkpoint.damage(p)]
    path = checkpoint.choose(run, here)
    step = checkpoint.read_state(path)["step"] if path else 0
    good = step >= told and (path is None or loaded(path, here))
    moved = list(checkpoint.folder(run).glob("corrupt-*"))
    return good and len(complete) >= at_least and not moved, step


def fork(work: Callable[[Callable[[object], None]], None]) -> tuple[int, object]:
    """Start a process; returns its number and a file with what it tells, a line each."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            work(lambda value: os.write(writer, json.dumps(value).encode() + b"\n") and None)
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(writer)
    return child, os.fdopen(reader)


def answer(work: Callable[[], object]) -> object:
    """What a function returns, from a process of its own."""
    child, pipe = fork(lambda tell: tell(work()))
    lines = pipe.read().splitlines()
    os.waitpid(child, 0)
    assert lines, "the process that checks has failed: see above"
    return json.loads(lines[-1])


def killed_at_random(child: int, pipe, chance: random.Random) -> list[int]:
    """Kill a process that tells its steps at a random moment; returns what it told."""
    told, began = [], time.monotonic()
    for _ in range(chance.randint(1, 3)):
        line = pipe.readline()
        assert line, "the process has ended by itself: see above"
        cycle, began = time.monotonic() - began, time.monotonic()
        told.append(json.loads(line))
    time.sleep(chance.uniform(0, 1.5 * cycle))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return told + [json.loads(line) for line in pipe.read().splitlines()]


def kills(place: Path, chance: random.Random, times: int) -> dict[str, int]:
    lost, told, background_kills = 0, 0, 0
    for number in range(times):
        keep, wait = chance.randint(1, 3), chance.random() < 0.5

        def work(tell, keep=keep, wait=wait) -> None:
            sys.stdout = open(os.devnull, "w")
            here, saver = world.start(), background.Saver()
            checkpoint.sweep(place)
            path = checkpoint.choose(place, here)
            step = checkpoint.read_state(path)["step"] if path else 0
            if path and not loaded(path, here):
                raise AssertionError(f"{path} is not what was saved")
            tell(step)
            while True:
                step, tensors = step + 1, plain(step + 1)
                state = {"step": step}
                assert saver.save(
                    place, step, tensors, state, here, CheckpointConfig(keep=keep), wait
                )
                for tensor in tensors.values():
                    tensor.zero_()  # training goes on
                state["step"] = -1
                saver.finish()
                tell(step)

        child, pipe = fork(work)
        told = max(told, *killed_at_random(child, pipe, chance))
        background_kills += not wait
        good, newest = answer(lambda told=told: survived(place, told, 1 if told else 0))
        if not good:
            lost, told = lost + 1, newest
            print(f"kill {number}: told {told}, found {newest}", file=sys.stderr)
            shutil.rmtree(place)
    return {"kills": times, "lost": lost, "background": background_kills, "saves": told}


# -- named points ----------------------------------------------------------------------------------


def scenario(run: Path, tell) -> None:
    """A save with something in its way, a mark, a save in the background that removes others."""
    sys.stdout = open(os.devnull, "w")
    here, saver = world.start(), background.Saver()
    cfg = CheckpointConfig(keep=2)
    checkpoint.sweep(run) if here.leads else None
    assert saver.save(run, 3, sharded(3, here), {"step": 3}, here, cfg, wait=True)
    tell(3)
    if here.leads:
        checkpoint.protect(checkpoint.path_of(run, 3), "a spike came after it")
    for step in (4, 5):
        tensors = sharded(step, here)
        assert saver.save(run, step, tensors, {"step": step}, here, cfg, wait=False)
        for tensor in tensors.values():
            tensor.zero_()
        # what training says to itself meanwhile goes over other groups
        while saver.busy() and here.size == 1:
            time.sleep(0.001)
        for number in range(5 * (here.size > 1)):
            total = torch.ones(3)
            dist.all_reduce(total)
            assert int(total[0]) == 2 and here.largest(number + here.rank) == number + 1
        saver.finish()
        assert not saver.problem, saver.problem
        tell(step)
    world.stop()


def start(
    size: int, work: Callable[[Callable[[object], None]], None], armed: str = ""
) -> tuple[list[tuple[int, object]], int]:
    """Start so many ranks with faults armed; returns them and a file with what they say."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    log = os.memfd_create("log")
    children = []
    for rank in range(size):
        given = {faults.VARIABLE: armed, "GLOO_SOCKET_IFNAME": "lo"}
        if size > 1:
            given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            given |= {"WORLD_SIZE": str(size), "RANK": str(rank)}

        def rank_work(tell, given=given) -> None:
            os.environ |= given
            os.dup2(log, 2)
            work(tell)

        children.append(fork(rank_work))
    return children, log


def read(log: int) -> str:
    os.lseek(log, 0, 0)
    return os.read(log, 1 << 20).decode()


def points(place: Path, chance: random.Random, times: int) -> dict[str, object]:
    """Kill at the first, second, ... point that a process passes, until it passes all of them.

    With `times` above 1 one process at each named point, and of two each at every `times`-th.
    """
    answer(lambda: before(place / "before", world.start()))
    found = {"kills": 0, "lost": 0}
    struck = set()

    def kill(size: int, victim: int, where: str) -> bool:
        run = place / "run"
        shutil.copytree(place / "before", run)
        # something in the way of step 3
        (checkpoint.path_of(run, 3) / "x").mkdir(parents=True)
        armed = f"{where},rank={victim},action=kill"
        children, log = start(size, lambda tell: scenario(run, tell), armed)
        told, codes = _end(children, victim)
        said = read(log)
        os.close(log)
        struck.update(line.split()[1] for line in said.splitlines() if line.startswith("FAULT"))
        killed = codes[victim] == -signal.SIGKILL
        if killed:
            good, newest = answer(lambda: _swept(run, told))
            found["kills"] += 1
            found["lost"] += not good
            print("" if good else f"{size} {armed}: told {told}, found {newest}: {said}")
        else:
            assert codes == [0] * size and told == 5, said
        shutil.rmtree(run)
        return killed

    for size, victim in ((1, 0), (2, 0), (2, 1)):
        if size == 1 and times > 1:
            for point in faults.POINTS:
                if point.startswith(("ckpt.", "file.", "start.")):
                    assert kill(1, 0, f"{point}:hit=1"), point
        else:
            number = chance.randint(1, times)
            while kill(size, victim, f"*:hit={number}"):
                number += times
    return found | {"points": sorted(struck)}


def _swept(run: Path, told: int) -> object:
    # what stood in the way is no checkpoint: it may still be there, or moved
    shutil.rmtree(checkpoint.path_of(run, 3) / "x", ignore_errors=True)
    for path in checkpoint.folder(run).glob("*"):
        if path.name.startswith("corrupt-") or not any(path.iterdir()):
            shutil.rmtree(path)
    # before the first save two were complete, and two are kept
    good = survived(run, max(told, 2), 2)
    checkpoint.sweep(run)
    left = [p.name for p in checkpoint.folder(run).iterdir() if not p.name.startswith("step-")]
    return (*good,) if not left else (False, left)


def _end(children, victim: int) -> tuple[int, list[int]]:
    """Wait for the victim, then for the others, who may wait for it: these are ended after a while.

    Returns the newest step that anybody told, and the exit codes.
    """
    codes = {}
    order = sorted(range(len(children)), key=lambda rank: rank != victim)
    for rank in order:
        child, deadline = children[rank][0], time.monotonic() + 120
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if codes.get(victim) == -signal.SIGKILL and time.monotonic() > deadline - 118:
                os.kill(child, signal.SIGKILL)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        codes[rank] = os.waitstatus_to_exitcode(ended[1])
    told = [json.loads(line) for _, pipe in children for line in pipe.read().splitlines()]
    return max(told, default=0), [codes[rank] for rank in range(len(children))]


# -- what saving in place comes to -----------------------------------------------------------------


def in_place(place: Path, chance: random.Random, times: int, how: str) -> dict[str, int]:
    """SIGKILLs while the same file or folder is overwritten; lost is what no longer loads."""
    lost, path = 0, place / "last"

    def save(step: int) -> None:
        tensors = plain(step, rows=2000) | {"step": torch.tensor(step)}
        if how == "torch_save":
            torch.save(tensors, path)
        else:
            dcp.save(tensors, checkpoint_id=path, no_dist=True)

    def loads() -> bool:
        tensors = plain(0, rows=2000) | {"step": torch.tensor(0)}
        try:
            if how == "torch_save":
                tensors = torch.load(path, weights_only=True)
            else:
                dcp.load(tensors, checkpoint_id=path, no_dist=True)
        except BaseException:
            return False
        saved = plain(int(tensors["step"]), rows=2000)
        return all(torch.equal(tensors[name], t) for name, t in saved.items())

    for _ in range(times):

        def work(tell) -> None:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            step = 0
            while True:
                step += 1
                save(step)
                tell(step)

        child, pipe = fork(work)
        killed_at_random(child, pipe, chance)
        if not answer(loads):
            lost += 1
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
    return {"kills": times, "lost": lost}


def before(run: Path, here: world.World) -> None:
    """Steps 1 and 2."""
    for step in (1, 2):
        assert checkpoint.save(run, step, sharded(step, here), {"step": step}, here, 2) is None


def two(place: Path, chance: random.Random, times: int) -> dict[str, object]:
    """Steps 1 and 2, saved by two processes."""
    children, log = start(2, lambda tell: before(place, world.start()))
    _, codes = _end(children, 0)
    assert codes == [0, 0], read(log)
    return {}


def collectives(place: Path, chance: random.Random, times: int) -> dict[str, object]:
    """Two ranks save in the background and meanwhile use the default group and `control`."""

    def work(tell) -> None:
        here, saver = world.start(), background.Saver()
        for step in range(1, times + 1):
            tensors = sharded(step, here)
            for _ in range(3):
                total = torch.full((1000,), float(here.rank))
                dist.all_reduce(total)
                assert total[0] == 1.0 and here.largest(step * here.rank) == step
                assert here.gather(here.rank) == [0, 1]
            cfg = CheckpointConfig(keep=3)
            assert saver.save(place, step, tensors, {"step": step}, here, cfg, step == times)
            for tensor in tensors.values():
                tensor.zero_()
        assert saver.problem is None

    children, log = start(2, work)
    _, codes = _end(children, 0)
    assert codes == [0, 0], read(log)
    return {}


def lost(place: Path, chance: random.Random, times: int) -> dict[str, object]:
    """One of four ranks is killed at one point after the other; the exit codes of all."""

    def work(tell) -> None:
        here, saver = world.start(), background.Saver()
        cfg = CheckpointConfig(keep=3)
        saver.save(place, 1, sharded(1, here), {"step": 1}, here, cfg, wait=False)
        # no collective in which the loop would notice
        threading.Event().wait()

    found = {}
    for where, victim in (("ckpt.state", 0), ("file.written", 2)):
        children, log = start(4, work, f"{where}:rank={victim},action=kill")
        statuses = [os.waitpid(child, 0)[1] for child, _ in children]
        found[where] = list(map(os.waitstatus_to_exitcode, statuses))
        print(read(log), file=sys.stderr)
    return found


def run_made_saves(what: str, place: Path, seed: int, times: int) -> dict:
    """One of the programs here, in a process that has not joined a group; its figures."""
    command = [sys.executable, __file__, what, str(place), str(seed), str(times)]
    print(*command)
    root = Path(__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    programs = {
        "kills": kills,
        "points": points,
        "two": two,
        "collectives": collectives,
        "lost": lost,
    }
    what, place, seed, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    place.mkdir(parents=True, exist_ok=True)
    if what in programs:
        figures = programs[what](place, random.Random(seed), times)
    else:
        figures = in_place(place, random.Random(seed), times, what)
    print(json.dumps(figures))
