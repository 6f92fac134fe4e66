"""The compile gate, the tuner and the attention benchmark, as far as they go without a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import attention as benchmark  # noqa: E402
from kernels import attention_launch as launch  # noqa: E402
from kernels import check, tune  # noqa: E402

COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], env=COMPILED, capture_output=True, text=True
    )


def test_what_fails_the_gate() -> None:
    fast = {"products": True, "spills": False}
    assert not list(check.Result(255, 0, 100, 8).faults(90, fast))
    assert list(check.Result(255, 8, 100, 8).faults(90, fast)) == ["8 bytes spilled"]
    assert not list(check.Result(255, 8, 100, 8).faults(90, fast | {"spills": True}))
    assert list(check.Result(255, 0, 100, 0).faults(80, fast)) == ["no HMMA"]
    (fault,) = check.Result(255, 0, 200_000, 8).faults(80, fast)
    assert "166912" in fault and not list(check.Result(255, 0, 200_000, 8).faults(90, fast))


def test_the_gate_knows_every_kernel_and_stays_small() -> None:
    found = {arch: [f"{m} {case['name']}" for m, case in check.cases(arch)] for arch in (80, 90)}
    for arch, names in found.items():
        assert len(set(names)) == len(names)
        for D in (32, 64, 128, 256):
            for kernel in ("forward", "dkdv", "dq"):
                assert f"attention_launch {kernel} bf16 D {D} documents" in names, (arch, D)
    # gluon's four are there under another Triton
    assert sum(map(len, found.values())) + 4 <= check.MOST_CASES


def test_one_kernel_through_the_gate(tmp_path: Path) -> None:
    done = run("kernels.check", "--only", "sm_80 delta", "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 B spilled" in done.stdout and "1 kernels, 0 failed" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_kernels_through_the_gate() -> None:
    done = run("kernels.check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_kernels_under_the_oldest_triton() -> None:
    try:
        check.environment("3.6.0")
    except subprocess.CalledProcessError:
        pytest.skip("no package index gives triton 3.6.0 here")
    done = run("kernels.check", "--triton", "3.6.0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gluon forward bf16 D 128" in done.stdout


def test_the_fastest_tile_that_runs() -> None:
    times = {(64, 64): 3.0, (128, 64): 2.0}

    def seconds(tile: list[int]) -> float:
        return times[tile[0], tile[1]]

    candidates = [[32, 32, 4, 1], [64, 64, 4, 2], [128, 64, 8, 2]]
    assert tune.fastest(candidates, seconds) == ([128, 64, 8, 2], 2.0)
    with pytest.raises(ValueError, match="none of the tiles"):
        tune.fastest(candidates[:1], seconds)


def test_the_table_is_written_as_it_lies() -> None:
    assert tune.show(launch.table()) == launch.TABLE.read_text()
    assert json.loads(tune.show(launch.table())) == launch.table()


@no_gpu
@pytest.mark.parametrize("module", ["kernels.tune", "benchmarks.attention"])
def test_without_a_gpu_they_say_so(module: str) -> None:
    done = run(module)
    assert done.returncode == 2 and "needs a CUDA GPU" in done.stderr, done.stderr


def test_every_shape_of_flex_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the first eight: there are sixteen."""
    made = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable[..., object]:
        made.append(graph)
        return graph.forward

    compiled = partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compiled)
    # which puts back what the benchmark sets
    with torch._dynamo.config.patch(recompile_limit=8):
        for T in (128, 256, 384, 512):
            for heads, D in product((1, 2), (16, 32, 64)):
                q = torch.randn(1, T, 2, D)
                k = torch.randn(1, T, heads, D)
                before = len(made)
                benchmark._flex(q, k, k)
                assert len(made) > before, (T, heads, D)


def test_what_ails_one_way_does_not_end_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    def broken(*_: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(benchmark, "TOKENS", 32)
    monkeypatch.setattr(benchmark, "FEATURES", 128)
    monkeypatch.setattr(benchmark, "ways", lambda *_: {"triton": broken, "flex": "not here"})
    found = benchmark.row(32, 64, 1, torch.device("cpu"))
    assert "OutOfResources" in found["triton"] and found["flex"] == "not here"


def test_a_row_of_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(benchmark, "TOKENS", 64)
    monkeypatch.setattr(benchmark, "FEATURES", 256)
    found = benchmark.row(32, 128, 2, torch.device("cpu"))
    figures = found["sdpa math"]
    assert figures["forward"] > 0 and figures["backward"] > 0 and figures["error"] < 0.02
    assert "CUDA GPU" in found["triton"] or "bfloat16" in found["triton"]
    benchmark.plot({"T 32 D 128 group 1": found}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
