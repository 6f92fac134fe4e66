"""The efficiency of each software stack, fitted to published throughputs of `published.yaml`.

The one number of a stack is fitted to the points marked so; the others are held back and judge it.
"""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from llama import files
from llama.config import ModelConfig
from llama.costs import Chip, Layout, chips
from llama.plan import speed


class Point(NamedTuple):
    model: str
    tokens_per_s: float
    kind: str
    passes: int
    layout: Layout


@cache
def tables() -> dict[str, Any]:
    """models, stacks and points, as the file's head explains them."""
    return files.read_yaml(Path(__file__).with_suffix(".yaml"))


def points(stack: str) -> list[Point]:
    rows = tables()["points"][stack]
    return [Point._make((*about, Layout(**layout))) for *about, layout in rows]


def planned(stack: str, point: Point, efficiency: float) -> float:
    """Tokens per second and GPU."""
    told = tables()["stacks"][stack]
    chip = chips()[told["chip"]]
    chip = replace(chip, attention=told.get("attention", chip.attention))
    again = told.get("again", 0.0)
    step = speed.step(model(point.model), point.layout, chip, efficiency, point.passes, again)
    return step.tokens_per_s


def model(name: str) -> ModelConfig:
    dim, n_layers, n_heads, kv_heads, ffn_dim, vocab_size = tables()["models"][name]
    return ModelConfig(dim, n_layers, n_heads, kv_heads, vocab_size=vocab_size, ffn_dim=ffn_dim)


@cache
def efficiency(stack: str) -> float:
    """The one number of a stack: its fitted points come out right in the geometric mean."""
    fitted = [point for point in points(stack) if point.kind == "fit"]
    low, high = 0.05, 2.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        ratio = math.prod(planned(stack, p, middle) / p.tokens_per_s for p in fitted)
        low, high = (middle, high) if ratio < 1 else (low, middle)
    return low


def table() -> str:
    """The table of docs/planner.md: every point, published and planned."""
    header = "| stack | efficiency | model | T | GPUs | published | planned | off by | |"
    rows = [header, "|---" * 9 + "|"]
    for stack in tables()["stacks"]:
        e = efficiency(stack)
        for p in points(stack):
            ours = planned(stack, p, e)
            at = f"{p.model} | {p.layout.seq_len} | {p.layout.gpus} | {p.tokens_per_s:,}"
            off = f"{100 * (ours / p.tokens_per_s - 1):+.1f} %"
            rows.append(f"| {stack} | {e:.3f} | {at} | {ours:,.0f} | {off} | {p.kind} |")
    return "\n".join(rows)


def paper_table() -> str:
    """The paper's runs beside the plan of one layout, shown and not judged; energy by its §6."""
    rows = ["| model | GPU hours | tok/s/GPU | planned | off by | MWh | tCO2eq |", "|---" * 7 + "|"]
    layout, chip = Layout(2048, shard=128, replicate=16), chips()["a100-80g"]
    for name, (hours, tokens, _, _) in tables()["paper"].items():
        theirs = tokens / hours / 3600
        ours = speed.step(model(name), layout, chip, efficiency("torchtitan/a100"), 1).tokens_per_s
        mwh, tonnes = speed.energy(hours, chip.watts)
        speeds = f"{theirs:,.0f} | {ours:,.0f} | {100 * (ours / theirs - 1):+.1f} %"
        rows.append(f"| {name} | {hours:,} | {speeds} | {mwh:,.1f} | {tonnes:,.1f} |")
    return "\n".join(rows)


def usual(chip: Chip) -> str:
    """The stack nearest to this project's, on the nearest chip: FSDP2 on an A100, else FSDP."""
    return "torchtitan/a100" if "A100" in chip.driver else "fms-fsdp/h100"
