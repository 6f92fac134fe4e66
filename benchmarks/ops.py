"""Speed of the kernels beside their peers on a GPU: `python -m benchmarks.ops`.

In: shapes. Out: bytes/s of norm, SwiGLU and RoPE, forward and backward, by the kernels, by
torch.compile of the formula, by torch's own and by Liger where it is installed; the time of the
loss over that of its three matrix products, and its memory; bytes/s of clipping and AdamW.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpu, harness
from kernels import ops, reference
from llama import cli, optim
from llama.config import OptimConfig

# (tokens, width, feed-forward width)
SHAPES = {"1b": (32_768, 2048, 5632), "7b": (16_384, 4096, 11_008)}
VOCABULARY, HEAD_DIM, EPS = 32_000, 128, 1e-5

# Tensors of the first input's size that the forward and the backward pass move.
MOVED = {"rms_norm": (2, 3), "add_rms_norm": (4, 4), "swiglu": (3, 5), "rope": (2, 2)}


def inputs(shape: tuple[int, int, int], where: torch.device) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operation; tensors that need no gradient and numbers come last."""
    N, C, width = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=where).bfloat16().requires_grad_()

    x, residual, gain = draw(N, C), draw(N, C), draw(C)
    table = reference.rope_table(N, reference.rope_frequencies(HEAD_DIM, 10_000.0)).to(where)
    return {
        "rms_norm": (x, gain, EPS),
        "add_rms_norm": (x, residual, gain, EPS),
        "swiglu": (draw(N, width), draw(N, width)),
        "rope": (draw(1, N, C // HEAD_DIM, HEAD_DIM), table),
    }


def ways(name: str, where: torch.device) -> dict[str, Callable[..., Any]]:
    """Ours and its peers; Liger last, as its backward passes write over their arguments."""
    formula = getattr(reference, name)
    found = {
        "ours": getattr(ops, name),
        # for each shape anew, as a formula for any shape would be slower
        "compiled": torch.compile(formula, dynamic=False) if where.type == "cuda" else formula,
    }
    if name == "rms_norm":
        found["torch"] = lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return found
    theirs = {"rms_norm": functional.liger_rms_norm, "swiglu": functional.liger_swiglu}
    return found | {"liger": theirs[name]} if name in theirs else found


def bandwidth(
    name: str, function: Callable[..., Any], arguments: tuple[Any, ...], where: torch.device
) -> tuple[float, float]:
    """Bytes/s of the forward and the backward pass."""
    out = function(*arguments)
    out = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(y) for y in out]
    learned = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    forward = gpu.seconds(lambda: function(*arguments), where)
    backward = gpu.seconds(
        lambda: torch.autograd.grad(out, learned, grads, retain_graph=True), where
    )
    size = arguments[0].nbytes
    return MOVED[name][0] * size / forward, MOVED[name][1] * size / backward


def loss(shape: tuple[int, int, int], where: torch.device) -> tuple[float, int]:
    """Time of linear + cross-entropy with its gradients over that of the products alone, and the
    bytes it needs beyond inputs and gradients.
    """
    N, C, _ = shape
    x = torch.randn(N, C, device=where).bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(VOCABULARY, C, device=where)).bfloat16().requires_grad_()
    targets = torch.randint(VOCABULARY, (N,), device=where)

    def ours() -> None:
        losses = ops.linear_cross_entropy(x, weight, targets)
        torch.autograd.grad(losses.sum() / N, (x, weight))

    @torch.no_grad()
    def products() -> tuple[Tensor, Tensor]:
        logits = x @ weight.t()
        return logits @ weight, logits.t() @ x

    extra = gpu.peak_bytes(ours, where) - x.nbytes - weight.nbytes
    return gpu.seconds(ours, where, 10) / gpu.seconds(products, where, 10), extra


def adamw(where: torch.device, matrices: int = 64, n: int = 2048) -> float:
    """Bytes/s of clipping and torch's fused AdamW, if they moved no more than they must.

    32 bytes a parameter: the norm reads gradients, the update reads gradient, weight and moments
    and writes the last three. torch writes scaled gradients back: 36, so 89 % is the most.
    """
    model = nn.ParameterList(torch.randn(n, n, device=where) for _ in range(matrices))
    optimizer = optim.build(model, OptimConfig())
    for p in model:
        p.grad = torch.randn_like(p)
    return 32 * matrices * n * n / gpu.seconds(lambda: optim.step(optimizer, 1e-4, 1.0), where)


def measure(name: str, shape: tuple[int, int, int], where: torch.device) -> dict[str, Any]:
    """All operations of one shape, printed as they are made."""
    found: dict[str, Any] = {}
    for op, arguments in inputs(shape, where).items():
        for way, function in ways(op, where).items():
            found[f"{op} by {way}"] = bandwidth(op, function, arguments, where)
    rows = [(what, *(f"{rate / 1e12:.2f}" for rate in rates)) for what, rates in found.items()]
    print(cli.table((f"{name} {shape}", "forward TB/s", "backward TB/s"), rows))
    ratio, extra = found["loss"] = loss(shape, where)
    print(f"loss: {ratio:.3f} x its three products, {cli.show_bytes(extra)} extra\n")
    return found


def main(argv: list[str]) -> None:
    p = harness.parser("ops", "The kernels beside their peers on a GPU.")
    p.add_argument("--shape", type=str, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    a = p.parse_args(argv)
    where = gpu.device()
    results = {name: measure(name, SHAPES[name], where) for name in a.shape}
    facts = {"adamw_bytes_per_s": adamw(where), "copy_bytes_per_s": gpu.rates(where)[1]}
    print("  ".join(f"{key} {rate / 1e12:.2f}e12" for key, rate in facts.items()))
    whole = {**facts, **harness.versions("torch", "triton"), **results}
    harness.keep(a.save, "ops", whole, gpu.name())


if __name__ == "__main__":
    cli.run(main)
