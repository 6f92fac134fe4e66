"""The pictures of a run, or of several beside each other: `python -m llama.report runs/quickstart`.

Run folders in; a self-contained HTML page and PNGs beside it out. Runs that are still written, or
that lack validation, checkpoint or shards, give what there is.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama import cli, config, files, html
from llama.cli import UserError, expect, needed, show_count
from llama.html import Markup, Picture, soft, tag
from llama.report import runs as reading
from llama.report.runs import Run

# Log lines behind the loss in the summary, and characters of a passage.
MEAN_ROWS, TEXT_CHARS = 10, 64
NOTES = (
    f"Training loss: mean of the last {MEAN_ROWS} log lines. Tokens/s: median over the log lines, "
    "all processes together. MFU: of the last log line, counting the causal half of attention. "
    "Memory: the most that rank 0 held."
)


def main(argv: list[str]) -> None:
    p = cli.parser("python -m llama.report", "One page and pictures of runs.")
    p.add_argument("run", type=str, nargs="+", help="One or more run folders.")
    p.add_argument("-o", "--output", type=Path, help="The page; default: in the run's folder.")
    p.add_argument("--samples", type=int, default=3, help="Generations per run; 0 for none.")
    a = p.parse_args(argv)
    expect(a.samples >= 0, f"--samples is {a.samples}", "0 or more")
    if a.output is None and len(a.run) > 1:
        raise UserError(f"{len(a.run)} runs are given: name the page, as in -o compare.html")
    output = a.output or Path(a.run[0], "report.html")
    html.check_output(output)
    runs = reading.read(a.run)
    needed("matplotlib.figure", "drawing", "'llama-pretraining[report]'")
    # imported here: --help and a wrong folder need no matplotlib
    from llama.report import plots

    pictures = plots.draw(runs)
    text = page(runs, pictures, a.samples)
    prefix = f"{output.stem}-" if a.output else ""
    beside = {output.with_name(f"{prefix}{name}.png"): p.png for name, p in pictures.items()}
    try:
        for path, data in (*beside.items(), (output, text.encode())):
            files.write_atomic(path, data)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error
    names = ", ".join(path.name for path in beside)
    print(f"wrote {output}" + (f" and, beside it, {names}" if names else ""))


def page(runs: Sequence[Run], pictures: Mapping[str, Picture], n_samples: int) -> str:
    """The whole page; where something cannot be read, a sentence says so."""
    folders = Markup(", ".join(tag("code", run.folder) for run in runs))
    parts = [soft("From ", folders), tag("h2", "Summary"), *summary(runs), *differences(runs)]
    curves = [picture for name, picture in pictures.items() if name != "mixture"]
    for picture in curves:
        parts += [tag("h2", picture.title), html.figure(picture)]
    if not curves:
        parts += [tag("h2", "Curves"), tag("p", "No log line is written yet.")]
    parts.append(tag("h2", "Mixture: target and realised"))
    parts += [html.figure(pictures["mixture"])] if "mixture" in pictures else []
    parts += each(runs, mixture)
    if n_samples:
        note = "From the newest checkpoint; grey is the beginning of a held-out document, the rest "
        parts += [tag("h2", "Samples"), soft(note, "what the model wrote after it.")]
        parts += each(runs, lambda run: samples(run, n_samples), "No samples: ")
    command = tag("code", "python -m llama.data.ledger RUN --step N")
    note = "The first rows of the batch of the first, a middle and the last step; "
    parts += [
        tag("h2", "Ledger: what some steps read"),
        soft(note, command, " lists any step whole."),
    ]
    title = " · ".join(run.label for run in runs) if len(runs) <= 3 else f"{len(runs)} runs"
    return html.page(title, *parts, *each(runs, extracts))


def each(
    runs: Sequence[Run], show: Callable[[Run], Iterable[Markup]], instead: str = ""
) -> Iterator[Markup]:
    """What every run has to show, or the sentence that says why it has nothing."""
    for run in runs:
        if len(runs) > 1:
            yield tag("h3", run.label)
        try:
            yield from show(run)
        except UserError as error:
            yield tag("p", instead, error)


# -- parts -----------------------------------------------------------------------------------------


def summary(runs: Sequence[Run]) -> list[Markup]:
    weights, _ = reading.validation_weights(runs)
    lines = [_summary(run, weights) for run in runs]
    # hardware and speed are not known everywhere
    header = [name for name in lines[0] if any(line[name] != "–" for line in lines)]
    return [html.table(header, [[line[name] for name in header] for line in lines]), soft(NOTES)]


def _summary(run: Run, weights: Mapping[str, float]) -> dict[str, object]:
    """A run's line in the summary, by column; – for what is not known."""
    losses = [v for v in run.series("loss")[1][-MEAN_ROWS:] if math.isfinite(v)]
    rates = [v for v in run.series("tokens_per_s")[1][1:] if math.isfinite(v)]
    held_out = run.validation(weights)[1]
    mfu, memory, env = run.last("mfu_causal"), run.last("memory_gib"), run.env
    dot = tag("b", "●", class_="dot", style=f"color:{run.look['color']}")
    hardware = f"{env.get('processes', '?')} × {env.get('device', '?')}"
    return {
        "run": Markup(dot + html.text(run.label)),
        "state": state(run),
        "parameters": show_count(run.parameters) if run.parameters else "–",
        "tokens": show_count(run.last("tokens") or 0),
        "steps": f"{run.last('step') or 0:,} of {config.total_steps(run.cfg.train):,}",
        "training loss": f"{statistics.mean(losses):.4f}" if losses else "–",
        "validation loss": f"{held_out[-1]:.4f}" if held_out else "–",
        "tokens/s": show_count(statistics.median(rates)) if rates else "–",
        "MFU": f"{100 * mfu:.1f} %" if mfu else "–",
        "memory": f"{memory:.1f} GiB" if memory else "–",
        "hardware": f"{hardware}, torch {env.get('torch', '?')}" if env else "–",
    }


