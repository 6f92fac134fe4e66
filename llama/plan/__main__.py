"""What a cluster will do: `python -m llama.plan --config configs/llama_65b.yaml --gpus 2048`.

A configuration and a number of GPUs in; memory by recompute mode, speed, days, energy and the best
layouts out (paper §2.4 and §6). `--explain` shows the terms, `--fit` the published points.
"""

from collections.abc import Iterator
from dataclasses import replace

from llama import cli, config, costs
from llama.cli import expect, show_bytes, show_count
from llama.config import Config
from llama.costs import Chip, chips
from llama.plan import layouts, published, speed
from llama.plan.layouts import MODES, Plan

SHOWN = 8


def memory_table(cfg: Config, plan: Plan, chip: Chip) -> str:
    """Bytes of a GPU by recompute mode: the most of each kind, and the most at one time."""
    rows: dict[str, list[str]] = {}
    usable = layouts.ROOM * chip.memory
    modes = [*MODES, *["budget"] * (plan.layout.recompute == "budget")]
    for mode in modes:
        phases = costs.memory(cfg.model, replace(plan.layout, recompute=mode)).values()
        for name in next(iter(phases)):
            rows.setdefault(name, []).append(show_bytes(max(parts[name] for parts in phases)))
        peak = max(sum(parts.values()) for parts in phases)
        rows.setdefault("peak, not all at once", []).append(show_bytes(peak))
        fits = f"fits {show_bytes(usable)} of {show_bytes(chip.memory)}"
        rows.setdefault(fits, []).append("yes" if peak <= usable else "no")
    header = ("a GPU's memory, recompute", *modes)
    return cli.table(header, ((name, *values) for name, values in rows.items()))


def ranking(plans: list[Plan], cfg: Config) -> str:
    header = ("tok/s/GPU", "MFU", "PaLM", "memory", "days", "recompute", "windows", "layout")
    rows = []
    for plan in plans[:SHOWN]:
        at, (causal, palm) = plan.layout, plan.step.mfu
        days = cfg.train.tokens / (plan.step.tokens_per_s * at.gpus * 86400)
        recompute = at.recompute + f" {show_bytes(at.budget)}" * (at.recompute == "budget")
        layout = f"replicate {at.replicate} shard {at.shard}"
        layout += f" tensor {at.tensor}" * (at.tensor > 1)
        layout += f" context {at.context}" * (at.context > 1)
        rows.append(
            (
                f"{plan.step.tokens_per_s:,.0f}", f"{100 * causal:.1f}%", f"{100 * palm:.1f}%",
                show_bytes(plan.bytes), f"{days:.1f}", recompute, at.micro_batch, layout,
            )
        )  # fmt: skip
    return cli.table(header, rows)


def summary(cfg: Config, plan: Plan, chip: Chip) -> str:
    hours = cfg.train.tokens / plan.step.tokens_per_s / 3600
    mwh, tonnes = speed.energy(hours, chip.watts)
    return (
        f"{show_count(cfg.train.tokens)} tokens: {hours / 24 / plan.layout.gpus:.1f} days, "
        f"{hours:,.0f} GPU hours, {mwh:,.0f} MWh, {tonnes:,.0f} tCO2eq "
        f"({chip.watts:.0f} W, PUE {speed.PUE}, {speed.KG_PER_KWH} kg/kWh)"
    )


def explanation(cfg: Config, plan: Plan) -> Iterator[str]:
    """The terms of the first plan: seconds of a step, and bytes of every phase."""
    step, phases = plan.step, costs.memory(cfg.model, plan.layout)
    shares = [
        (name, f"{s:.3f}", f"{100 * s / step.seconds:.1f}%") for name, s in step.terms.items()
    ]
    yield cli.table(("term", "s/step", "share"), [*shares, ("step", f"{step.seconds:.3f}", "")])
    names = ("parameters", "gradients", "optimizer", "activations", "gathered", "working", "sum")
    rows = []
    for phase, parts in phases.items():
        values = [*parts.values(), sum(parts.values())]
        rows.append((phase, *(f"{n / 1e9:.2f}" for n in values)))
    yield cli.table(("GB in", *names), rows)


def report(cfg: Config, gpus: int, gpu: str, stack: str, explain: bool) -> Iterator[str]:
    """The plan, part by part."""
    chip, efficiency = chips()[gpu], published.efficiency(stack)
    own = layouts.configured(cfg, gpus, chip, efficiency)
    found = layouts.ranked(cfg, gpus, chip, efficiency)
    yield (
        f"{cfg.name}: {show_count(costs.parameters(cfg.model))} parameters, steps of "
        f"{show_count(cfg.train.batch_tokens)} tokens on {gpus:,} x {gpu}\n"
        f"efficiency: {efficiency:.2f} of what the chip reaches, as {stack} has it"
    )
    yield memory_table(cfg, own, chip)
    text, best = ranking([own], cfg), layouts.waiting(cfg, own, chip, efficiency)
    if best.step.tokens_per_s > 1.01 * own.step.tokens_per_s:
        text += f"\n{best.step.tokens_per_s:,.0f} tok/s/GPU in {show_bytes(best.bytes)} with\n "
        for key in ("accumulate", "reshard"):
            if (value := getattr(best.layout, key)) != getattr(own.layout, key):
                text += f" --parallel.{key} {str(value).lower()}"
    yield f"the configuration's layout\n{text}"
    yield summary(cfg, own, chip)
    if explain:
        yield from explanation(cfg, own)
    yield "the best of each kind\n" + ranking(found, cfg)


def main(argv: list[str]) -> None:
    parser = config.parser("python -m llama.plan")
    parser.add_argument("--gpus", type=int, default=8, help="How many there are.")
    parser.add_argument("--gpu", default="a100-80g", help=f"Their kind: {', '.join(chips())}.")
    parser.add_argument("--stack", type=str | None, help="Whose efficiency to assume; see --fit.")
    parser.add_argument("--explain", action="store_true", help="Show the terms.")
    parser.add_argument("--fit", action="store_true", help="Show the published points and stop.")
    given = parser.parse_args(argv)
    if given.fit:
        print(f"{published.table()}\n\n{published.paper_table()}")
        return
    cfg = config.load(argv, parser)
    expect(given.gpu in chips(), f"--gpu is {given.gpu!r}", f"one of {', '.join(chips())}")
    stack, known = given.stack or published.usual(chips()[given.gpu]), published.tables()["stacks"]
    expect(stack in known, f"--stack is {stack!r}", f"one of {', '.join(known)}")
    expect(given.gpus >= 1, f"--gpus is {given.gpus}", "1 or more")
    cfg.model.vocab_size = cfg.model.vocab_size or 32_000
    print("\n\n".join(report(cfg, given.gpus, given.gpu, stack, given.explain)))


if __name__ == "__main__":
    cli.run(main)
