"""Python, packages, torch with its GPUs, compilers: what a training imports.

Every package is imported in a process of its own, so that a broken one is a finding.
"""

import os
import platform
import re
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path
from typing import Any

from llama.doctor import SHARED_NAMES, installed
from llama.doctor.finding import Finding, at_least, gigabytes, probe

ROOT = Path(__file__).parent.parent.parent
# NCCL keeps buffers for every pair of GPUs in it; containers often have 64 MB.
LITTLE_SHM_BYTES = 10**9
# Import names that are not those of the distributions.
IMPORT_NAMES = {"pyyaml": "yaml"}
# What to import, and what it is for.
OPTIONAL = {
    "xformers": ("xformers.ops", "attention on CUDA GPUs"),
    "matplotlib": ("matplotlib", "python -m llama.report, extra `report`"),
    "wandb": ("wandb", "--log.wandb, extra `wandb`"),
    "tensorboard": ("tensorboard", "--log.tensorboard, extra `tensorboard`"),
    "pyarrow": ("pyarrow", "parquet files, extra `corpus`"),
}
TORCH_PROBE = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "error": None}
found["gloo"] = torch.distributed.is_available() and torch.distributed.is_gloo_available()
found["nccl"] = None
if torch.distributed.is_available() and torch.distributed.is_nccl_available():
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
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


def python() -> list[Finding]:
    text = f"{platform.python_version()}, {sys.platform} {platform.machine()}, {sys.prefix}"
    if not at_least(platform.python_version(), "3.11"):
        todo = "3.11 or newer is needed: make env PYTHON=python3.12"
        return [Finding("problem", "Python", text, todo, fatal=True)]
    if sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ:
        return [Finding("note", "Python", f"{text}, no environment of its own", "make env")]
    return [Finding("ok", "Python", text)]


def packages() -> list[Finding]:
    """Every requirement but torch: there, new enough, importable."""
    wanted = {name: least for name, least in requirements().items() if name != "torch"}
    modules = {n: IMPORT_NAMES.get(n.lower(), n.replace("-", "_")) for n in wanted}
    errors = probe(
        f"import importlib, json\nfound = {{}}\nfor name, module in {modules!r}.items():\n"
        "    try: importlib.import_module(module)\n"
        "    except BaseException as error: found[name] = f'{type(error).__name__}: {error}'\n"
        "print(json.dumps(found))"
    )
    if isinstance(errors, str):
        text = f"importing {', '.join(wanted)} ended with: {errors}"
        return [Finding("problem", "packages", text, "import them one by one", True)]
    found = []
    for name, least in wanted.items():
        todo = f"pip install '{name}>={least}'"
        if name in errors:
            found.append(Finding("problem", name, f"import fails: {errors[name]}", todo, True))
        elif not at_least(version := installed(name) or "0", least):
            found.append(Finding("problem", name, f"{version}, {least} is needed", todo, True))
    return found or [Finding("ok", "packages", f"all {len(wanted)} required ones can be imported")]


def requirements() -> dict[str, str]:
    """Least version by package, as pyproject.toml asks for them."""
    lines = metadata.requires("llama-pretraining") if installed("llama-pretraining") else None
    if (ROOT / "pyproject.toml").exists():
        import tomllib

        lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    matches = [re.fullmatch(r"([\w.-]+)\s*>=\s*([\d.]+)", line) for line in lines or []]
    return {match[1]: match[2] for match in matches if match}


def optional() -> list[Finding]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(_optional, OPTIONAL))


def _optional(name: str) -> Finding:
    module, purpose = OPTIONAL[name]
    spec = util.find_spec(module.split(".")[0])
    # a folder of that name, as wandb leaves one, is a package without a file
    if spec is None or not spec.origin:
        return Finding("ok", name, f"not installed; for {purpose}")
    found = probe(f"import {module}\nprint('{{}}')")
    version = installed(name) or "of unknown version"
    if isinstance(found, str):
        todo = f"pip install --force-reinstall {name}, or pip uninstall {name}"
        return Finding("note", name, f"{version} cannot be imported: {found}", todo)
    return Finding("ok", name, f"{version}; for {purpose}")