def state(run: Run) -> str:
    """How a run stands, in words."""
    verdict, why = run.verdict.get("exit"), run.verdict.get("why", "")
    lost = sum(row.get("loss", 0) is None for row in run.rows)
    words = {"done": "done", "requeue": f"stopped ({why})", "failed": f"failed: {why}"}
    text = words.get(str(verdict), "running, or killed")
    return f"{text}; {lost} log line{'s' * (lost > 1)} without a finite loss" if lost else text


def differences(runs: Sequence[Run]) -> list[Markup]:
    columns, rows = reading.config_differences(runs)
    one = len(runs) == 1
    heading = "Configuration, where it is not the default" if one else "Configuration differences"
    lines = [(tag("code", key), *map(_setting, values)) for key, values in rows]
    found = html.table(("key", *columns), lines) if lines else tag("p", "None.")
    return [tag("h2", heading), found]


def _setting(value: Any) -> Any:
    """A value as it is written in YAML."""
    return value if type(value) in (str, int) else json.dumps(value, default=str)


def mixture(run: Run) -> list[Markup]:
    steps, lines = reading.mixture(run)
    header = ["source", "target", "realised", "tokens", "off the target", "epochs"]
    rows = []
    for line in lines:
        tokens, off, share, epochs = line.shown()
        rows.append((line.source, f"{line.planned / line.total:.3%}", share, tokens, off, epochs))
    return [soft(f"In the first {steps:,} steps, by tokens."), html.table(header, rows)]


def samples(run: Run, count: int) -> Iterator[Markup]:
    print(f"drawing samples from {run.folder}", file=sys.stderr)
    for source, prompt, text in reading.samples(run, count):
        yield soft(f"after {source}")
        yield tag("pre", tag("i", prompt), text)


def extracts(run: Run) -> list[Markup]:
    header = ["step", "row", "source", "epoch", "window", "its tokens", "document", "begins"]
    rows = []
    for step, p, text in reading.extracts(run):
        place = p.row, p.source, p.epoch + 1, p.window, f"{p.first:,}–{p.end - 1:,} of {p.of:,}"
        begins = " ".join(text.split())[:TEXT_CHARS]
        rows.append((step, *place, tag("code", p.document), tag("code", begins)))
    return [html.table(header, rows) if rows else tag("p", "No step is trained yet.")]


if __name__ == "__main__":
    cli.run(main)
