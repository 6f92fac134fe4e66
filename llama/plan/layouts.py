"""Which layouts a cluster allows, which of them fit into its memory, and which is quickest.

A configuration, a number of GPUs and their chip in, ranked plans out. What cannot work is refused
in one sentence with the nearest that would.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import get_args

from llama import costs
from llama.cli import UserError, show_bytes
from llama.config import Config, Recompute
from llama.costs import Chip, Layout
from llama.plan import published, speed

MODES = get_args(Recompute)
# The rest is for the CUDA context, NCCL's buffers and pieces too small to use.
ROOM = 0.92
MOST_MICRO_BATCHES = 16


@dataclass(frozen=True)
class Plan:
    """A layout with what it takes and what it gives."""

    layout: Layout
    step: speed.Step
    phase: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def nearest(value: int, good: Iterable[int]) -> str:
    """The largest one below and the smallest above, as `7 or 9`."""
    found = sorted(set(good))
    below, above = [n for n in found if n < value][-1:], [n for n in found if n > value][:1]
    return " or ".join(map(str, below + above)) or "none"


def resolve(cfg: Config, gpus: int) -> Layout:
    """The layout a configuration asks for, on so many GPUs.

    Raises `UserError` naming the numbers where it divides the world, the heads, the feed-forward
    width, the vocabulary, the sequence or the batch unevenly.
    """
    p, m, T = cfg.parallel, cfg.model, cfg.data.seq_len
    assert m.vocab_size, "the vocabulary size is known before a layout is chosen"
    sizes = {name: getattr(p, name) for name in ("replicate", "shard", "tensor", "context")}
    asked = " x ".join(f"{name} {n}" for name, n in sizes.items())
    free = next((name for name, n in sizes.items() if n == -1), None)
    known = math.prod(n for n in sizes.values() if n != -1)
    if free and gpus % known == 0:
        sizes[free] = gpus // known
    t, c = sizes["tensor"], sizes["context"]
    if math.prod(sizes.values()) != gpus:
        copies, left = gpus // max(1, sizes["shard"] * t * c), gpus // max(1, t * c)
        offer = f"parallel.replicate {copies} would"
        if copies * sizes["shard"] * t * c != gpus:
            found = nearest(sizes["shard"], divisors(left) if left * t * c == gpus else [])
            offer = f"parallel.shard {found} with parallel.replicate -1 would"
        raise UserError(f"parallel {asked} do not make {gpus} GPUs: {offer}")
    shared = {
        "model.n_heads": m.n_heads,
        "the number of key/value heads": m.kv_heads,
        "the feed-forward width": m.hidden_dim,
        "model.vocab_size": m.vocab_size,
        "data.seq_len": T,
    }
    for name, number in shared.items():
        if number % t:
            good = divisors(math.gcd(*shared.values()))
            offer = f"parallel.tensor {nearest(t, good)} divides all it has to"
            raise UserError(f"parallel.tensor {t} does not divide {name} {number}: {offer}")
    if c > 1 and T % (2 * c):
        offer = f"parallel.context {nearest(c, divisors(T // 2))} would"
        raise UserError(f"2 x parallel.context {c} pieces do not divide data.seq_len {T}: {offer}")
    windows, ranks = cfg.train.batch_tokens // T, sizes["replicate"] * sizes["shard"]
    if windows % ranks:
        batch = nearest(windows, [n * ranks for n in (windows // ranks, windows // ranks + 1) if n])
        raise UserError(
            f"a batch of {windows} windows (train.batch_tokens / data.seq_len) does not divide "
            f"over parallel.replicate x shard = {ranks}: {batch} windows would, or replicate x "
            f"shard {nearest(ranks, divisors(windows))}"
        )
    micro = 1 if cfg.train.micro_batch == "auto" else min(cfg.train.micro_batch, windows // ranks)
    element_bytes = 4 if cfg.train.dtype == "float32" else 2
    return Layout(T, micro, recompute=p.recompute, element_bytes=element_bytes, **sizes)


def evaluate(cfg: Config, at: Layout, chip: Chip, efficiency: float) -> Plan:
    each = cfg.train.batch_tokens // cfg.data.seq_len // (at.replicate * at.shard)
    passes = math.ceil(each / at.micro_batch)
    at = replace(at, accumulates=passes > 1)
    step = speed.step(cfg.model, at, chip, efficiency, passes)
    return Plan(at, step, *costs.peak(cfg.model, at))


def fits(plan: Plan, chip: Chip) -> bool:
    return plan.bytes <= ROOM * chip.memory


def micro_batches(cfg: Config, at: Layout) -> list[int]:
    """Windows per pass that divide a process's share of the batch."""
    each = cfg.train.batch_tokens // cfg.data.seq_len // (at.replicate * at.shard)
    return [n for n in divisors(each) if n <= MOST_MICRO_BATCHES]


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
    good = [plan for plan in plans if fits(plan, chip)]
    if good:
        return max(good, key=lambda plan: plan.step.tokens_per_s)
    least = plans[0]
    tried = [
        replace(at, micro_batch=n, recompute=mode)
        for mode in (at.recompute, *MODES)
        for n in reversed(micro_batches(cfg, at))
        if auto or n <= at.micro_batch
    ]
    tried += [replace(at, shard=at.shard << n, recompute="full") for n in range(1, 12)]
    found = next((x for x in tried if costs.needed(cfg.model, x) <= ROOM * chip.memory), None)
    offer = "nothing fits: take a larger parallel.tensor"
    if found:
        more = f" and {found.gpus} GPUs of parallel.shard {found.shard}" * (found.gpus > gpus)
        offer = (
            f"train.micro_batch {found.micro_batch} with parallel.recompute {found.recompute}"
            f"{more} takes {show_bytes(costs.needed(cfg.model, found))}"
        )
    raise UserError(
        f"train.micro_batch {least.layout.micro_batch} takes {show_bytes(least.bytes)} on a GPU of "
        f"{show_bytes(chip.memory)}, of which {100 * ROOM:.0f} % can be planned: {offer}"
    )


