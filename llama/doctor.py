"""Whether this machine can train, and what to do where it cannot: `python -m llama.doctor`.

In: the machine. Out: a line per finding with a verdict: ok, note (training works, read this) or
problem (it does not). Python alone is needed here, and every package is imported in a process of
its own, so that whatever is missing or broken is a finding.
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
from collections import Counter
from collections.abc import Iterator
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
    "triton": "kernels on GPUs, torch brings it",
    "xformers": "attention on CUDA GPUs",
    "matplotlib": "python -m llama.report, extra `report`",
    "wandb": "--log.wandb, extra `wandb`",
    "tensorboard": "--log.tensorboard, extra `tensorboard`",
    "pyarrow": "parquet files, extra `corpus`",
}
# What is imported where that is not the distribution's name.
MODULES = {"protobuf": "google.protobuf", "PyYAML": "yaml", "xformers": "xformers.ops"}
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
    """What was looked at and what to do; `verdict` is ok, note or problem."""

    verdict: str
    name: str
    text: str
    todo: str = ""


def judged(good: object, name: str, text: str, todo: str = "", verdict: str = "note") -> Finding:
    """ok where all is good; else the verdict, with what to do."""
    return Finding("ok", name, text) if good else Finding(verdict, name, text, todo)


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
            todo = f"`pip uninstall {name}`, or an environment of its own"
            yield Finding("problem", "names", text, todo)
        elif place != (ROOT / name).resolve():
            text = f"`import {name}` finds {place} instead of {ROOT / name}"
            yield Finding("problem", "names", text, "start in the project's folder")


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
    todo = "3.11 or newer is needed, in an environment of its own: make env PYTHON=python3.12"
    own = sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ
    enough = at_least(version, "3.11")
    yield judged(enough and own, "Python", text, todo, "note" if enough else "problem")
    ours = Finding("ok", "names", "`kernels` and `tokenizer` are those of this project")
    yield from list(clashes()) or [ours]
    # torch.compile and Triton call a C compiler while the program runs
    compiler = which("cc") or which("gcc") or which("clang")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    text = f"{compiler or 'no C compiler'}, {'with' if headers.exists() else 'no'} {headers}"
    todo = "apt-get install gcc python3-dev, or --train.compile false"
    yield judged(compiler and headers.exists(), "compiler", text, todo)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("ok", "CPU", f"{os.cpu_count()} cores, {gigabytes(memory)} of memory")


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
    """Every package but torch: there if it is required, new enough, importable."""
    required = requirements()
    required.pop("torch", None)
    for name, least in (required | dict.fromkeys(OPTIONAL, "0")).items():
        module = MODULES.get(name, name.replace("-", "_"))
        spec = util.find_spec(module.partition(".")[0])
        # a folder of that name, as wandb leaves one, is a package without a file
        there, verdict = spec and spec.origin, "problem" if name in required else "note"
        version = installed(name) or ("of unknown version" if there else "not installed")
        text, todo = f"{version}; for {OPTIONAL.get(name, 'all')}", f"pip install '{name}>={least}'"
        good = at_least(installed(name) or "0", least)
        if there or name in required:
            works, said = tried(f"import {module}")
            good, text = good and works, text if works else f"{version} cannot be imported: {said}"
        yield judged(good, name, text, todo, verdict)


def torch_and_gpus() -> Iterator[Finding]:
    works, said = tried(TORCH_PROBE)
    if not works:
        todo = "make env; TORCH_INDEX=URL names another build"
        yield Finding("problem", "torch", f"cannot be imported: {said}", todo)
        return
    found, least = json.loads(said), requirements().get("torch", "0")
    version, gpus = found["version"], found["gpus"]
    text = f"{version}, built for {'CUDA ' + found['cuda'] if found['cuda'] else 'CPUs'}"
    todo = f"torch {least} or newer is needed"
    yield judged(at_least(version, least), "torch", text, todo, "problem")
    text = "decisions and checkpoints go through it"
    yield judged(found["gloo"], "gloo", text, "this build has none: take another", "problem")
    yield from map(_gpu, range(len(gpus)), gpus) if gpus else [_no_gpu(found)]
    if gpus:
        text = ".".join(map(str, found["nccl"] or ["not in this build"]))
        todo = "install another build of torch, or hide the GPUs: CUDA_VISIBLE_DEVICES="
        yield judged(found["nccl"], "NCCL", text, todo, "problem")
    # NCCL keeps buffers for every pair of GPUs there; containers often have 64 MB
    if len(gpus) > 1 and (size := disk_usage("/dev/shm").total) < 10**9:
        text = f"/dev/shm holds {gigabytes(size)}, little for NCCL"
        yield Finding("note", "memory", text, "docker run --ipc=host or --shm-size=8g")


def _gpu(index: int, gpu: dict[str, Any]) -> Finding:
    text = f"{index}: {gpu['name']}"
    if gpu["error"]:
        todo = "another build of torch, or leave it out by CUDA_VISIBLE_DEVICES"
        return Finding("problem", "GPU", f"{text}: {gpu['error']}", todo)
    text += f", {gigabytes(gpu['free'])} of {gigabytes(gpu['total'])} free"
    if gpu["capability"] < [8, 0]:
        return Finding("note", "GPU", f"{text}, no bfloat16 in hardware", "--train.dtype float32")
    unused = gpu["free"] >= 0.9 * gpu["total"]
    return judged(unused, "GPU", text, "nvidia-smi shows who uses the rest")


def _no_gpu(found: dict[str, Any]) -> Finding:
    text, todo = "none: training runs on the CPU, for small models", ""
    if which("nvidia-smi"):
        text = f"an NVIDIA driver is here, torch cannot use it: {found['error']}"
        todo = "compare the driver's CUDA version in nvidia-smi with torch's"
        if not found["cuda"]:
            todo = "for a GPU: make env TORCH_INDEX=URL of a CUDA build"
    return Finding("note", "GPU", text, todo)


def disks() -> Iterator[Finding]:
    """Where runs and data are written: the working folder, and what of it lies elsewhere."""
    places = [place for place in map(Path, ("data", "runs", ".")) if place.exists()]
    for place in {place.stat().st_dev: place.resolve() for place in places}.values():
        free = disk_usage(place).free
        text = f"{gigabytes(free)} free in {place}"
        todo = "a checkpoint takes 12 bytes a parameter, 81 GB for 7B; two are kept"
        if os.access(place, os.W_OK):
            yield judged(free >= LITTLE_DISK_BYTES, "disk", text, todo)
        else:
            yield Finding("problem", "disk", f"{place} is read-only", "start in another folder")


def network() -> Iterator[Finding]:
    text, problem = f"port {RENDEZVOUS_PORT}, where torchrun's processes meet", ""
    try:
        with socket.socket() as one:
            one.bind(("", RENDEZVOUS_PORT))
    except OSError as error:
        problem = f": {error.strerror}"
    todo = "torchrun --standalone on one machine, else --rdzv-endpoint HOST:OTHER"
    yield judged(not problem, "ports", f"{text}{problem or ', is free'}", todo)
    # restarted processes may otherwise read addresses of dead ones (pytorch#135712)
    variable = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    text = f"{variable}=1 is needed where torchrun restarts processes"
    yield judged(os.environ.get(variable) == "1", "restarts", text, f"export {variable}=1")


CHECKS = [basics, torch_and_gpus, packages, disks, network]


def examine() -> Iterator[Finding]:
    """All findings; a check that fails itself is one of them."""
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:  # whatever is wrong with a machine, the other checks count
            text = f"cannot be checked: {type(error).__name__}: {error}"
            yield Finding("note", check.__name__.replace("_", " "), text)


def shown(finding: Finding) -> str:
    """A finding in 80 columns: verdict, name, text, and what to do below it."""
    head = f"{finding.verdict:<9}{finding.name:<17}"
    lines = []
    for start, text in ((head, finding.text), (f"{'':<26}-> ", finding.todo)):
        # what an import printed may hold line ends and colours
        text = re.sub(r"[\x00-\x1f\x7f]+", " ", text)
        lines += textwrap.wrap(text, 80, initial_indent=start, subsequent_indent=" " * len(start))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if argv:
        from llama import cli

        cli.parser("python -m llama.doctor", "Whether this machine can train.").parse_args(argv)
    count: Counter[str] = Counter()
    for finding in examine():
        count[finding.verdict] += 1
        print(shown(finding), flush=True)
    told = ", ".join(f"{count[v]} {v}{'s' * (count[v] != 1)}" for v in ("problem", "note"))
    print(f"\ntraining {'is not possible' if count['problem'] else 'works'} here: {told}")
    return 1 if count["problem"] else 0


if __name__ == "__main__":
    try:
        from llama import cli
    except ImportError:
        # a missing package is what this command is there to name
        sys.exit(main([]))
    cli.run(main)
