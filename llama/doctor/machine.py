"""Cores, memory, disks, ports, host name and environment variables."""

import os
import shutil
import socket
from pathlib import Path

from llama.doctor.finding import Finding, gigabytes

RENDEZVOUS_PORT = 29500
LITTLE_DISK_BYTES = 10 * 10**9
# Variables that are set for debugging and then forgotten.
SLOW_VARIABLES = {
    "CUDA_LAUNCH_BLOCKING": "each kernel waits for the one before it",
    "TORCH_DISTRIBUTED_DEBUG": "every collective is checked",
    "NCCL_P2P_DISABLE": "GPUs talk through host memory",
}


def processor() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [Finding("ok", "CPU", f"{cores} cores, {gigabytes(memory)} of memory")]


def disks() -> list[Finding]:
    """Where runs and data are written: the working folder, and what of it lies elsewhere."""
    results, seen = [], set()
    for place in (Path("."), Path("runs"), Path("data")):
        if not place.exists() or (device := place.stat().st_dev) in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(place).free
        text = f"{gigabytes(free)} free in {place.resolve()}"
        if not os.access(place, os.W_OK):
            todo = "start in another folder"
            results.append(
                Finding("problem", "disk", f"{place.resolve()} is read-only", todo, True)
            )
        elif free < LITTLE_DISK_BYTES:
            todo = "a checkpoint takes 12 bytes a parameter, 81 GB for 7B; two are kept"
            results.append(Finding("note", "disk", text, todo))
        else:
            results.append(Finding("ok", "disk", text))
    return results


def network() -> list[Finding]:
    results = []
    with socket.socket() as one:
        try:
            one.bind(("", RENDEZVOUS_PORT))
            text = f"port {RENDEZVOUS_PORT}, where torchrun's processes meet, is free"
            results.append(Finding("ok", "ports", text))
        except OSError as error:
            text = f"port {RENDEZVOUS_PORT}, where torchrun's processes meet: {error.strerror}"
            todo = "torchrun --standalone on one machine, else --rdzv-endpoint HOST:OTHER"
            results.append(Finding("note", "ports", text, todo))
    host = socket.gethostname()
    try:
        socket.getaddrinfo(host, None)
        results.append(Finding("ok", "host name", f"{host} has an address"))
    except OSError as error:
        text = f"{host} has no address ({error.strerror}): processes may not find each other"
        todo = f"add `127.0.0.1 {host}` to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo"
        results.append(Finding("note", "host name", text, todo))
    return results


def environment() -> list[Finding]:
    env, name, results = os.environ, "environment", []
    threads, cores = env.get("OMP_NUM_THREADS"), os.cpu_count() or 1
    if threads and threads.isdigit():
        verdict, todo = ("ok", "") if int(threads) <= cores else ("note", f"at most {cores}")
        results.append(Finding(verdict, name, f"OMP_NUM_THREADS is {threads}", todo))
    else:
        text = "OMP_NUM_THREADS is not set: torchrun gives each of several processes one thread"
        todo = f"on a CPU: export OMP_NUM_THREADS={cores} / processes"
        results.append(Finding("note", name, text, todo))
    if env.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1":
        results.append(Finding("ok", name, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE is 1"))
    else:
        text = (
            "under torchrun, restarted processes may read addresses of dead ones (pytorch#135712)"
        )
        todo = "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        results.append(Finding("note", name, text, todo))
    if env.get("PYTHONSAFEPATH"):
        text = "PYTHONSAFEPATH hides the project's folder where it is not installed"
        results.append(Finding("note", name, text, "unset PYTHONSAFEPATH"))
    if "CUDA_VISIBLE_DEVICES" in env:
        text = f"CUDA_VISIBLE_DEVICES is {env['CUDA_VISIBLE_DEVICES']!r}: other GPUs are not seen"
        results.append(Finding("note", name, text))
    for variable, effect in SLOW_VARIABLES.items():
        if env.get(variable, "0").upper() not in ("", "0", "OFF"):
            text = f"{variable} is {env[variable]}, which is slow: {effect}"
            results.append(Finding("note", name, text, f"unset {variable}"))
    return results
