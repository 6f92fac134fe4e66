"""Whether this machine can train, and what to do where it cannot: `python -m llama.doctor`.

In: the machine. Out: a line per finding with a verdict: ok, note (training works, read this) or
problem. Python alone is needed here, and every package is imported in a process of its own, so that
whatever is missing or broken is a finding.
"""

import json
import os
import platform
import re
import socket
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import partial
from importlib import metadata, util
from pathlib import Path
from shutil import disk_usage, which
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
IMPORT_TIMEOUT_S = 120
RENDEZVOUS_PORT = 29500
LITTLE_DISK_BYTES = 10 * 10**9
# What a package that is not required is for.
OPTIONAL = {
    "xformers": "attention on CUDA GPUs",
    "matplotlib": "python -m llama.report, extra `report`",
    "wandb": "--log.wandb, extra `wandb`",
    "tensorboard": "--log.tensorboard, extra `tensorboard`",
    "pyarrow": "parquet files, extra `corpus`",
}
# What is imported where that is not the distribution's name.
MODULES = {"PyYAML": "yaml", "xformers": "xformers.ops"}
# Variables that are set for a while and then forgotten, and what they do.
FORGOTTEN = {
    "PYTHONSAFEPATH": "hides the project's folder where it is not installed",
    "CUDA_LAUNCH_BLOCKING": "is slow: each kernel waits for the one before it",
    "TORCH_DISTRIBUTED_DEBUG": "is slow: every collective is checked",
    "NCCL_P2P_DISABLE": "is slow: GPUs talk through host memory",
}
TORCH_PROBE = """
import json, torch, torch.distributed as dist
found = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "error": None}
found["gloo"] = dist.is_available() and dist.is_gloo_available()
found["nccl"] = dist.is_available() and dist.is_nccl_available() and torch.cuda.nccl.version()
try:
    torch.cuda.init()
except Exception as error:
    found["error"] = str(error)
for i in range(torch.cuda.device_count() if not found["error"] else 0):
    gpu = torch.cuda.get_device_properties(i)
    entry = {"name": gpu.name, "capability": [gpu.major, gpu.minor], "error": None}
    try:
        entry["free"], entry["total"] = torch.cuda.mem_get_info(i)
        ones = torch.ones(64, 64, device=i, dtype=torch.bfloat16)
        assert float((ones @ ones).float().sum()) == 64**3, "a product of ones came out wrong"
    except Exception as error:
        entry["error"] = str(error)
    found["gpus"].append(entry)
print(json.dumps(found))
"""


class Finding(NamedTuple):
    """`verdict` is ok, note or problem; a `fatal` problem makes training impossible."""

    verdict: str
    name: str
    text: str
    todo: str = ""
    fatal: bool = False


ok, note, problem = (partial(Finding, verdict) for verdict in ("ok", "note", "problem"))
fatal = partial(problem, fatal=True)


def refuse_clashes() -> None:
    """Raise `UserError` where other packages hide ours; it takes milliseconds."""
    for clash in clashes():
        from llama.cli import UserError

        raise UserError(f"{clash.text}: {clash.todo}")


def clashes() -> Iterator[Finding]:
    """Where `kernels` or `tokenizer` is not ours but PyPI's, or another folder."""
    for name in ("kernels", "tokenizer"):
        spec = util.find_spec(name)
        place = Path(spec.origin).parent.resolve() if spec and spec.origin else "nothing"
        if version := installed(name):
            text = f"the PyPI package {name} {version} is installed, ours has the same name"
            yield fatal("names", text, f"`pip uninstall {name}`, or an environment of its own")
        elif place != (ROOT / name).resolve():
            text = f"`import {name}` finds {place} instead of {ROOT / name}"
            yield fatal("names", text, "start in the project's folder")


