"""Speed of attention beside its peers on a GPU: `python -m benchmarks.attention`.

In: head sizes and sequence lengths, always 16,384 tokens of 2,048 features. Out: TFLOP/s of the
forward and the backward pass of our kernels, of torch's flash and cuDNN backends, of compiled
FlexAttention and of xformers; how far each is from float32; a plot over T. A causal forward pass
counts 2·B·H·T²·D operations, a backward pass 2.5 times as many (Dao 2023).
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu, harness
from kernels import attention, reference
from llama import cli

TOKENS, FEATURES = 16_384, 2_048
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways(where: torch.device, head_dim: int) -> dict[str, Way | str]:
    """Ours and its peers by name; for one that cannot run, the reason."""
    found: dict[str, Way | str] = {}
    names = {"triton": True, "triton fused": False, "gluon": True, "xformers": True}
    for label, deterministic in names.items():
        name = label.split(" ")[0]
        try:
            backend = attention.choose(name, where, torch.bfloat16, head_dim, deterministic)
            found[label] = partial(attention.attention, backend=backend)
        except ValueError as error:
            found[label] = str(error)
    kinds = ("FLASH_ATTENTION", "CUDNN_ATTENTION") if where.type == "cuda" else ("MATH",)
    for kind in kinds:
        found[f"sdpa {kind.lower()}"] = partial(_sdpa, kind=SDPBackend.__members__[kind])
    found["flex"] = _flex if where.type == "cuda" else "it is compiled for a GPU"
    return found


def _sdpa(q: Tensor, k: Tensor, v: Tensor, kind: SDPBackend) -> Tensor:
    with sdpa_kernel(kind):
        return attention.attention(q, k, v, backend="sdpa")


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    function, mask = _compiled_flex(q.shape[2], q.device)
    return function(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


@cache
def _compiled_flex(T: int, where: torch.device) -> tuple[Callable[..., Tensor], Any]:
    from torch.nn.attention import flex_attention as flex

    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=where)
    # after eight shapes it would go on uncompiled
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex.flex_attention, dynamic=False), mask


def inputs(T: int, D: int, group: int, where: torch.device) -> list[Tensor]:
    """q, k, v and the gradient of the output, random: zeros run faster than anything real."""
    shape = max(TOKENS // T, 1), T, FEATURES // D, D
    few = *shape[:2], shape[2] // group, D
    drawn = [torch.randn(s, device=where).bfloat16() for s in (shape, few, few, shape)]
    return [x.requires_grad_() for x in drawn[:3]] + drawn[3:]


def measure(way: Way, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> dict[str, float]:
    """TFLOP/s of both passes, and the error's norm over the output's, for the first window."""
    out = way(q, k, v)
    B, T, H, D = q.shape
    flops = 2 * B * H * T * T * D / 1e12
    forward = gpu.seconds(lambda: way(q, k, v), q.device)
    backward = gpu.seconds(
        lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), q.device
    )
    rows = slice(0, min(T, 2048))
    with torch.no_grad():
        exact = reference.attention(*(x[:1, rows].float() for x in (q, k, v)))
        error = (out[:1, rows] - exact).norm() / exact.norm()
    return {
        "forward": flops / forward,
        "backward": 2.5 * flops / backward,
        "both": 3.5 * flops / (forward + backward),
        "error": float(error),
    }


def row(T: int, D: int, group: int, where: torch.device) -> dict[str, Any]:
    """Every way at one shape: its figures, or why there are none."""
    found: dict[str, Any] = {}
    tensors = inputs(T, D, group, where)
    for name, way in ways(where, D).items():
        try:
            found[name] = way if isinstance(way, str) else measure(way, *tensors)
        # whatever ails one of them, as Triton's own errors: the others are measured
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(f"\nT {T}, D {D}, H/K {group}: TFLOP/s forward, backward, both; error")
    for name, x in found.items():
        *speeds, error = x.values() if isinstance(x, dict) else (x,)
        figures = " ".join(f"{speed:6.0f}" for speed in speeds)
        print(f"  {name:22}{figures}  {error:.1e}" if speeds else f"  {name:22}{error}")
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    """TFLOP/s over T at head size 128, a line for each way."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    rows = {int(key.split()[1]): x for key, x in results.items() if key.endswith("D 128 group 1")}
    for axis, what in zip(axes, ("forward", "backward"), strict=True):
        for name in dict.fromkeys(name for x in rows.values() for name in x):
            points = [(T, x[name][what]) for T, x in rows.items() if isinstance(x[name], dict)]
            axis.plot([T for T, _ in points], [y for _, y in points], marker="o", label=name)
        axis.set(title=what, xlabel="T", ylabel="TFLOP/s", xscale="log")
    axes[0].legend()
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    p = harness.parser("attention", "Attention beside its peers on a GPU.")
    p.add_argument("--seq_len", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    p.add_argument("--head_dim", type=int, nargs="+", default=[128, 64], choices=[64, 128])
    a = p.parse_args(argv)
    where = gpu.device()
    results: dict[str, Any] = harness.versions("torch", "triton")
    for D, group, T in product(a.head_dim, (1, 4), a.seq_len):
        results[f"T {T} D {D} group {group}"] = row(T, D, group, where)
        if a.save:
            # what was measured stays, also where time runs out
            path = harness.save("attention", results, gpu.name())
            plot(results, path.with_suffix(".png"))
    harness.keep(a.save, "attention", results, gpu.name())


if __name__ == "__main__":
    cli.run(main)
