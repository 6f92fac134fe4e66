"""One self-contained HTML page of runs: what `llama.report` read and the pictures of it.

Runs and PNG bytes in, HTML out. No script, no font and no file from elsewhere: the page can be sent
by mail and printed. Everything that comes from a run is escaped.
"""

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from llama.cli import show_count
from llama.report.content import Extract, Mixture, Sample
from llama.report.runs import Run, config_differences, shorter, validation_weights

# Log lines behind the loss in the summary, and characters of a passage.
MEAN_ROWS, TEXT_CHARS = 10, 64
WEIGHTED = "weighted as in the mixture"
UNWEIGHTED = "each weighted alike: the mixtures, and so the training losses, are not the same"
CAPTIONS = {
    "loss": (
        "Loss over tokens",
        "Thin: every log line; thick: mean over {rows} log lines, fewer at the beginning. "
        "Validation is the mean of the sources, {weights}.",
    ),
    "sources": (
        "Loss per source",
        "Training since the log line before, and validation on held-out documents. The highest "
        "2 % of the values may lie above a panel.",
    ),
    "optimizer": (
        "Learning rate and gradient norm",
        "Both of the step itself.",
    ),
    "speed": (
        "Speed",
        "Without validation and saving; waiting is the loop's, for its next batch.",
    ),
}
NOTES = {
    "training loss": f"Training loss: mean of the last {MEAN_ROWS} log lines.",
    "tokens/s": "Tokens/s: median over the log lines, all processes together.",
    "MFU": "MFU: of the last log line, counting the causal half of attention.",
    "memory": "Memory: the most that rank 0 held.",
}
STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --rule: #d9dee3; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 40px 32px 64px; max-width: 1120px; background: #fff;
  color: var(--ink); font: 15px/1.55 "Helvetica Neue", Helvetica, Arial, "Liberation Sans",
  "DejaVu Sans", sans-serif; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 10px; padding-bottom: 5px;
  border-bottom: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 8px 0; max-width: 100ch; }
