"""Tokens and epochs of every source in a run, beside those of the paper.

In: a run's configuration with its shards, or with token counts. Out: a table. With the
counts of RedPajama-1T and 1.4T tokens it shows how far that data is from Table 1 (§2.1).
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from llama import cli, config, files
from llama.cli import UserError
from llama.data.order import integer_weights
from llama.data.shards import open_sources

# Epochs over each source in the paper.
TABLE_1 = files.read_yaml(Path(files.__file__).with_name("table_1.yaml"))
PAPER_EPOCHS = {name: epochs for name, (_, epochs, _) in TABLE_1.items()}
MANY_EPOCHS = 4  # repeating data beyond this gives little (Muennighoff et al., 2023)


def plan_table(
    weights: Mapping[str, float], tokens: int, source_tokens: Mapping[str, int] | None = None
) -> str:
    """The table of a run of ``tokens``, with the integer weights that it would use.

    Without ``source_tokens`` (no shards yet) what depends on them is left open.
    """
    integers = integer_weights(weights)
    total, weight_sum = sum(integers.values()), math.fsum(weights.values())
    rows, often, off = [], [], 0.0
    for name, weight in integers.items():
        draws, has, epochs = Fraction(tokens * weight, total), "-", "-"
        if source_tokens is not None:
            passes = draws / source_tokens[name]
            # halves round up, as in printed tables: 2.625 is 2.63
            rounded = math.floor(100 * passes + Fraction(1, 2)) / 100
            has, epochs = cli.show_count(source_tokens[name]), f"{rounded:.2f}"
            often += [name] if passes > MANY_EPOCHS else []
        wanted = weights[name] / weight_sum
        off = max(off, abs(wanted - weight / total))
        paper = f"{PAPER_EPOCHS[name]:.2f}" if name in PAPER_EPOCHS else "-"
        rows.append((name, f"{wanted:.3%}", has, cli.show_count(float(draws)), epochs, paper))
    header = ("source", "weight", "has tokens", "run draws", "epochs", "paper's")
    lines = [cli.table(header, rows)]
    if off > 1e-12:
        lines.append(f"weights rounded to n/{total}, each off by at most {off:.2e}")
    if often:
        lines.append(f"read more than {MANY_EPOCHS} times: {', '.join(often)}")
    return "\n".join(lines)


def parse_counts(text: str) -> dict[str, int]:
    """``commoncrawl=878B,c4=175B`` as counts."""
    counts = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--source_tokens: {part!r} is not of the form source=175B")
        counts[name.strip()] = n = cli.count(value)
        cli.expect(n > 0, f"--source_tokens: {name.strip()} has {n} tokens", "more than 0")
    return counts


def main(argv: list[str]) -> None:
    """The table of a configuration, with its shards or with counts in their place."""
    p = config.parser("python -m llama.data.mixture")
    what = "commoncrawl=878B,c4=175B,... in place of shards"
    p.add_argument("--source_tokens", type=str, help=what)
    args, cfg = p.parse_args(argv), config.load(argv, p)
    weights = cfg.data.mixture
    assert isinstance(weights, dict)
    if args.source_tokens:
        counts = parse_counts(args.source_tokens)
        if odd := ", ".join(sorted(set(weights) ^ set(counts))):
            raise UserError(f"--source_tokens and data.mixture differ in their sources: {odd}")
    else:
        sources = open_sources(cfg.data.path, weights)
        counts = {name: source.n_tokens for name, source in sources.items()}
        for name, n in counts.items():
            if not sources[name].n_windows(cfg.data.seq_len):
                raise UserError(f"source {name!r} has {n} tokens, no window of {cfg.data.seq_len}")
    print(plan_table(weights, int(cfg.train.tokens), counts))


if __name__ == "__main__":
    cli.run(main)
