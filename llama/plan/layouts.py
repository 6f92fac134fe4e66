"""Which layouts a cluster allows, which of them fit into its memory, and which is quickest.

A configuration, a number of GPUs and their chip in, ranked plans out. What does not fit is refused
in one sentence with the nearest that would.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from llama import costs
from llama.cli import UserError, show_bytes
from llama.config import Config, ParallelConfig
from llama.costs import Chip, Layout
from llama.parallel import layout
from llama.parallel.layout import divisors, resolve, share, with_micro_batch
from llama.plan import published, speed

MODES = "none", "manual", "selective", "full"
# The rest is for the CUDA context, NCCL's buffers and pieces too small to use.
ROOM = 0.92
MOST_MICRO_BATCHES = 16


@dataclass(frozen=True)
class Plan:
    """A layout with what it takes and what it gives."""

    layout: Layout
    step: speed.Step
    bytes: int


def evaluate(cfg: Config, at: Layout, chip: Chip, efficiency: float) -> Plan:
    passes = math.ceil(share(cfg, at) / at.micro_batch)
    at = with_micro_batch(cfg, at, at.micro_batch)
    step = speed.step(cfg.model, at, chip, efficiency, passes)
    return Plan(at, step, costs.needed(cfg.model, at))


def micro_batches(cfg: Config, at: Layout) -> list[int]:
    """Windows per pass that divide a process's share of the batch."""
    return [n for n in divisors(share(cfg, at)) if n <= MOST_MICRO_BATCHES]


def fitting(cfg: Config, at: Layout, free_bytes: float, most: int) -> int:
    """The largest micro-batch, up to `most`, that is planned to fit; else 1."""
    sizes = [n for n in divisors(share(cfg, at)) if n <= most]
    return max((n for n in sizes if fits(cfg, with_micro_batch(cfg, at, n), free_bytes)), default=1)


def fits(cfg: Config, at: Layout, free_bytes: float) -> bool:
    """Whether a step fits, and what is kept for the backward pass into the budget, if any."""
    keeps = at.recompute != "budget" or costs.kept(cfg.model, at) <= at.budget
    return keeps and costs.needed(cfg.model, at) <= ROOM * free_bytes


def refuse(cfg: Config, processes: int, device_name: str) -> None:
    """Raises `UserError` for a layout that cannot work or, on a chip of the table, does not fit."""
    chip = costs.chip_of(device_name)
    if chip:
        configured(cfg, processes, chip, efficiency=1.0)
    else:
        resolve(cfg, processes, device_name != "cpu")


def configured(cfg: Config, gpus: int, chip: Chip, efficiency: float) -> Plan:
    """The plan of the configuration's own layout, with the largest micro-batch where that is auto.

    Raises `UserError` where it cannot work or does not fit, with the nearest that would.
    """
    at = resolve(cfg, gpus)
    auto = cfg.train.micro_batch == "auto"
    plans = [
        evaluate(cfg, replace(at, micro_batch=n), chip, efficiency)
        for n in (micro_batches(cfg, at) if auto else [at.micro_batch])
    ]
    good = [plan for plan in plans if fits(cfg, plan.layout, chip.memory)]
    if good:
        return max(good, key=lambda plan: plan.step.tokens_per_s)
    windows, needed = plans[0].layout.micro_batch, show_bytes(plans[0].bytes)
    raise UserError(
        f"train.micro_batch {windows} takes {needed} on a GPU of {show_bytes(chip.memory)}, of "
        f"which {100 * ROOM:.0f} % can be planned: {_offer(cfg, at, chip)}"
    )


def _offer(cfg: Config, at: Layout, chip: Chip) -> str:
    """The nearest that fits in place of a layout that does not."""
    for gpus, p, n in _instead(cfg, at, chip):
        asks = replace(cfg, parallel=p, train=replace(cfg.train, micro_batch=n))
        # its budget may hold no block, tensor groups may be needed
        with suppress(UserError):
            found = layout.divide(asks, gpus)
            if fits(cfg, found, chip.memory):
                words = f"train.micro_batch {n} with parallel.recompute {p.recompute}"
                words = " and ".join(filter(None, (words, layout.changes(cfg.parallel, p))))
                words += f" on {gpus} GPUs" * (gpus > at.gpus)
                return f"{words} takes {show_bytes(costs.needed(cfg.model, found))}"
    return "no other layout fits"


