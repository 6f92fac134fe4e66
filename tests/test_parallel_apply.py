"""What is applied to a model from outside: when blocks are compiled on a CPU."""

import shutil

import pytest
import torch

from llama.config import Config, Count, ModelConfig
from llama.parallel import apply


def config(tokens: float, seq_len: int = 512) -> Config:
    model = ModelConfig(dim=256, n_layers=6, n_heads=8, ffn_dim=688, vocab_size=4096)
    cfg = Config(model=model)
    cfg.train.tokens, cfg.data.seq_len = Count(tokens), seq_len
    return cfg


def test_a_cpu_compiles_for_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    # 39.5 MFLOP a token: 0.1 TFLOP/s train 2,500 tokens/s, and 7 % of 1,286 s are 90 s
    assert not apply.worth_compiling(config(3.2e6))
    assert apply.worth_compiling(config(3.3e6))
    assert apply.worth_compiling(config(3.2e6, seq_len=1024))
    # more cores are done before they have gained
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert not apply.worth_compiling(config(12.8e6))
    assert apply.worth_compiling(config(13.2e6))


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not apply.worth_compiling(config(1e12))