def torch_and_gpus() -> list[Finding]:
    found, least = probe(TORCH_PROBE), requirements().get("torch", "0")
    if isinstance(found, str):
        todo = "make env; TORCH_INDEX=URL names another build"
        return [Finding("problem", "torch", f"cannot be imported: {found}", todo, fatal=True)]
    build = f"built for CUDA {found['cuda']}" if found["cuda"] else "built for CPUs"
    text = f"{found['version']}, {build}"
    results = [Finding("ok", "torch", text)]
    if not at_least(found["version"], least):
        results = [Finding("problem", "torch", text, f"torch {least} or newer is needed", True)]
    if not found["gloo"]:
        text = "this build has no gloo, which decisions and checkpoints go through"
        results.append(Finding("problem", "gloo", text, "install another build of torch", True))
    results += _gpus(found)
    if found["gpus"]:
        if not found["nccl"]:
            todo = "install another build of torch, or hide the GPUs: CUDA_VISIBLE_DEVICES="
            results.append(Finding("problem", "NCCL", "not in this build", todo, fatal=True))
        else:
            results.append(Finding("ok", "NCCL", found["nccl"]))
        if len(found["gpus"]) > 1:
            results += _shared_memory()
    return [*results, _triton(bool(found["gpus"])), _compiler()]


def _gpus(found: dict[str, Any]) -> list[Finding]:
    driver = shutil.which("nvidia-smi")
    if not found["gpus"]:
        if driver and not found["cuda"]:
            todo = "for a GPU: make env TORCH_INDEX=URL of a CUDA build"
            return [Finding("note", "GPU", "an NVIDIA driver is here, torch cannot use it", todo)]
        if driver:
            todo = "compare the driver's CUDA version in nvidia-smi with torch's"
            return [Finding("problem", "GPU", f"torch finds none: {found['error']}", todo)]
        return [Finding("note", "GPU", "none: training runs on the CPU, for small models")]
    results = []
    for i, gpu in enumerate(found["gpus"]):
        if gpu["error"]:
            todo = "another build of torch, or leave it out by CUDA_VISIBLE_DEVICES"
            text = f"{i}: {gpu['name']}: {gpu['error']}"
            results.append(Finding("problem", "GPU", text, todo, fatal=True))
            continue
        text = f"{i}: {gpu['name']}, {gigabytes(gpu['free'])} of {gigabytes(gpu['total'])} free"
        if gpu["capability"] < [8, 0]:
            todo = "--train.dtype float32"
            results.append(Finding("note", "GPU", f"{text}, no bfloat16 in hardware", todo))
        elif gpu["free"] < 0.9 * gpu["total"]:
            todo = "nvidia-smi shows who uses the rest"
            results.append(Finding("note", "GPU", text, todo))
        else:
            results.append(Finding("ok", "GPU", text))
    return results


def _shared_memory() -> list[Finding]:
    place = Path("/dev/shm")
    if not place.exists() or shutil.disk_usage(place).total >= LITTLE_SHM_BYTES:
        return []
    text = f"{place} holds {gigabytes(shutil.disk_usage(place).total)}, little for NCCL"
    return [Finding("note", "memory", text, "docker run --ipc=host or --shm-size=8g")]


def _triton(gpu: bool) -> Finding:
    if util.find_spec("triton") is None:
        if gpu:
            return Finding(
                "problem", "triton", "not installed", "--train.compile false, or make env"
            )
        return Finding("ok", "triton", "not installed; for GPUs")
    found = probe("import triton\nprint('{}')")
    if isinstance(found, str):
        todo = "--train.compile false, or reinstall torch, which brings it"
        return Finding("problem" if gpu else "note", "triton", f"cannot be imported: {found}", todo)
    return Finding("ok", "triton", installed("triton") or "of unknown version")


def _compiler() -> Finding:
    """torch.compile and Triton call a C compiler while the program runs."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [] if compiler else ["no C compiler"]
    missing += [] if headers.exists() else [f"no {headers}"]
    if missing:
        todo = "apt-get install gcc python3-dev, or --train.compile false"
        return Finding("note", "compiler", " and ".join(missing), todo)
    return Finding("ok", "compiler", f"{compiler}, with Python's headers")


def names() -> list[Finding]:
    found = []
    for name in SHARED_NAMES:
        spec = util.find_spec(name)
        place = Path(spec.origin).parent.resolve() if spec and spec.origin else None
        if version := installed(name):
            text = f"the PyPI package {name} {version} is installed, ours has the same name"
            found.append(Finding("problem", "names", text, f"pip uninstall {name}", True))
        elif place != (ROOT / name).resolve():
            text = f"`import {name}` finds {place or 'nothing'} instead of {ROOT / name}"
            found.append(Finding("problem", "names", text, "start in the project's folder", True))
    return found or [Finding("ok", "names", "`kernels` and `tokenizer` are those of this project")]
