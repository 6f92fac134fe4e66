"""What a run says: what is to come before the first line, then a line and a row at log steps.

A state and what a step measured go in; text on rank 0's terminal and the values of a metrics row
come out. Reading them is the only time the loop waits for the device.
"""

import math
import time
from typing import Any

import torch

from llama import costs, optim
from llama.cli import show_count, show_seconds
from llama.data import mixture
from llama.parallel import fsdp
from llama.runtime import metrics, stragglers
from llama.runtime.state import State, Step
from llama.runtime.world import peak_bytes

# A step reaches about this share of the speed of bare matrix products, on CPUs and GPUs alike.
USUAL_SHARE = 0.4


def announce(state: State) -> None:
    """What a person wants to know before the first line appears."""
    cfg, here = state.cfg, state.world
    windows = state.order.segment(state.step).batch_windows
    micro_steps = math.ceil(windows / (state.micro_batch * state.place.data_size))
    flops = windows * cfg.data.seq_len * costs.flops_per_token(cfg.model, cfg.data.seq_len)[0]
    seconds = flops / here.size / (USUAL_SHARE * matmul_flops(here.device, state.dtype))
    here.say(
        f"{cfg.name}: {show_count(costs.parameters(cfg.model))} parameters, {state.steps} steps of "
        f"{show_count(windows * cfg.data.seq_len)} tokens\n"
        f"{here.size} x {here.device.type}, {str(state.dtype).removeprefix('torch.')}, "
        f"attention: {state.backend}\n"
        f"{micro_steps} micro-step{'s' * (micro_steps > 1)} per step, each {state.micro_batch} "
        f"windows of {cfg.data.seq_len} tokens per process\n"
        f"first line after one step, about {show_seconds(max(seconds, 1))} (and compiling, if on); "
        f"then every {cfg.log.every} steps"
    )
    if cfg.optim.warmup_steps >= state.steps:
        here.say(
            f"WARNING: optim.warmup_steps {cfg.optim.warmup_steps} is longer than the run of "
            f"{state.steps} steps:\nthe learning rate never reaches {cfg.optim.lr}"
        )
    for sentence in fsdp.without_effect(state.model, cfg.parallel, micro_steps):
        here.say(f"WARNING: {sentence}")
    if cfg.guard.rerun:
        here.say("guard.rerun: each step waits for its loss and gradient norm before its update")
    for name in sorted(set(state.sources) - set(state.valid)):
        here.say(f"no validation for {name}: its held-out documents fill no window")
    assert isinstance(cfg.data.mixture, dict)
    counts = {name: source.n_tokens for name, source in state.sources.items()}
    here.say(mixture.plan_table(cfg.data.mixture, state.order.tokens(state.steps), counts) + "\n")
    here.say(metrics.HEADER)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device now, from a few milliseconds of one."""
    size = 4096 if device.type == "cuda" else 512
    # a generator of its own: the run's random numbers go on as if nothing had been asked
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(a, a)[0, 0].item()  # waits for the product
        spent.append(time.perf_counter() - began)
    return 2 * size**3 / min(spent)


def log_row(state: State, measured: Step, clock: metrics.Clock, waited_s: float) -> dict[str, Any]:
    """Numbers of a log step; reading them waits for the device. Rank 0 prints the line."""
    cfg, here = state.cfg, state.world
    loss, norm = float(measured.loss), float(measured.grad_norm)
    rate, waiting = clock.read(state.tokens, waited_s)
    peak = costs.peak_flops(here.chip)
    causal, palm = costs.flops_per_token(cfg.model, cfg.data.seq_len)
    each = rate / here.size
    row: dict[str, Any] = {
        "loss": loss,
        "lr": optim.learning_rate(cfg.optim, state.step - 1, state.steps),
        "grad_norm": norm,
        "tokens_per_s": rate,
        "tokens_per_s_gpu": each,
        "mfu_causal": each * causal / peak if peak else None,
        "mfu_palm": each * palm / peak if peak else None,
        "memory_gib": peak_bytes(here.device) / 2**30,
        "data_wait_pct": waiting,
        "checkpoint_stall_s": state.saver.take_stall(),
        "eta_s": (state.order.tokens(state.steps) - state.tokens) / rate,
    }
    row["spikes"], row["skipped_steps"], _ = map(int, state.guard.counts.tolist())
    compared = here.device.type == "cuda" and here.size > 1
    fixed_s = 1e12 / matmul_flops(here.device, state.dtype) if compared else None
    row |= stragglers.compare(state.pace, here, fixed_s)
    for name, (loss_sum, tokens) in zip(state.order.names, state.window.tolist(), strict=True):
        if tokens:
            row[f"loss/{name}"] = loss_sum / tokens
    state.window.zero_()
    here.say(metrics.line(state.step, state.steps, {"tokens": state.tokens, **row}))
    return row


def beside_plan(planned: dict[str, float], row: dict[str, Any]) -> str:
    """What the planner expected of a process, and what was measured."""
    pairs = ((key.removeprefix("planned_"), value) for key, value in planned.items())
    shown = (f"{key} {value:,.1f} and {row[key]:,.1f}" for key, value in pairs)
    return f"planned and real: {', '.join(shown)}"
