"""Compile every Triton kernel for sm_80 and sm_90, without a GPU: `python -m kernels.check`.

Kernels with the tiles they are launched with go in, from `gate(arch)` of each file; a line each
comes out: registers, bytes spilled, shared memory, tensor-core instructions. Fails on spills where
a kernel is meant to be fast, on products that miss the tensor cores, on more shared memory than the
chip has. `--triton VERSION` does the same in an environment that holds that Triton and nothing
else. What was compiled once is taken from Triton's cache, by the hash of its source.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

MODULES = "attention_launch attention_gluon rmsnorm swiglu rope cross_entropy".split()
# bytes of shared memory a program may have (CUDA C++ Programming Guide, compute capabilities)
SHARED = {80: 163 * 1024, 90: 227 * 1024}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}
MOST_CASES = 120


class Result(NamedTuple):
    registers: int
    spilled: int
    shared: int
    products: int

    def faults(self, arch: int, case: dict[str, Any]) -> Iterator[str]:
        if self.spilled and not case["spills"]:
            yield f"{self.spilled} bytes spilled"
        if case["products"] and not self.products:
            yield f"no {TENSOR_CORES[arch]}"
        if self.shared > SHARED[arch]:
            yield f"{self.shared} bytes of shared memory, there are {SHARED[arch]}"

    def show(self, arch: int, name: str) -> str:
        return (
            f"sm_{arch} {name:<42}{self.registers:>4} registers {self.spilled:>5} B spilled"
            f"{self.shared / 1024:>6.0f} KB shared {self.products:>4} {TENSOR_CORES[arch]}"
        )


def cases(arch: int) -> list[tuple[str, dict[str, Any]]]:
    """(module, what to compile) of all files, in a fixed order."""
    return [(m, case) for m in MODULES for case in import_module(f"kernels.{m}").gate(arch)]


def source(case: dict[str, Any]) -> Any:
    """The kernel with its types; `:16` behind one says that values are multiples of 16."""
    from triton.compiler import ASTSource

    kernel, constants = case["kernel"], case["constants"]
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def typed(kind: Any, *place: int) -> Any:
        if isinstance(kind, tuple):
            return tuple(typed(item, *place, i) for i, item in enumerate(kind))
        if kind.endswith(":16"):
            attributes[place] = [["tt.divisibility", 16]]
        return kind.removesuffix(":16")

    signature = {
        name: "constexpr" if name in constants else typed(case["signature"][name], i)
        for i, name in enumerate(kernel.arg_names)
    }
    return case.get("source", ASTSource)(kernel, signature, constants, attributes)


def check(arch: int, index: int) -> Result:
    """Compile one of `cases(arch)` and look at the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    _, case = cases(arch)[index]
    options = {"num_warps": case["warps"], "num_stages": case["stages"]}
    compiled = triton.compile(source(case), target=GPUTarget("cuda", arch, 32), options=options)
    known = Path(triton.knobs.cache.dir) / "kernels-check" / f"{compiled.hash}.json"
    if known.exists():
        return Result(*json.loads(known.read_text()))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(way, file.name) for way in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"cuobjdump -res-usage printed {usage!r}"
    products = len(re.findall(rf"\b{TENSOR_CORES[arch]}\b", code))
    result = Result(int(found[1]), int(found[2]), compiled.metadata.shared, products)
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(result))
    return result


def _cuobjdump(way: str, file: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, way, file], capture_output=True, text=True, check=True).stdout


def run(only: str, processes: int) -> int:
    """Check all cases whose name holds `only`; the number of those that failed."""
    import triton

    start, failed, jobs = time.monotonic(), 0, []
    for arch in SHARED:
        for index, (_, case) in enumerate(cases(arch)):
            if only in f"sm_{arch} {case['name']}":
                jobs.append((arch, index, case))
    assert len(jobs) <= MOST_CASES, f"{len(jobs)} compilations, at most {MOST_CASES}"
    with ProcessPoolExecutor(processes) as pool:
        results = [pool.submit(check, arch, index) for arch, index, _ in jobs]
        for (arch, _, case), result in zip(jobs, results, strict=True):
            try:
                faults = list(result.result().faults(arch, case))
                line = result.result().show(arch, case["name"])
            except Exception as error:
                faults, line = ["does not compile"], f"sm_{arch} {case['name']}: {error}"
            failed += bool(faults)
            print(line + "".join(f"  FAIL: {fault}" for fault in faults), flush=True)
    seconds = time.monotonic() - start
    print(f"triton {triton.__version__}: {len(jobs)} kernels, {failed} failed, {seconds:.0f} s")
    return failed


def environment(version: str) -> Path:
    """The Python of an environment with this Triton alone, made at the first call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    place = cache / "llama-pretraining" / f"triton-{version}"
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        venv.create(place, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", f"triton=={version}"], check=True)
        (place / "complete").touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser("python -m kernels.check", description=__doc__)
    parser.add_argument("--only", default="", help="part of a name, as 'sm_90 dq'")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--triton", metavar="VERSION", help="3.6.0, in its own environment")
    args = parser.parse_args()
    if args.triton:
        command = [environment(args.triton), "-m", "kernels.check", "--only", args.only]
        return subprocess.run([*command, "--processes", str(args.processes)]).returncode
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        return min(run(args.only, args.processes), 1)
    except ImportError as error:
        print(f"error: compiling needs triton ({error}): pip install triton", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