def candidates(cfg: Config, gpus: int, chip: Chip) -> Iterator[Layout]:
    """Every layout of these GPUs that divides evenly."""
    for tensor in divisors(chip.node):
        for context in (1, 2, 4, 8):
            for shard in divisors(gpus // (tensor * context)):
                replicate = gpus // (tensor * context * shard)
                parallel = replace(
                    cfg.parallel, replicate=replicate, shard=shard, tensor=tensor, context=context
                )
                try:
                    yield resolve(replace(cfg, parallel=parallel), gpus)
                except UserError:
                    continue


def ranked(cfg: Config, gpus: int, chip: Chip, efficiency: float) -> list[Plan]:
    """Layouts that fit, the quickest first, the best of each recompute, tensor and context size."""
    best: dict[tuple[object, ...], Plan] = {}
    for at in candidates(cfg, gpus, chip):
        for mode in MODES:
            for micro in micro_batches(cfg, at):
                plan = evaluate(
                    cfg, replace(at, micro_batch=micro, recompute=mode), chip, efficiency
                )
                kind = mode, at.tensor, at.context
                if fits(plan, chip) and (kind not in best or _order(plan) < _order(best[kind])):
                    best[kind] = plan
    return sorted(best.values(), key=_order)


def _order(plan: Plan) -> tuple[float, int]:
    """Quickest first; of two that are equal in three digits, the one with more room."""
    return -float(f"{plan.step.tokens_per_s:.3g}"), plan.bytes


def expected(cfg: Config, micro_batch: int, gpus: int, device_name: str) -> dict[str, float]:
    """What a run should measure: `planned_memory_gib`, and on a chip of the table
    `planned_tokens_per_s_gpu`, at the efficiency that is assumed for it."""
    at = replace(resolve(cfg, gpus), micro_batch=micro_batch)
    name = next((key for key, chip in costs.CHIPS.items() if chip.driver == device_name), None)
    if name is None:
        element_bytes = 2 if cfg.train.dtype == "bfloat16" else 4
        accumulates = (
            micro_batch * cfg.data.seq_len * at.replicate * at.shard < cfg.train.batch_tokens
        )
        at = replace(at, element_bytes=element_bytes, accumulates=accumulates, loss_elements=2**20)
        return {"planned_memory_gib": costs.needed(cfg.model, at) / 2**30}
    efficiency = published.efficiency(published.usual(name))
    plan = evaluate(cfg, at, costs.CHIPS[name], efficiency)
    memory, rate = plan.bytes / 2**30, plan.step.tokens_per_s
    return {"planned_memory_gib": memory, "planned_tokens_per_s_gpu": rate}