def installed(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def tried(code: str) -> tuple[bool, str]:
    """Whether code runs in a process of its own, and its last line, or how it failed in one."""
    # -P: the working folder is not searched, nothing in it can pass for a package
    command = [sys.executable, "-P", "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=IMPORT_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer after {IMPORT_TIMEOUT_S} s"
    if done.returncode < 0:
        return False, f"killed by signal {-done.returncode}"
    said = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return not done.returncode, said[-1][:300] if said else f"exit code {done.returncode}"


def at_least(version: str, least: str) -> bool:
    """Whether 2.13.0+cpu is at least 2.11: by the numbers that both begin with."""
    numbers = [[int(n) for n in re.findall(r"\d+", text)] for text in (version, least)]
    return numbers[0] >= numbers[1]


def gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB"


def basics() -> Iterator[Finding]:
    version = platform.python_version()
    text = f"{version}, {sys.platform} {platform.machine()}, {sys.prefix}"
    if not at_least(version, "3.11"):
        yield fatal("Python", text, "3.11 or newer is needed: make env PYTHON=python3.12")
    elif sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ:
        yield note("Python", f"{text}, no environment of its own", "make env")
    else:
        yield ok("Python", text)
    ours = ok("names", "`kernels` and `tokenizer` are those of this project")
    yield from list(clashes()) or [ours]
    # torch.compile and Triton call a C compiler while the program runs
    compiler = which("cc") or which("gcc") or which("clang")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler and headers.exists():
        yield ok("compiler", f"{compiler}, with Python's headers")
    else:
        text = f"no {headers}" if compiler else "no C compiler"
        yield note("compiler", text, "apt-get install gcc python3-dev, or --train.compile false")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield ok("CPU", f"{cores} cores, {gigabytes(memory)} of memory")


def requirements() -> dict[str, str]:
    """Least version by package, as pyproject.toml asks for them."""
    lines = metadata.requires("llama-pretraining") if installed("llama-pretraining") else None
    if (ROOT / "pyproject.toml").exists():
        # imported here: an older Python, which has none, is a finding
        import tomllib

        lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    matches = [re.fullmatch(r"([\w.-]+)\s*>=\s*([\d.]+)", line) for line in lines or []]
    return {match[1]: match[2] for match in matches if match}


def packages() -> Iterator[Finding]:
    """Every requirement but torch: there, new enough, importable."""
    wanted = {name: least for name, least in requirements().items() if name != "torch"}
    # together first, which is quicker
    all_work, _ = imported(*wanted)
    good = True
    for name, least in wanted.items():
        works, said = (True, "") if all_work else imported(name)
        version = installed(name) or "0"
        if not works or not at_least(version, least):
            good = False
            text = f"{version}, {least} is needed" if works else f"import fails: {said}"
            yield fatal(name, text, f"pip install '{name}>={least}'")
    if good:
        yield ok("packages", f"all {len(wanted)} required ones can be imported")


def optional() -> Iterator[Finding]:
    for name, purpose in OPTIONAL.items():
        spec = util.find_spec(name)
        # a folder of that name, as wandb leaves one, is a package without a file
        there = spec and spec.origin
        version = installed(name) or "of unknown version" if there else "not installed"
        works, said = imported(name) if there else (True, "")
        todo = f"pip install --force-reinstall {name}, or pip uninstall {name}"
        broken = note(name, f"{version} cannot be imported: {said}", todo)
        yield ok(name, f"{version}; for {purpose}") if works else broken


def imported(*names: str) -> tuple[bool, str]:
    return tried("import " + ", ".join(MODULES.get(n, n.replace("-", "_")) for n in names))


def torch_and_gpus() -> Iterator[Finding]:
    works, said = tried(TORCH_PROBE)
    if not works:
        todo = "make env; TORCH_INDEX=URL names another build"
        yield fatal("torch", f"cannot be imported: {said}", todo)
        return
    found, least = json.loads(said), requirements().get("torch", "0")
    version, gpus = found["version"], found["gpus"]
    text = f"{version}, built for {'CUDA ' + found['cuda'] if found['cuda'] else 'CPUs'}"
    old = fatal("torch", text, f"torch {least} or newer is needed")
    yield ok("torch", text) if at_least(version, least) else old
    if not found["gloo"]:
        text = "this build has no gloo, which decisions and checkpoints go through"
        yield fatal("gloo", text, "install another build of torch")
    yield from map(_gpu, range(len(gpus)), gpus) if gpus else [_no_gpu(found)]
    if gpus:
        todo = "install another build of torch, or hide the GPUs: CUDA_VISIBLE_DEVICES="
        missing = fatal("NCCL", "not in this build", todo)
        yield ok("NCCL", ".".join(map(str, found["nccl"]))) if found["nccl"] else missing
    # NCCL keeps buffers for every pair of GPUs there; containers often have 64 MB
    if len(gpus) > 1 and (size := disk_usage("/dev/shm").total) < 10**9:
        text = f"/dev/shm holds {gigabytes(size)}, little for NCCL"
        yield note("memory", text, "docker run --ipc=host or --shm-size=8g")
    works, said = imported("triton")
    if works:
        yield ok("triton", installed("triton") or "of unknown version")
    elif not gpus and util.find_spec("triton") is None:
        yield ok("triton", "not installed; for GPUs")
    else:
        todo = "--train.compile false, or reinstall torch, which brings it"
        yield (problem if gpus else note)("triton", f"cannot be imported: {said}", todo)


def _gpu(index: int, gpu: dict[str, Any]) -> Finding:
    text = f"{index}: {gpu['name']}"
    if gpu["error"]:
        todo = "another build of torch, or leave it out by CUDA_VISIBLE_DEVICES"
        return fatal("GPU", f"{text}: {gpu['error']}", todo)
    text += f", {gigabytes(gpu['free'])} of {gigabytes(gpu['total'])} free"
    if gpu["capability"] < [8, 0]:
        return note("GPU", f"{text}, no bfloat16 in hardware", "--train.dtype float32")
    if gpu["free"] < 0.9 * gpu["total"]:
        return note("GPU", text, "nvidia-smi shows who uses the rest")
    return ok("GPU", text)


def _no_gpu(found: dict[str, Any]) -> Finding:
    if not which("nvidia-smi"):
        return note("GPU", "none: training runs on the CPU, for small models")
    if not found["cuda"]:
        todo = "for a GPU: make env TORCH_INDEX=URL of a CUDA build"
        return note("GPU", "an NVIDIA driver is here, torch cannot use it", todo)
    todo = "compare the driver's CUDA version in nvidia-smi with torch's"
    return problem("GPU", f"torch finds none: {found['error']}", todo)


def disks() -> Iterator[Finding]:
    """Where runs and data are written: the working folder, and what of it lies elsewhere."""
    places = [place for place in map(Path, ("data", "runs", ".")) if place.exists()]
    for place in {place.stat().st_dev: place.resolve() for place in places}.values():
        free = disk_usage(place).free
        text = f"{gigabytes(free)} free in {place}"
        if not os.access(place, os.W_OK):
            yield fatal("disk", f"{place} is read-only", "start in another folder")
        elif free < LITTLE_DISK_BYTES:
            todo = "a checkpoint takes 12 bytes a parameter, 81 GB for 7B; two are kept"
            yield note("disk", text, todo)
        else:
            yield ok("disk", text)


def network() -> Iterator[Finding]:
    text = f"port {RENDEZVOUS_PORT}, where torchrun's processes meet"
    try:
        with socket.socket() as one:
            one.bind(("", RENDEZVOUS_PORT))
        yield ok("ports", f"{text}, is free")
    except OSError as error:
        todo = "torchrun --standalone on one machine, else --rdzv-endpoint HOST:OTHER"
        yield note("ports", f"{text}: {error.strerror}", todo)
    host = socket.gethostname()
    try:
        socket.getaddrinfo(host, None)
        yield ok("host name", f"{host} has an address")
    except OSError as error:
        text = f"{host} has no address ({error.strerror}): processes may not find each other"
        todo = f"add `127.0.0.1 {host}` to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo"
        yield note("host name", text, todo)


def environment() -> Iterator[Finding]:
    env, cores, name = os.environ, os.cpu_count() or 1, "environment"
    threads, rendezvous = env.get("OMP_NUM_THREADS", ""), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    text = f"OMP_NUM_THREADS is {threads}"
    if not threads.isdigit():
        text = "OMP_NUM_THREADS is not set: torchrun gives each of several processes one thread"
        yield note(name, text, f"on a CPU: export OMP_NUM_THREADS={cores} / processes")
    else:
        yield note(name, text, f"at most {cores}") if int(threads) > cores else ok(name, text)
    text = "under torchrun, restarted processes may read addresses of dead ones (pytorch#135712)"
    stale = note(name, text, f"export {rendezvous}=1")
    yield ok(name, f"{rendezvous} is 1") if env.get(rendezvous) == "1" else stale
    if (gpus := env.get("CUDA_VISIBLE_DEVICES")) is not None:
        yield note(name, f"CUDA_VISIBLE_DEVICES is {gpus!r}: other GPUs are not seen")
    for variable, effect in FORGOTTEN.items():
        if (value := env.get(variable, "0").upper()) not in ("", "0", "OFF"):
            yield note(name, f"{variable} is {value}, which {effect}", f"unset {variable}")


CHECKS = [basics, packages, torch_and_gpus, optional, disks, network, environment]


def examine() -> Iterator[Finding]:
    """All findings; a check that fails itself is one of them."""
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:  # whatever is wrong with a machine, the other checks count
            text = f"cannot be checked: {type(error).__name__}: {error}"
            yield note(check.__name__.replace("_", " "), text)


def shown(finding: Finding) -> str:
    """A finding in 80 columns: verdict, name, text, and what to do below it."""
    head = f"{finding.verdict:<9}{finding.name:<13}"
    lines = []
    for start, text in ((head, finding.text), (f"{'':<22}-> ", finding.todo)):
        # what an import printed may hold line ends and colours
        text = re.sub(r"[\x00-\x1f\x7f]+", " ", text)
        lines += textwrap.wrap(text, 80, initial_indent=start, subsequent_indent=" " * len(start))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if argv:
        from llama import cli

        cli.parser("python -m llama.doctor", "Whether this machine can train.").parse_args(argv)
    count = {"ok": 0, "note": 0, "problem": 0, "fatal": 0}
    for finding in examine():
        count[finding.verdict] += 1
        count["fatal"] += finding.fatal
        print(shown(finding), flush=True)
    told = ", ".join(f"{count[v]} {v}{'s' * (count[v] != 1)}" for v in ("problem", "note"))
    print(f"\ntraining {'is not possible' if count['fatal'] else 'works'} here: {told}")
    return 1 if count["fatal"] else 0


if __name__ == "__main__":
    try:
        from llama import cli
    except ImportError:
        # a missing package is what this command is there to name
        sys.exit(main([]))
    cli.run(main)
