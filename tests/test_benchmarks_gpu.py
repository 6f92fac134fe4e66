"""The benchmarks for GPUs: what they measure with, at tiny sizes on a CPU, and their refusal."""

import os
import subprocess
import sys
from importlib import import_module
from unittest.mock import Mock

import pytest
import torch
from test_repo import ROOT

from benchmarks import harness, ops, recompute, train_gpu
from llama.cli import UserError
from llama.config import Config, Count, DataConfig, ModelConfig, TrainConfig
from llama.parallel import layout
from llama.runtime import world

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("name", ["ops", "train_gpu"])
def test_without_a_gpu_they_say_so(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "needs a CUDA GPU" in done.stderr, done.stderr


def test_one_command_runs_them_all_within_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    script = [str(ROOT / "scripts" / "gpu.sh")]
    lines = subprocess.run(
        ["bash", *script], env=os.environ | {"PYTHON": "echo"}, capture_output=True, text=True
    ).stdout.splitlines()
    asked = [line.split()[1:] for line in lines if line.startswith("-m ") and "--save" in line]
    assert [name for name, *_ in asked] == [f"benchmarks.{x}" for x in (
        "ops", "recompute", "train_gpu", "train_gpu", "attention")]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # this one runs on CPUs too
    monkeypatch.setattr(recompute, "measure", Mock(side_effect=UserError("needs a CUDA GPU")))
    for name, *options in asked:
        # every option is known
        with pytest.raises(UserError, match="needs a CUDA GPU"):
            import_module(name).main(options)


@pytest.mark.parametrize("name", ["llama_1b", "llama_7b"])
def test_a_configuration_for_many_gpus_is_one_for_one(name: str) -> None:
    cfg = train_gpu.load(str(ROOT / "configs" / f"{name}.yaml"), 2048, 2, 16)
    at = layout.resolve(cfg, 1, True)
    assert (at.micro_batch, cfg.train.batch_tokens, at.reshard) == (2, 65_536, False)


def test_a_peer_that_is_not_installed_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> None:
        raise UserError("transformers is not installed")

    monkeypatch.setattr(train_gpu, "WHO", {"transformers": missing, "ours": missing})
    here = world.World(0, 1, 0, CPU, False)
    assert train_gpu.measure("transformers", Config(), here, 1) is None
    assert "transformers: transformers is not installed" in capsys.readouterr().out
    with pytest.raises(UserError):
        train_gpu.measure("ours", Config(), here, 1)
    assert harness.versions("torch", "not_there").keys() == {"python", "torch"}


def test_bandwidths_of_every_operation_by_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "VOCABULARY", 64)
    found = ops.measure("tiny", (8, 128, 48), CPU)
    assert {"rms_norm by ours", "rms_norm by torch", "rope by compiled"} <= found.keys()
    assert all(rate > 0 for name, rates in found.items() for rate in rates if name != "loss")
    assert found["loss"][0] > 0 and ops.adamw(CPU, matrices=2, n=8) > 0


def test_a_step_of_both() -> None:
    cfg = Config(
        model=ModelConfig(dim=32, n_layers=1, n_heads=2, ffn_dim=48, vocab_size=40),
        data=DataConfig(seq_len=8),
        train=TrainConfig(batch_tokens=Count(32), micro_batch=2, compile=False),
    )
    here = world.start()
    try:
        for make in train_gpu.WHO.values():
            assert train_gpu.seconds(make(cfg, here), cfg, CPU, 2) > 0
    finally:
        world.stop()


def test_time_is_told_apart_by_kind() -> None:
    kernels = [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTT", 0.0, 2.0),
        ("flash_fwd_kernel<cutlass::bfloat16_t>", 2.0, 3.0),
        # beside the last one, and begun before it ended
        ("_dkdv", 2.5, 4.0),
        ("softmax_kernel", 5.0, 5.5),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", 5.5, 6.0),
        ("rms_norm_backward_kernel", 6.0, 6.25),
    ]
    assert train_gpu.by_kind(kernels) == {
        "GEMM": 2.0,
        "attention": 2.5,
        "loss": 0.5,
        "optimizer": 0.5,
        "elementwise": 0.25,
        "idle": 1.0,
    }


def test_the_floor_of_llama_1b() -> None:
    """1.3 B at T = 2048, 65,536 tokens a step, 790 TFLOP/s and 4.3 TB/s: 12.1 µs a token."""
    cfg = Config(
        model=ModelConfig(dim=2048, n_layers=24, n_heads=16, vocab_size=32_000),
        data=DataConfig(seq_len=2048),
        train=TrainConfig(batch_tokens=Count(65_536)),
    )
    least = {k: 1e6 * s / 65_536 for k, s in train_gpu.floor(cfg, 790e12, 4.3e12).items()}
    assert least["GEMM"] == pytest.approx(9.86, rel=0.01)
    assert least["attention"] == pytest.approx(0.89, rel=0.01)
    assert least["elementwise"] == pytest.approx(1.10, rel=0.01)
    assert least["optimizer"] == pytest.approx(0.18, rel=0.03)
    assert sum(least.values()) == pytest.approx(12.08, rel=0.01)
