"""Speed of training on one GPU beside transformers: `python -m benchmarks.train_gpu`.

In: a configuration and how much of it goes into a step. Out: tokens/s and MFU of train.py's own
step on random tokens and of transformers' Llama under torch.compile, and where the time of our step
goes, each kind of kernel next to the least that this chip needs for it.
"""

import gc
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import train
from benchmarks import gpu, harness, twin
from llama import cli, config, costs
from llama.cli import UserError
from llama.config import Config
from llama.data.writer import ShardWriter, Vocabulary, write_manifest
from llama.runtime import world

# What a kernel's name says of it; the first that matches, or else elementwise.
KINDS = {
    "attention": r"attention|attn|flash|fmha|^_(forward|delta|dq|dkdv)\b",
    "loss": r"softmax|nll_loss",
    "optimizer": r"adam|multi_tensor|lpnorm",
    "GEMM": r"gemm|nvjet|xmma|cutlass|splitk",
}

Step = Callable[[Tensor], object]


def windows(cfg: Config) -> Tensor:
    """Random tokens of a step (n, T+1)."""
    assert cfg.model.vocab_size
    size = (cfg.train.batch_tokens // cfg.data.seq_len, cfg.data.seq_len + 1)
    return torch.randint(cfg.model.vocab_size, size)


def ours(cfg: Config, here: world.World) -> Step:
    """train.py's step, of a run that it builds on shards of random tokens."""
    assert cfg.model.vocab_size
    vocabulary = Vocabulary("0" * 64, cfg.model.vocab_size, 1, 2)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "random"
        with ShardWriter(source, "0", vocabulary, valid_per_10k=0) as writer:
            writer.add("0", windows(cfg).flatten().numpy(), 1)
            for split, shard in writer.finish().items():
                write_manifest(source, split, vocabulary, [shard] if shard else [], {})
        cfg.data.path, cfg.data.mixture = folder, {"random": 1.0}
        state = train.build(cfg, here, source)
    print(f"attention by {state.backend}")
    return lambda tokens: train.step(state, tokens, torch.zeros(len(tokens), dtype=torch.long))


def theirs(cfg: Config, here: world.World) -> Step:
    """The same step with transformers: bfloat16 by autocast over float32 weights, compiled."""
    # on the GPU at once: 7B weights drawn on a CPU take minutes
    with here.device:
        model = twin.fresh(cfg.model, cfg.data.seq_len)
    if here.device.type == "cuda":
        model.compile()
    step = twin.step(model, cfg.optim, cfg.train.micro_batch, autocast=True)
    return lambda tokens: step(tokens.to(here.device))


WHO: dict[str, Callable[[Config, world.World], Step]] = {"transformers": theirs, "ours": ours}


def seconds(step: Step, cfg: Config, where: torch.device, n: int) -> float:
    """Of a step: n in a row, without waiting between them, after as many for warmth."""
    batches = [windows(cfg) for _ in range(n)]

    def work() -> None:
        for tokens in batches:
            step(tokens)
        gpu.wait(where)

    work()
    return harness.timed(work).wall_s / n


# -- where the time goes ---------------------------------------------------------------------------


def profile(step: Step, cfg: Config, where: torch.device) -> dict[str, float]:
    """Seconds of a step by kind of kernel."""
    tokens = windows(cfg)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        step(tokens)
        gpu.wait(where)
    on_gpu = [
        e for e in found.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation
    ]
    return by_kind([(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in on_gpu])


def by_kind(kernels: list[tuple[str, float, float]]) -> dict[str, float]:
    """Seconds of each kind among (name, start, end), and between them of nothing: idle."""
    times = dict.fromkeys((*KINDS, "elementwise", "idle"), 0.0)
    busy_until = min(start for _, start, _ in kernels)
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        matching = (kind for kind, words in KINDS.items() if re.search(words, name, re.I))
        times[next(matching, "elementwise")] += end - start
        times["idle"] += max(start - busy_until, 0)
        busy_until = max(busy_until, end)
    return times


def floor(cfg: Config, flops_per_s: float, bytes_per_s: float) -> dict[str, float]:
    """Seconds a step cannot do without: products at the chip's rate, the rest at its bandwidth.

    Attention makes its scores again in the backward pass: seven products where six count. Fused, a
    block moves 52 C + 16 F bytes a token in bfloat16 (norms and additions 32 C, RoPE 16 C, row sums
    in attention's backward pass 4 C, SwiGLU 16 F), the loss 6 V; clip and AdamW 38 a parameter.
    """
    m, T, tokens = cfg.model, cfg.data.seq_len, cfg.train.batch_tokens
    assert m.vocab_size
    return {
        "attention": 7 * m.n_layers * T * m.dim * tokens / flops_per_s,
        "loss": 6 * m.vocab_size * tokens / bytes_per_s,
        "optimizer": 38 * costs.parameters(m) / bytes_per_s,
        "GEMM": 6 * costs.matmul_parameters(m) * tokens / flops_per_s,
        "elementwise": m.n_layers * (52 * m.dim + 16 * m.hidden_dim) * tokens / bytes_per_s,
        "idle": 0.0,
    }


# -- the command -----------------------------------------------------------------------------------


def measure(who: str, cfg: Config, here: world.World, n: int) -> dict[str, Any] | None:
    """Speed, MFU and memory of one of the two, and of ours the milliseconds by kind of kernel."""
    try:
        step = WHO[who](cfg, here)
        speed = cfg.train.batch_tokens / seconds(step, cfg, here.device, n)
    except (torch.OutOfMemoryError, UserError) as error:
        # a peer that is not installed is left out, what is wrong with ours is not
        if who == "ours" and isinstance(error, UserError):
            raise
        print(f"{who}: {str(error).splitlines()[0]}")
        return None
    peak = costs.peak_flops(gpu.name()) or float("nan")
    causal, palm = (speed * f / peak for f in costs.flops_per_token(cfg.model, cfg.data.seq_len))
    memory = torch.cuda.max_memory_allocated()
    shares = f"MFU {causal:.1%} causal, {palm:.1%} PaLM"
    print(f"{who}: {speed:,.0f} tokens/s, {shares}, {cli.show_bytes(memory)}")
    found = {"tokens_per_s": speed, "mfu_causal": causal, "mfu_palm": palm, "peak_bytes": memory}
    if who == "transformers":
        return found
    least = floor(cfg, *gpu.rates(here.device))
    times = profile(step, cfg, here.device)
    table = {kind: (1e3 * times[kind], 1e3 * least[kind]) for kind in times}
    table["all"] = sum(ms for ms, _ in table.values()), 1e3 * sum(least.values())
    rows = [(kind, f"{ms:.1f}", f"{floor_ms:.1f}") for kind, (ms, floor_ms) in table.items()]
    print(cli.table(("a step of ours", "ms", "at least"), rows))
    return found | {"ms_and_floor": table}


def load(path: str, seq_len: int, micro_batch: int, accumulate: int) -> Config:
    """A configuration for one GPU, which keeps its bfloat16 weights over all of a step."""
    wanted = {
        "data.seq_len": seq_len,
        "train.micro_batch": micro_batch,
        "train.batch_tokens": seq_len * micro_batch * accumulate,
        "parallel.replicate": 1,
        "parallel.shard": 1,
        "parallel.reshard": "false",
    }
    return config.load(["--config", path, *(f"--{key}={value}" for key, value in wanted.items())])


def main(argv: list[str]) -> None:
    p = harness.parser("train_gpu", "Training on one GPU beside transformers.")
    p.add_argument("--config", type=str, default="configs/llama_1b.yaml")
    p.add_argument("--seq_len", type=int, default=2048, help="tokens of a window")
    p.add_argument("--micro_batch", type=int, default=16, help="windows of a forward pass")
    p.add_argument("--accumulate", type=int, default=4, help="forward passes of a step")
    p.add_argument("--steps", type=int, default=5, help="steps that are measured")
    p.add_argument("--who", type=str, nargs="+", default=list(WHO), choices=list(WHO))
    a = p.parse_args(argv)
    gpu.device()
    cfg = load(a.config, a.seq_len, a.micro_batch, a.accumulate)
    here, found = world.start(), {}
    for who in a.who:
        # one after the other: together they would not fit
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found[who] = measure(who, cfg, here, a.steps)
    sizes = {"seq_len": a.seq_len, "micro_batch": a.micro_batch, "accumulate": a.accumulate}
    facts = sizes | harness.versions("torch", "triton", "transformers") | found
    harness.keep(a.save, f"train_{cfg.name}", facts, gpu.name())
    world.stop()


if __name__ == "__main__":
    cli.run(main)
