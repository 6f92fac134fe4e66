"""What each way of recomputing keeps and costs: `python -m benchmarks.recompute`.

In: a shape of a model. Out, for every mode of parallel.recompute: bytes kept per token and block
beside the arithmetic of llama/costs.py, the share of the matrix products' FLOPs done again, and the
time of a forward and backward pass over that of `none`. `selective` and `full` are torch's own
checkpoint. On a GPU in bfloat16, elsewhere in float32.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.train_step import SHAPES
from kernels import attention
from llama import cli, costs
from llama.config import ModelConfig
from llama.model import Transformer
from llama.parallel import recompute
from llama.plan.layouts import MODES


def build(cfg: ModelConfig, mode: str, where: torch.device) -> Transformer:
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    name = "triton" if where.type == "cuda" else "auto"
    model = Transformer(cfg, attention.choose(name, where, dtype, cfg.head_dim))
    model.init_weights(0)
    recompute.apply(model, mode)
    return model.to(where, dtype)


def forward(model: Transformer, tokens: Tensor) -> Tensor:
    losses, _ = model(tokens[:, :-1], tokens[:, 1:])
    return losses.sum()


def step(model: Transformer, tokens: Tensor) -> None:
    forward(model, tokens).backward()
    model.zero_grad(set_to_none=True)
    if tokens.is_cuda:
        torch.cuda.synchronize()


def kept(cfg: ModelConfig, mode: str, tokens: Tensor) -> int:
    """Bytes alive between the forward and the backward pass."""
    model, tracker = build(cfg, mode, tokens.device), MemTracker()
    tracker.track_external(model)
    with tracker:
        loss = forward(model, tokens)
        total: int = tracker.get_tracker_snapshot()[tokens.device]["Total"]
    del loss
    return total - sum(p.nbytes for p in model.parameters())


def measure(name: str, rounds: int) -> list[dict[str, float]]:
    """A row for each mode; bytes of a block are the difference that more blocks make."""
    shape, where = SHAPES[name], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, cfg = shape.tokens().to(where), shape.model
    models = [build(cfg, mode, where) for mode in MODES]
    turns = harness.rounds(rounds, *(partial(step, model, tokens) for model in models))
    found = []
    for i, (mode, model) in enumerate(zip(MODES, models, strict=True)):
        twice = replace(cfg, n_layers=2 * cfg.n_layers)
        more = kept(twice, mode, tokens) - kept(cfg, mode, tokens)
        with FlopCounterMode(display=False) as flops:
            step(model, tokens)
        element = next(model.parameters()).element_size()
        found.append(
            {
                "bytes": more / cfg.n_layers / (shape.batch * shape.seq_len),
                "formula": costs.activation_bytes_per_token(cfg, element, mode) / cfg.n_layers,
                "flops": float(flops.get_total_flops()),
                "time": 1 / harness.Comparison.of(turns, i, 0).ratio.median,
            }
        )
    return found


def main(argv: list[str]) -> None:
    """Measure every mode in turns."""
    p = harness.parser("recompute", "What each way of recomputing keeps and costs.")
    p.add_argument("--shape", default="base", choices=sorted(SHAPES), help="of the model")
    p.add_argument("--rounds", type=int, default=9, help="forward and backward passes of each")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    found = measure(args.shape, args.rounds)
    rows = [
        (
            mode,
            f"{row['bytes']:,.0f}",
            f"{row['formula']:,.0f}",
            f"{row['flops'] / found[0]['flops'] - 1:.1%}",
            f"{row['time']:.2f}",
        )
        for mode, row in zip(MODES, found, strict=True)
    ]
    header = ("recompute", "bytes/token/block", "by formula", "products again", "time, x none")
    print(cli.table(header, rows))
    result = harness.versions("torch") | dict(zip(MODES, found, strict=True))
    harness.keep(args.save, "recompute", {args.shape: result})


if __name__ == "__main__":
    cli.run(main)