def _instead(cfg: Config, at: Layout, chip: Chip) -> Iterator[tuple[int, ParallelConfig, int]]:
    """GPUs, layouts and micro-batches, the nearest first: recomputing more, giving up what waits
    for the last micro-batch, fewer windows; at the least of these other layouts, then more GPUs."""
    auto, each = cfg.train.micro_batch == "auto", reversed(micro_batches(cfg, at))
    windows = [n for n in each if auto or n <= at.micro_batch]
    waits_not: dict[str, Any] = {"accumulate": "sharded", "reshard": True}
    asked = replace(cfg.parallel, **{name: getattr(at, name) for name in layout.SIZES})
    others = [(n, p) for n, p in layout.possible(cfg) if n >= at.gpus and usual(p, chip)]
    others.sort(key=lambda other: (other[0], layout.distance(asked, other[1])))
    least = (at.recompute, "full"), [waits_not], [1]
    own = (at.recompute, *MODES), [{}, waits_not], windows
    for gpus, p in [(at.gpus, cfg.parallel), *others]:
        for mode, how, n in product(*(own if p is cfg.parallel else least)):
            budget = p.budget if mode == "budget" else None
            yield gpus, replace(p, recompute=mode, budget=budget, **how), n


def usual(p: ParallelConfig, chip: Chip) -> bool:
    """Whether tensor groups lie within a machine, and few processes share a sequence."""
    return chip.node % p.tensor == 0 and p.context <= 8


def candidates(cfg: Config, gpus: int, chip: Chip) -> Iterator[Layout]:
    """Every layout of these GPUs that divides evenly."""
    for n, p in layout.possible(cfg):
        if n == gpus and usual(p, chip):
            with suppress(UserError):
                yield layout.divide(replace(cfg, parallel=p), gpus)


def mixed(cfg: Config, at: Layout, chip: Chip) -> Layout:
    """The layout with the largest budget that leaves room on the chip beside what is not kept."""
    full = replace(at, recompute="full")
    spare = int(ROOM * chip.memory) - costs.needed(cfg.model, full)
    return replace(at, recompute="budget", budget=costs.kept(cfg.model, full) + spare)


def ranked(cfg: Config, gpus: int, chip: Chip, efficiency: float) -> list[Plan]:
    """Layouts that fit, the quickest first, the best of each recompute, tensor and context size."""
    best: dict[tuple[object, ...], Plan] = {}
    for at in candidates(cfg, gpus, chip):
        for mode in (*MODES, "budget"):
            for micro in micro_batches(cfg, at):
                option = with_micro_batch(cfg, replace(at, recompute=mode), micro)
                if mode == "budget":
                    option = mixed(cfg, option, chip)
                    if len(set(costs.modes(cfg.model, option))) == 1:
                        continue
                plan = evaluate(cfg, option, chip, efficiency)
                kind = mode, at.tensor, at.context
                better = kind not in best or _order(plan) < _order(best[kind])
                if better and plan.bytes <= ROOM * chip.memory:
                    best[kind] = plan
    return sorted(best.values(), key=_order)


def waiting(cfg: Config, own: Plan, chip: Chip, efficiency: float) -> Plan:
    """The quickest that fits of a plan and its like whose gradients or weights wait for the last
    micro-batch."""
    ways = product(("sharded", "replica_deferred", "unsharded"), (True, False))
    others = [replace(own.layout, accumulate=kept, reshard=given_up) for kept, given_up in ways]
    plans = [evaluate(cfg, at, chip, efficiency) for at in others]
    return min([own, *(p for p in plans if p.bytes <= ROOM * chip.memory)], key=_order)


def _order(plan: Plan) -> tuple[float, int]:
    """Quickest first, then the one with more room."""
    return -plan.step.tokens_per_s, plan.bytes


def expected(cfg: Config, micro_batch: int, gpus: int, device_name: str) -> dict[str, float]:
    """What a run should measure: `planned_memory_gib`, and on a chip of the table
    `planned_tokens_per_s_gpu`, at the efficiency that is assumed for it."""
    at = with_micro_batch(cfg, resolve(cfg, gpus, device_name != "cpu"), micro_batch)
    found = {"planned_memory_gib": costs.needed(cfg.model, at) / 2**30}
    if chip := costs.chip_of(device_name):
        efficiency = published.efficiency(published.usual(chip))
        found["planned_tokens_per_s_gpu"] = evaluate(cfg, at, chip, efficiency).step.tokens_per_s
    return found
