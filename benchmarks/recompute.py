"""What each way of recomputing keeps and costs: `python -m benchmarks.recompute`.

In: a shape of a model. Out, for every mode of parallel.recompute and for torch's own wrappers
around the same blocks: bytes kept per token and block, and the share of the matrix products' FLOPs
done again, beside the arithmetic of llama/costs.py; and the time of a forward and backward pass
over that of `none`. On a GPU in bfloat16 and by the clock; elsewhere in float32, by CPU time.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.harness import Comparison
from benchmarks.train_step import SHAPES
from kernels import attention
from llama import cli, costs
from llama.config import ModelConfig
from llama.costs import Layout
from llama.model import Transformer
from llama.parallel import recompute
from llama.plan.layouts import MODES

# of all that none keeps
BUDGET = 0.5
# the policy of torch's own documentation, with the operators that the models end in
POLICY = partial(create_selective_checkpoint_contexts, recompute.DEAR)
WRAPPERS = {
    "torch, full": (checkpoint_wrapper, "full"),
    "torch, selective": (partial(checkpoint_wrapper, context_fn=POLICY), "selective"),
}


def build(cfg: ModelConfig, way: str, modes: list[str], where: torch.device) -> Transformer:
    """A model of `cfg.n_layers` blocks; `modes` is repeated over them."""
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    name = "triton" if where.type == "cuda" else "auto"
    model = Transformer(cfg, attention.choose(name, where, dtype, cfg.head_dim))
    model.init_weights(0)
    if way in WRAPPERS:
        for i, block in enumerate(model.layers):
            model.layers[i] = WRAPPERS[way][0](block)
    else:
        recompute.apply(model, modes * (cfg.n_layers // len(modes)))
    return model.to(where, dtype)


def forward(model: Transformer, tokens: Tensor) -> Tensor:
    losses, _ = model(tokens[:, :-1], tokens[:, 1:])
    return losses.sum()


def step(model: Transformer, tokens: Tensor) -> None:
    forward(model, tokens).backward()
    model.zero_grad(set_to_none=True)
    if tokens.is_cuda:
        torch.cuda.synchronize()


def kept(model: Transformer, tokens: Tensor) -> int:
    """Bytes alive between the forward and the backward pass."""
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        loss = forward(model, tokens)
        total: int = tracker.get_tracker_snapshot()[tokens.device]["Total"]
    del loss
    return total - sum(p.nbytes for p in model.parameters())


def products_again(cfg: ModelConfig, modes: list[str]) -> float:
    """Share of a step's matrix products, without attention's: all forward ones of a block but the
    last, at which torch stops."""
    made = sum(rows * columns for rows, columns in costs.made_again(cfg))
    return modes.count("full") * 2 * made / (6 * costs.matmul_parameters(cfg))


def flops(model: Transformer, tokens: Tensor) -> int:
    """Of the matrix products of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        step(model, tokens)
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def measure(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """A row for each way; bytes of a block are the difference that more blocks make."""
    shape, where = SHAPES[name], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, cfg = shape.tokens().to(where), shape.model
    twice = replace(cfg, n_layers=2 * cfg.n_layers)
    on_gpu = where.type == "cuda"
    size = 2 if on_gpu else 4
    at = Layout(shape.seq_len, shape.batch, element_bytes=size, own_attention=on_gpu)
    budget = int(BUDGET * costs.kept(cfg, at))
    ways = {mode: costs.modes(cfg, replace(at, recompute=mode)) for mode in MODES}
    ways["budget"] = costs.modes(cfg, replace(at, recompute="budget", budget=budget))
    ways |= {way: [mode] * cfg.n_layers for way, (_, mode) in WRAPPERS.items()}
    models = {way: build(cfg, way, modes, where) for way, modes in ways.items()}
    turns = harness.rounds(rounds, *(partial(step, model, tokens) for model in models.values()))
    step_flops = 6 * costs.matmul_parameters(cfg) * at.tokens
    least = flops(models["none"], tokens)
    found = {}
    for i, (way, modes) in enumerate(ways.items()):
        more = kept(build(twice, way, modes, where), tokens) - kept(models[way], tokens)
        formula = sum(costs.kept_by_block(cfg, at, mode) for mode in modes)
        ratio = Comparison.of(turns, i, 0)
        found[way] = {
            "bytes": more / cfg.n_layers / at.tokens,
            "formula": formula / cfg.n_layers / at.tokens,
            "products again": (flops(models[way], tokens) - least) / step_flops,
            "products again, formula": products_again(cfg, modes),
            "time": 1 / (ratio.ratio if tokens.is_cuda else ratio.ratio_cpu).median,
        }
    return found


def main(argv: list[str]) -> None:
    """Measure every way in turns."""
    p = harness.parser("recompute", "What each way of recomputing keeps and costs.")
    p.add_argument("--shape", default="base", choices=sorted(SHAPES), help="of the model")
    p.add_argument("--rounds", type=int, default=9, help="forward and backward passes of each")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    found = measure(args.shape, args.rounds)
    rows = [
        (
            way,
            f"{row['bytes']:,.0f}",
            f"{row['formula']:,.0f}",
            f"{row['products again']:.1%}",
            f"{row['products again, formula']:.1%}",
            f"{row['time']:.2f}",
        )
        for way, row in found.items()
    ]
    header = ("recompute", "bytes/token/block", "formula", "products again", "formula")
    print(cli.table((*header, "time, x none"), rows))
    harness.keep(args.save, "recompute", {args.shape: harness.versions("torch") | found})


if __name__ == "__main__":
    cli.run(main)