.soft, figcaption { color: var(--soft); font-size: 13px; }
figure { margin: 12px 0; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
figcaption { margin-top: 4px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; line-height: 1.4; margin: 8px 0;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1.5px solid #8b949e;
  padding: 4px 16px 4px 0; vertical-align: bottom; }
td { border-bottom: 1px solid #ebeef1; padding: 4px 16px 4px 0; vertical-align: top;
  overflow-wrap: break-word; }
th.n, td.n { text-align: right; white-space: nowrap; }
tr { break-inside: avoid; }
code, pre, td.c { font: 12px/1.5 "SF Mono", Menlo, Consolas, "Liberation Mono",
  "DejaVu Sans Mono", monospace; }
td.c { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; padding: 10px 12px;
  margin: 6px 0 14px; border-left: 3px solid var(--rule); break-inside: avoid; }
pre i { font-style: normal; color: #7a828b; }
.dot { margin-right: 6px; print-color-adjust: exact; }
@media print {
  @page { size: A4; margin: 14mm; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  table { font-size: 8.5pt; } pre, code, td.c { font-size: 8pt; }
  .wide { overflow: visible; } h2, h3, p.soft { break-after: avoid; }
}
"""


@dataclass
class Contents:
    """What a page shows; a sentence stands where a part could not be read."""

    runs: list[Run]
    pictures: dict[str, bytes]
    colours: Sequence[str]
    smoothed_rows: int
    mixtures: dict[str, tuple[int, list[Mixture]] | str] = field(default_factory=dict)
    samples: dict[str, list[Sample] | str] = field(default_factory=dict)
    extracts: dict[str, list[Extract] | str] = field(default_factory=dict)


def html(contents: Contents) -> str:
    """The whole page."""
    runs = contents.runs
    title = " · ".join(run.label for run in runs) if len(runs) <= 3 else f"{len(runs)} runs"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{"A pretraining run" if len(runs) == 1 else "Pretraining runs"}, from '
        f"{', '.join(f'<code>{_text(run.folder)}</code>' for run in runs)}</p>",
        "<h2>Summary</h2>",
        _summary(contents),
        _differences(runs),
    ]
    for name, (heading, caption) in CAPTIONS.items():
        if name in contents.pictures:
            weights = WEIGHTED if validation_weights(runs)[1] else UNWEIGHTED
            caption = caption.format(rows=contents.smoothed_rows, weights=weights)
            parts += [f"<h2>{heading}</h2>", _picture(contents, name, heading, caption)]
    if not contents.pictures.keys() & CAPTIONS.keys():
        parts.append("<h2>Curves</h2><p>No log line is written yet.</p>")
    parts += [_mixtures(contents), _samples(contents), _extracts(contents), "</body></html>"]
    return "\n".join(part for part in parts if part) + "\n"


# -- parts -----------------------------------------------------------------------------------------


def _summary(contents: Contents) -> str:
    header = ["run", "state", "parameters", "tokens", "steps", "training loss", "validation loss"]
    header += ["tokens/s", "MFU", "memory", "hardware"]
    rows = []
    weights, _ = validation_weights(contents.runs)
    for i, run in enumerate(contents.runs):
        losses = [v for v in run.series("loss")[1][-MEAN_ROWS:] if math.isfinite(v)]
        rates = [v for v in run.series("tokens_per_s")[1][1:] if math.isfinite(v)]
        held_out = run.validation(weights)[1]
        mfu, memory = run.last("mfu_causal"), run.last("memory_gib")
        colour = contents.colours[i % len(contents.colours)]
        rows.append(
            [
                f'<b class="dot" style="color:{colour}">●</b>{_text(run.label)}',
                _text(state(run)),
                _number(run.parameters()),
                _number(run.last("tokens")),
                f"{run.last('step') or 0:,} of {run.steps() or '?':,}",
                f"{sum(losses) / len(losses):.4f}" if losses else "–",
                f"{held_out[-1]:.4f}" if held_out else "–",
                _number(sorted(rates)[len(rates) // 2] if rates else None),
                f"{100 * mfu:.1f} %" if mfu else "–",
                f"{memory:.1f} GiB" if memory else "–",
                _text(_hardware(run)),
            ]
        )
    known = [i for i in range(len(header)) if any(row[i] != "–" for row in rows)]
    header, rows = [header[i] for i in known], [[row[i] for i in known] for row in rows]
    numeric = [n for n, i in enumerate(known) if 2 <= i < 10]
    note = " ".join(NOTES[name] for name in header if name in NOTES)
    return _table(header, rows, numeric) + f'<p class="soft">{note}</p>'


def state(run: Run) -> str:
    """How a run stands, in words."""
    verdict, why = run.verdict.get("exit"), run.verdict.get("why", "")
    lost = sum(1 for row in run.rows if "loss" in row and row["loss"] is None)
    words = {"done": "done", "requeue": f"stopped ({why})", "failed": f"failed: {why}"}
    text = words.get(str(verdict), "running, or killed")
    return f"{text}; {lost} log lines without a finite loss" if lost else text


def _hardware(run: Run) -> str:
    env = run.env
    if not env:
        return "–"
    return f"{env.get('processes', '?')} × {env.get('device', '?')}, torch {env.get('torch', '?')}"


def _differences(runs: list[Run]) -> str:
    columns, rows = config_differences(runs)
    one = len(runs) == 1
    heading = "Configuration, where it is not the default" if one else "Configuration differences"
    if not rows:
        return f"<h2>{heading}</h2><p>None.</p>"
    table = [
        ["key", *map(_text, columns)],
        *([f"<code>{_text(key)}</code>", *map(_setting, values)] for key, values in rows),
    ]
    if len(columns) > max(len(rows), 4):
        # many runs, few differences: a run per line
        table = [list(line) for line in zip(*table, strict=True)]
        table[0][0] = "run"
    return f"<h2>{heading}</h2>" + _table(table[0], table[1:])


def _mixtures(contents: Contents) -> str:
    parts = ["<h2>Mixture: target and realised</h2>"]
    if "mixture" in contents.pictures:
        caption = "In brackets: realised minus target, in percentage points."
        parts.append(_picture(contents, "mixture", "Mixture, target and realised", caption))
    header = ["source", "target", "realised", "tokens", "off the target", "epochs"]
    for run in contents.runs:
        found = contents.mixtures[run.label]
        parts.append(_heading(contents, run))
        if isinstance(found, str):
            parts.append(f"<p>{_text(found)}</p>")
            continue
        step, lines = found
        rows = [
            [
                _text(m.source),
                f"{100 * m.target:.3f} %",
                f"{100 * m.realised:.3f} %",
                f"{m.tokens:,}",
                f"{m.tokens - m.target_tokens:+,.0f}".replace("-", "−"),
                f"{m.epochs:.3f}",
            ]
            for m in lines
        ]
        parts.append(f'<p class="soft">In the first {step:,} steps, by tokens.</p>')
        parts.append(_table(header, rows, numeric=range(1, 6)))
    return "\n".join(parts)


def _samples(contents: Contents) -> str:
    if not contents.samples:
        return ""
    parts = [
        "<h2>Samples</h2>",
        '<p class="soft">From the newest checkpoint; grey is the beginning of a held-out '
        "document, black what the model wrote after it.</p>",
    ]
    for run in contents.runs:
        found = contents.samples[run.label]
        parts.append(_heading(contents, run))
        if isinstance(found, str):
            parts.append(f"<p>No samples: {_text(found)}</p>")
            continue
        for sample in found:
            parts.append(f'<p class="soft">after {_text(sample.source)}</p>')
            parts.append(f"<pre><i>{_text(sample.prompt)}</i>{_text(sample.text)}</pre>")
    return "\n".join(parts)


def _extracts(contents: Contents) -> str:
    parts = [
        "<h2>Ledger: what some steps read</h2>",
        '<p class="soft">The first rows of the batch of the first, a middle and the last step; '
        "<code>python -m llama.data.ledger RUN --step N</code> lists any step whole.</p>",
    ]
    header = ["step", "row", "source", "epoch", "window", "its tokens", "document", "begins"]
    for run in contents.runs:
        found = contents.extracts[run.label]
        parts.append(_heading(contents, run))
        if isinstance(found, str) or not found:
            parts.append(f"<p>{_text(found or 'No step is trained yet.')}</p>")
            continue
        rows = [
            [
                f"{e.step:,}",
                str(e.row),
                _text(e.source),
                str(e.epoch),
                f"{e.window:,}",
                _text(e.place),
                _text(shorter(e.document, 44)),
                _text(" ".join(e.text.split())[:TEXT_CHARS]),
            ]
            for e in found
        ]
        parts.append(_table(header, rows, numeric=(0, 1, 3, 4, 5), code=(6, 7)))
    return "\n".join(parts)


# -- pieces of HTML --------------------------------------------------------------------------------


def _heading(contents: Contents, run: Run) -> str:
    return f"<h3>{_text(run.label)}</h3>" if len(contents.runs) > 1 else ""


def _picture(contents: Contents, name: str, title: str, caption: str) -> str:
    data = base64.b64encode(contents.pictures[name]).decode()
    image = f'<img alt="{_text(title)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numeric: Sequence[int] = (),
    code: Sequence[int] = (),
) -> str:
    """A table of ready HTML cells; columns in `numeric` are aligned right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="n"' if i in numeric else ' class="c"' * (i in code) for i in range(99)]
        inside = (f"<{tag}{kind}>{c}</{tag}>" for kind, c in zip(kinds, cells, strict=False))
        return f"<tr>{''.join(inside)}</tr>"

    lines = "\n".join(line("td", row) for row in rows)
    head = line("th", header)
    return (
        f'<div class="wide"><table><thead>{head}</thead>\n<tbody>\n{lines}\n</tbody></table></div>'
    )


def _text(value: Any) -> str:
    """Escaped, with control characters that HTML forbids made visible."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value)))


def _number(value: float | None) -> str:
    return "–" if value is None else show_count(value)


def _setting(value: Any) -> str:
    """A value as it is written in YAML, large counts with commas."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return f"{value:.10g}" if isinstance(value, float) else _text(value)
