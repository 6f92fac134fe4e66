"""Speed of a training step beside transformers: `python -m benchmarks.train_step`.

In: shapes of a model. Out, per shape: seconds of a step (forward, backward, clipping, fused AdamW)
of this model and of transformers' LlamaForCausalLM with sdpa, eager and compiled, from the same
weights on the same batch, in turns in one process. Beside their ratios stand the share of the
machine's matrix-product peak and the peak memory of each in a process of its own.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, twin
from benchmarks.harness import Comparison
from llama import cli, costs, optim
from llama.config import ModelConfig, OptimConfig
from llama.model import Transformer
from llama.runtime import world

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    model: ModelConfig
    seq_len: int
    batch: int

    def tokens(self) -> Tensor:
        """Windows (B, T+1) of random tokens, the same at every call."""
        assert self.model.vocab_size
        draw = torch.Generator().manual_seed(0)
        size = (self.batch, self.seq_len + 1)
        return torch.randint(self.model.vocab_size, size, generator=draw)


BASE = ModelConfig(dim=256, n_layers=6, n_heads=8, ffn_dim=688, vocab_size=4096)
WIDE = ModelConfig(dim=512, n_layers=6, n_heads=8, ffn_dim=1376, vocab_size=8192)
SHAPES = {
    "base": Shape(BASE, 512, 8),
    "short": Shape(BASE, 256, 16),
    "long": Shape(BASE, 1024, 4),
    "quickstart": Shape(ModelConfig(vocab_size=4096), 256, 32),
    "grouped": Shape(replace(BASE, n_kv_heads=2), 512, 8),
    "vocabulary": Shape(replace(BASE, vocab_size=32_000), 512, 8),
    "wide": Shape(WIDE, 512, 8),
}
OPTIM = OptimConfig()


# -- the two ---------------------------------------------------------------------------------------


def ours(model: Transformer, tokens: Tensor) -> Step:
    """A step of train.py on one process, without the data and the log."""
    optimizer = optim.build(model, OPTIM)

    def step() -> Tensor:
        losses, counts = model(tokens[:, :-1], tokens[:, 1:])
        loss = losses.sum() / counts.sum()
        loss.backward()
        optim.step(optimizer, OPTIM.lr, OPTIM.clip, loss=loss.detach())
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def both(shape: Shape, compiled: bool) -> tuple[Step, Step]:
    """Steps of ours and theirs, from the same weights."""
    model = Transformer(shape.model)
    model.init_weights(0)
    other = twin.of(model, shape.seq_len)
    if compiled:
        for block in model.layers:
            block.compile()
        # as a whole: so theirs is the fastest, as its loss is fused as well
        other.compile()
    return ours(model, shape.tokens()), partial(twin.step(other, OPTIM), shape.tokens())


# -- measurements ----------------------------------------------------------------------------------


def measure(shape: Shape, n: int, compiled: bool) -> dict[str, Any]:
    """All in this process, in turns."""
    steps: tuple[Step, ...] = both(shape, compiled=False)
    if compiled:
        steps += both(shape, compiled=True)
    losses, first = [], []
    for step in steps:
        began = time.perf_counter()
        losses.append(step())
        first.append(time.perf_counter() - began)
    turns = harness.rounds(n, *steps)
    speeds = {"eager": Comparison.of(turns)}
    if compiled:
        speeds["compiled"] = Comparison.of(turns, 2, 3)
        speeds["compiled, theirs eager"] = Comparison.of(turns, 2, 1)
    peak = matmul_flops_per_s()
    return {
        "speed": speeds,
        "peak_share": {k: flops(shape) / s.ours_cpu_s.median / peak for k, s in speeds.items()},
        "matmul_flops_per_cpu_s": peak,
        "first_step_s": first,
        "loss_difference": float((torch.stack(losses) / losses[0] - 1).abs().max()),
        "peak_bytes": {"ours": memory(shape, 0), "theirs": memory(shape, 1)},
        "parameters": costs.parameters(shape.model),
        "shape": shape,
    }


def flops(shape: Shape) -> int:
    """Of one step; only the causal half of attention counts."""
    per_token, _ = costs.flops_per_token(shape.model, shape.seq_len)
    return per_token * shape.seq_len * shape.batch


def matmul_flops_per_s(n: int = 2048) -> float:
    """What a large float32 matrix product reaches, per second of CPU time."""
    a, b = torch.randn(2, n, n)
    return 2 * n**3 / min(harness.timed(lambda: a @ b).cpu_s for _ in range(6))


def memory(shape: Shape, who: int) -> int:
    """Most bytes that two eager steps of one of `both` add to what is there before the first."""
    # a process of its own, not a fork of this one, whose memory it would share
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(_growth, shape, who, torch.get_num_threads()).result()


def _growth(shape: Shape, who: int, threads: int) -> int:
    torch.set_num_threads(threads)
    step = both(shape, compiled=False)[who]
    before = world.peak_bytes()
    step(), step()
    return world.peak_bytes() - before


# -- the command -----------------------------------------------------------------------------------


def show(name: str, found: dict[str, Any]) -> str:
    """The table of one shape."""
    header = (name, "ours s", "theirs s", "ratio", "ratio of CPU time", "of matmul peak")
    rows = []
    for what, speed in found["speed"].items():
        seconds = (f"{x.median:.3f}" for x in (speed.ours_s, speed.theirs_s))
        ratios = speed.ratio.show(), speed.ratio_cpu.show()
        rows.append((what, *seconds, *ratios, f"{found['peak_share'][what]:.0%}"))
    sizes = (cli.show_bytes(found["peak_bytes"][who]) for who in ("ours", "theirs"))
    return (
        f"{cli.table(header, rows)}\na step's memory: ours {' and theirs '.join(sizes)}; first"
        f" steps: {', '.join(f'{s:.1f}' for s in found['first_step_s'])} s; first losses within"
        f" {found['loss_difference']:.0e}\n"
    )


def main(argv: list[str]) -> None:
    p = harness.parser("train_step", "A training step beside transformers.")
    p.add_argument("--shape", type=str, nargs="+", default=["base"], choices=list(SHAPES))
    p.add_argument("--pairs", type=int, default=10, help="turns of each")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--compiled", action="store_true", help="compare the compiled models as well")
    a = p.parse_args(argv)
    torch.set_num_threads(a.threads)
    results = {}
    for name in a.shape:
        results[name] = measure(SHAPES[name], a.pairs, a.compiled)
        print(show(name, results[name]), flush=True)
    facts = {"threads": a.threads, **harness.versions("torch", "transformers")}
    name = f"train_step{'_compiled' * a.compiled}_{a.threads}_threads"
    harness.keep(a.save, name, {**facts, "shapes": results})


if __name__ == "__main__":
    cli.run(main)
