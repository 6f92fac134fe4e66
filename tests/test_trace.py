"""Where time went: traces made by hand, answers worked out by hand, and what cannot be read."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama import trace
from llama.cli import UserError

ROOT = Path(__file__).parent.parent
Event = dict[str, Any]


def event(cat: str, name: str, start: float, end: float, tid: Any = 1, **args: Any) -> Event:
    """A complete event from `start` to `end`, in microseconds."""
    return {
        "ph": "X", "cat": cat, "name": name, "ts": 1e12 + start, "dur": end - start,
        "pid": 1, "tid": tid, "args": args,
    }  # fmt: skip


def kernel(
    name: str, start: float, end: float, asked: float, stream: int, tid: int = 1
) -> list[Event]:
    """A kernel and the call that launched it."""
    kernel.number += 1  # type: ignore[attr-defined]
    number = kernel.number  # type: ignore[attr-defined]
    launch = event("cuda_runtime", "cudaLaunchKernel", asked, asked + 1, tid, correlation=number)
    return [launch, event("kernel", name, start, end, stream, correlation=number)]


kernel.number = 0  # type: ignore[attr-defined]


def written(run: Path, events: list[Event], name: str = "rank-0-steps-4-5", gpus: Any = ()) -> Path:
    path = run / "profile" / f"{name}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        name_event = {"ph": "M", "name": "process_name", "pid": 1, "args": {}}
        about = {"schemaVersion": 1, "deviceProperties": gpus}
        json.dump({**about, "traceEvents": [name_event, *events]}, file)
    return path


def on_a_gpu() -> list[Event]:
    """Two steps of a host that runs ahead of its GPU, on streams 7 (compute) and 20, 24 (NCCL).

    step 4: host 0-1000, its last kernel ends at 1400. step 5: host 1000-2300, kernels to 2200.
    """
    gather, reduce = "ncclDevKernel_AllGather_RING_LL", "ncclDevKernel_ReduceScatter_Sum_f32_RING"
    return [
        event("Trace", "PyTorch Profiler (0)", 0, 2500, "profiler"),
        event("user_annotation", "step 4", 0, 1000),
        event("gpu_user_annotation", "step 4", 100, 1400, 7),
        event("user_annotation", "data", 0, 50),
        event("user_annotation", "forward", 60, 500),
        event("cpu_op", "aten::linear", 100, 140),
        event("cpu_op", "aten::addmm", 110, 130),
        *kernel("nvjet_hsh_128x256", 100, 300, 112, 7),
        event("cpu_op", "_LinearCrossEntropy", 150, 170),
        event("cpu_op", "aten::mm", 155, 160),
        *kernel("softmax_kernel", 350, 400, 156, 7),
        *kernel(gather, 250, 350, 90, 20),
        # the autograd thread
        event("cpu_op", "llama::attention_backward", 600, 620, 2),
        *kernel("_dkdv", 500, 900, 610, 7, tid=2),
        *kernel(reduce, 850, 1200, 700, 24, tid=2),
        event("user_annotation", "optimizer", 800, 900),
        event("cpu_op", "aten::_fused_adamw_", 810, 890),
        *kernel("multi_tensor_apply_kernel", 1200, 1400, 820, 7),
        event("user_annotation", "step 5", 1000, 2300),
        event("user_annotation", "data", 1000, 1600),
        event("cpu_op", "aten::mul", 1700, 1710),
        # launched in step 5, but begun while step 4 still runs
        *kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 1300, 1500, 1650, 20),
        *kernel("vectorized_elementwise_kernel", 1750, 2000, 1705, 7),
        event("user_annotation", "save", 2100, 2200),
        # the host's own collectives are no work of the GPU
        event("user_annotation", "gloo:all_reduce", 2000, 2290, 3),
        {**kernel("", 2100, 2200, 2050, 9)[1], "cat": "gpu_memcpy", "name": "Memcpy DtoH"},
    ]


# the four that make up a step
PARTS = ("compute", "exposed communication", "waiting for data", "idle")


def microseconds(spent: dict[str, int], kinds: bool) -> dict[str, float]:
    """What is not nothing: of the kinds, or of what makes up the step."""
    return {
        name.strip(): value / 1000
        for name, value in spent.items()
        if value and (name.startswith("  ") if kinds else name in PARTS)
    }


def test_a_gpus_time_by_hand() -> None:
    (fourth, spent), (fifth, later) = trace.steps(on_a_gpu())
    # from the host's beginning to the last kernel
    assert (fourth, spent["step"]) == (4, 1_400_000)
    # 100-300, 350-400, 500-900, 1200-1400; NCCL alone 300-350 and 900-1200; nobody 50-100, 400-500
    assert microseconds(spent, kinds=False) == {
        "compute": 850, "exposed communication": 350, "waiting for data": 50, "idle": 150,
    }  # fmt: skip
    # 250-300, 850-900 and 100 of the next step's all-reduce beside the update
    assert spent["hidden communication"] == 200_000
    assert microseconds(spent, kinds=True) == {
        "matrix products": 200, "loss": 50, "attention": 400, "optimizer": 200,
        "all-gather": 100, "reduce-scatter": 350, "all-reduce": 100,
    }  # fmt: skip
    # 1400-2300: all-reduce to 1500, data to 1600, nobody to 1750, 2000-2100 and from 2200
    assert (fifth, later["step"]) == (5, 900_000)
    assert microseconds(later, kinds=False) == {
        "compute": 350, "exposed communication": 100, "waiting for data": 100, "idle": 350,
    }  # fmt: skip
    assert later["hidden communication"] == 0
    assert microseconds(later, kinds=True) == {
        "copies": 100, "norms, elementwise": 250, "all-reduce": 100, "save": 100,
    }  # fmt: skip


def test_a_cpus_time_by_hand() -> None:
    events = [
        event("user_annotation", "step 1", 0, 1000),
        event("user_annotation", "data", 0, 100),
        event("cpu_op", "aten::linear", 100, 300),
        event("cpu_op", "aten::mm", 120, 280),
        # python inside a function of ours counts as nobody's
        event("cpu_op", "_SwiGLU", 300, 400),
        event("cpu_op", "aten::silu", 320, 380),
        # a hook in the backward pass starts a reduction and waits for it
        event("cpu_op", "autograd::engine::evaluate_function: Hook", 400, 800),
        event("user_annotation", "FSDP::post_backward_reduce", 420, 780),
        event("cpu_op", "fsdp::chunk_cat", 430, 450),
        event("cpu_op", "c10d::_reduce_scatter_base_", 460, 480),
        event("user_annotation", "gloo:all_reduce", 470, 770, 5),
        # another thread computes meanwhile
        event("cpu_op", "aten::mul", 700, 750, 6),
        event("cpu_op", "c10d::allreduce_", 790, 800),
        event("user_annotation", "gloo:all_reduce", 795, 815, 5),
        event("cpu_op", "aten::scaled_dot_product_attention", 810, 900),
        event("user_annotation", "validation", 805, 950),
    ]
    random.shuffle(events)
    ((_, spent),) = trace.steps(events)
    assert microseconds(spent, kinds=False) == {
        # 200 + 60 + 20 + 50 + 90; 470-700, 750-770 and 795-810 alone
        "compute": 420, "exposed communication": 265, "waiting for data": 100, "idle": 215,
    }  # fmt: skip
    assert (spent["step"], spent["hidden communication"]) == (1_000_000, 55_000)
    assert microseconds(spent, kinds=True) == {
        "matrix products": 200, "norms, elementwise": 110, "copies": 20, "attention": 90,
        "reduce-scatter": 300, "all-reduce": 20, "validation": 145,
    }  # fmt: skip


def alone(*more: Event, host: int = 1000) -> list[Event]:
    """One step of a GPU: a product from 100 to 300, and what else is given."""
    return [
        event("user_annotation", "step 1", 0, host),
        *kernel("nvjet_hsh_128x256", 100, 300, 90, 7),
        *more,
    ]


@pytest.mark.parametrize(
    ("name", "cat", "around", "kind"),
    [
        # as NCCL, RCCL, torch's symmetric memory and FlashAttention 3 call theirs in real traces
        ("ncclDevKernel_Generic(ncclDevKernelArgsStorage<4096ul>)", "kernel", "c10d::allreduce_",
         "all-reduce"),
        ("ncclDevKernel_Generic_4(ncclDevKernelArgs)", "kernel", "c10d::_reduce_scatter_base_",
         "reduce-scatter"),
        ("mscclKernel_Sum_half_LL", "kernel", "c10d::allreduce_", "other collectives"),
        ("ncclSymkDevKernel_AllGather_LL", "kernel", "", "all-gather"),
        ("void (anonymous namespace)::multimem_all_reduce_kernel<c10::BFloat16, 16>", "kernel", "",
         "all-reduce"),
        ("void (anonymous namespace)::barrier_kernel(unsigned int**)", "kernel", "",
         "other collectives"),
        ("Memcpy PtoP (Device -> Device)", "gpu_memcpy", "", "other collectives"),
        ("void cutlass::device_kernel<flash::FlashAttnBwd<flash::Collective>>", "kernel", "",
         "attention"),
        ("__amd_rocclr_copyBuffer", "kernel", "", "copies"),
        ("Memcpy DtoD (Device -> Device)", "gpu_memcpy", "", "copies"),
    ],
)  # fmt: skip
def test_kernels_of_other_libraries(name: str, cat: str, around: str, kind: str) -> None:
    launch, ran = kernel(name, 400, 700, 350, 20)
    call = [event("cpu_op", around, 340, 360)] if around else []
    ((_, spent),) = trace.steps(alone(launch, {**ran, "cat": cat}, *call))
    assert microseconds(spent, kinds=True) == {"matrix products": 200, kind: 300}
    kinds = "exposed communication" if kind in trace.COLLECTIVES else "compute"
    assert microseconds(spent, kinds=False)[kinds] == 300 + 200 * (kinds == "compute")


def test_the_copies_of_a_checkpoint_belong_to_the_steps_they_run_in() -> None:
    copy = {**kernel("", 300, 1900, 310, 30)[1], "cat": "gpu_memcpy", "name": "Memcpy DtoH"}
    launch = event("cuda_runtime", "cudaMemcpyAsync", 310, 311, **copy["args"])
    more = [
        event("user_annotation", "step 2", 1000, 2000),
        *kernel("nvjet_hsh_128x256", 1100, 1800, 1090, 7),
    ]
    found = dict(trace.steps(alone(launch, copy, *more)))
    assert {n: spent["step"] for n, spent in found.items()} == {1: 1_000_000, 2: 1_000_000}
    assert {n: spent["  copies"] for n, spent in found.items()} == {1: 700_000, 2: 900_000}


def test_the_data_that_a_stopped_run_waited_for_is_no_step(tmp_path: Path) -> None:
    # the GPU is not done when the host has ended
    events = alone(event("user_annotation", "step 2", 200, 210), host=200)
    path = written(tmp_path, events, "rank-0-steps-1-1")
    (path.parent / "rank-0-steps-1-9.part.gz").write_bytes(b"")
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["rank", "0,", "ms", "step", "1"]


def test_events_that_lack_something() -> None:
    bare = {"ph": "X", "cat": "kernel", "name": "relu", "ts": 1e12 + 400, "dur": 100}
    overhead = {"ph": "X", "cat": "overhead", "name": "Buffer Flush", "ts": 1e12, "dur": 5}
    counters = event("cuda_profiler_range", "sm__cycles", 0, 900)
    ((_, spent),) = trace.steps(alone(bare, overhead, counters))
    assert spent["compute"] == 300_000


def test_cover_by_brute_force(rng: random.Random) -> None:
    for _ in range(300):
        low = rng.randrange(-5, 40)
        high = low + rng.randrange(40)
        spans = [(a, a + rng.randrange(20)) for a in rng.choices(range(60), k=rng.randrange(9))]
        there = {t for a, b in spans for t in range(a, b) if low <= t < high}
        assert trace.covered(trace.union(spans), low, high) == len(there)


# -- the command -----------------------------------------------------------------------------------


def command(run: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "llama.trace", str(run)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def test_tables_are_80_columns_wide_by_rank_and_step(tmp_path: Path) -> None:
    written(tmp_path, on_a_gpu())
    long = [
        moved
        for n in range(7)
        for moved in (
            event("user_annotation", f"step {n + 998}", n * 12e6, n * 12e6 + 12e6),
            event("cpu_op", "aten::mm", n * 12e6, n * 12e6 + 11e6),
        )
    ]
    written(tmp_path, long, "rank-10-steps-998-1004")
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split(",")[0] for line in lines if line.startswith("rank")] == ["rank 0"] + [
        "rank 10"
    ] * 3
    (exposed,) = (line for line in lines if line.startswith("exposed"))
    assert exposed.split() == ["exposed", "communication", "0.3", "25%", "0.1", "11%", "0.2", "20%"]
    (products,) = {line for line in lines if "products" in line and line.count("11000.0  92%") == 4}
    code = "import sys, llama.trace; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    done = command(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert f"{tmp_path} has no traces in profile/: train with --profile 10-12" in done.stderr
    path = written(tmp_path, on_a_gpu())
    whole = path.read_bytes()
    for spoilt in (
        whole[:-20],
        whole[:100],
        b"",
        b"{}",
        gzip.compress(b"[1]"),
        gzip.compress(b"{"),
        gzip.compress(b'{"traceEvents": [1]}'),
        gzip.compress(b'{"traceEvents": null}'),
        json.dumps({"traceEvents": on_a_gpu()}).encode(),
    ):
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match="is not a whole Chrome trace") as raised:
            trace.read(path)
        assert "\n" not in str(raised.value)
    written(tmp_path, [event("cpu_op", "aten::mm", 0, 1)])
    with pytest.raises(UserError, match="holds no step of train.py"):
        trace.read(path)
    # what the host did must not stand for the GPU
    host = [event("user_annotation", "step 1", 0, 9), event("cpu_op", "aten::mm", 0, 8)]
    written(tmp_path, host, gpus=[{"id": 0, "name": "NVIDIA H100"}])
    with pytest.raises(UserError, match="has nothing that the GPU did"):
        trace.read(path)
    written(tmp_path, [*host, {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1e12}])
    assert len(trace.read(path)) == 1


def test_a_rank_without_a_trace_is_named(tmp_path: Path) -> None:
    for rank in (0, 1, 4):
        # of other steps than the others'
        written(tmp_path, on_a_gpu(), f"rank-{rank}-steps-{rank + 4}-5")
    done = command(tmp_path)
    assert done.returncode == 0 and done.stdout.count("\nrank ") == 3
    assert done.stdout.startswith("WARNING: no trace of rank 2, 3\n")
