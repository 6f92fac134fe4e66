"""Pictures of runs: rows of metrics.jsonl and mixtures in, PNG bytes and their captions out.

The only importer of matplotlib here. The same numbers give the same bytes: own settings instead of
the user's, bundled fonts, no dates. Training is a line, validation has markers.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from llama.cli import UserError
from llama.html import Picture
from llama.report.runs import Points, Run, mixture, validation_weights

TARGET = "#CBD5DD"
VALIDATION: dict[str, Any] = {"marker": "o", "markersize": 4.5, "markerfacecolor": "white"}
VALIDATION |= {"linewidth": 0.9, "linestyle": (0, (3, 2)), "zorder": 3}
WIDTH_INCHES = 11.0
MOST_SOURCES = 12
STYLE = Path(__file__).with_name("plots.mplstyle")
LOSS = "loss (nats per token)"
# The highest share of losses that may lie above a panel: the first ones would flatten all others.
ABOVE = 0.02
# Per run: training and validation.
Panel = Sequence[tuple[Points, Points]]


def draw(runs: Sequence[Run]) -> dict[str, Picture]:
    """Every picture that has something to show, by name, in the order of the page."""
    # own settings, whatever the user's are
    with matplotlib.style.context(["default", STYLE]):
        makers = {"loss": _loss, "sources": _sources, "optimizer": _optimizer}
        makers |= {"speed": _speed, "mixture": _mixture}
        drawn = {name: make(runs) for name, make in makers.items()}
        return {
            name: Picture.drawn(figure, title, caption)
            for name, (title, caption, figure) in drawn.items()
            if figure
        }


# -- one picture each: its title, its caption, and what is drawn, if anything is -------------------

Drawn = tuple[str, str, Figure | None]


def _loss(runs: Sequence[Run]) -> Drawn:
    weights, alike = validation_weights(runs)
    panel = [(run.series("loss"), run.validation(weights)) for run in runs]
    rows = max(smoothing(len(run.rows)) for run in runs)
    caption = f"Thin: every log line; thick: mean over {rows} log lines. " * (rows > 1)
    how = "weighted as in the mixture"
    if not alike:
        how = "each weighted alike: the mixtures, and so the training losses, are not the same"
    caption += f"Validation is the mean of the sources, {how}."
    return "Loss over tokens", caption, _losses(runs, {"all sources": panel}, 4.2)


def _sources(runs: Sequence[Run]) -> Drawn:
    names = list(dict.fromkeys(name for run in runs for name in run.sources("loss", "val")))
    panels: dict[str, Panel] = {
        name: [(run.series(f"loss/{name}"), run.series(f"val/{name}")) for run in runs]
        for name in names[:MOST_SOURCES]
    }
    caption = "Training since the log line before, and validation on held-out documents. The "
    caption += f"highest {ABOVE:.0%} of the values may lie above a panel."
    return "Loss per source", caption, _losses(runs, panels, 2.8)


def _losses(runs: Sequence[Run], panels: Mapping[str, Panel], height: float) -> Figure | None:
    figure = _curves(runs, panels, height)
    for axis, panel in zip(figure.axes if figure else (), panels.values(), strict=False):
        axis.set_ylabel(LOSS)
        values = np.array([v for curves in panel for _, points in curves for v in points])
        values = values[np.isfinite(values)]
        if len(values):
            low, high = values.min(), np.quantile(values, 1 - ABOVE)
            margin = 0.06 * max(high - low, 1e-3)
            axis.set_ylim(low - margin, high + margin)
    return figure


def _optimizer(runs: Sequence[Run]) -> Drawn:
    caption = "Both of the step itself. Dotted: what the norm is clipped to."
    figure = _pair(runs, {"learning rate": "lr", "gradient norm before clipping": "grad_norm"})
    if figure:
        for clip in {run.cfg.optim.clip for run in runs}:
            figure.axes[1].axhline(clip, color="#777777", linewidth=1.1, linestyle=":")
    return "Learning rate and gradient norm", caption, figure


def _speed(runs: Sequence[Run]) -> Drawn:
    caption = "Without validation and saving; waiting is the loop's, for its next batch."
    wait = "% of the time waiting for data"
    figure = _pair(runs, {"tokens/s, all processes": "tokens_per_s", wait: "data_wait_pct"})
    if figure:
        figure.axes[0].yaxis.set_major_formatter(EngFormatter(sep=""))
        figure.axes[1].set_ylim(0, max(5, figure.axes[1].get_ylim()[1]))
    return "Speed", caption, figure


def _pair(runs: Sequence[Run], keys: Mapping[str, str]) -> Figure | None:
    """Values that begin at 0, a panel for each key below its title."""
    none: Points = [], []
    panels = {title: [(run.series(key), none) for run in runs] for title, key in keys.items()}
    figure = _curves(runs, panels, 3.4)
    for axis in figure.axes if figure else ():
        axis.set_ylim(0, None)
    return figure


def _mixture(runs: Sequence[Run]) -> Drawn:
    """Per run a wide light bar for the target of each source and a thin dark one for what came."""
    title, caption = "Mixture, target and realised", "Wide: target; narrow: realised. "
    caption += "In brackets: realised minus target, in percentage points."
    mixtures = []
    for run in runs:
        with suppress(UserError):
            mixtures.append((run, mixture(run)[1]))
    if not mixtures:
        return title, caption, None
    most = max(len(lines) for _, lines in mixtures)
    figure = _figure(len(mixtures), min(len(mixtures), 2), 0.36 * most + 1.2)
    for axis, (run, lines) in zip(figure.axes, mixtures, strict=True):
        places = range(len(lines))
        target = [100 * line.planned / line.total for line in lines]
        realised = [100 * line.tokens / line.total for line in lines]
        bars = axis.barh(places, target, 0.72, color=TARGET)
        axis.barh(places, realised, 0.26, color=run.look["color"])
        labels = [f"{r:.2f} %  ({r - t:+.3f})" for r, t in zip(realised, target, strict=True)]
        axis.bar_label(bars, labels, padding=5)
        axis.set_yticks(places, [_plain(line.source) for line in lines])
        axis.invert_yaxis()
        axis.set(xlabel="% of the tokens", xlim=(0, 1.42 * max(target)))
        axis.set_title(_plain(run.label) if len(runs) > 1 else "")
    return title, caption, figure


# -- shared by all ---------------------------------------------------------------------------------


def _figure(panels: int, columns: int, height: float) -> Figure:
    """A figure with `panels` in rows of this height."""
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(WIDTH_INCHES, rows * height + 0.2), layout="constrained")
    for i in range(panels):
        figure.add_subplot(rows, columns, i + 1)
    return figure


def _curves(runs: Sequence[Run], panels: Mapping[str, Panel], height: float) -> Figure | None:
    """Values over tokens, each panel below its title; None where there is no value at all.

    Every row is thin, with the mean of neighbouring rows over it where there are many. Validation
    is a thin line with markers, which stay apart when there are many.
    """
    if not any(tokens for panel in panels.values() for pair in panel for tokens, _ in pair):
        return None
    columns = min(len(panels), 3)
    figure = _figure(len(panels), columns, height)
    for axis, (title, panel) in zip(figure.axes, panels.items(), strict=True):
        for run, (training, validation) in zip(runs, panel, strict=True):
            _lines(axis, run, training, validation)
        axis.set(title=_plain(title), xlabel="tokens", xlim=(0, None))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.locator_params(axis="x", nbins=12 // columns)
    # above the panels, where it covers nothing
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.set_figheight(figure.get_figheight() + 0.23 * math.ceil(len(labels) / 3))
        figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
    return figure


def _lines(axis: Axes, run: Run, training: Points, validation: Points) -> None:
    (tokens, values), (at, held_out) = training, validation
    width = smoothing(len(tokens))
    if width > 1:
        axis.plot(tokens, values, linewidth=0.7, alpha=0.35, zorder=1, **run.look)
        values = smoothed(np.array(values), width).tolist()
    marker = "." if len(tokens) < 3 else None
    label = _plain(run.label)
    axis.plot(tokens, values, linewidth=1.7, marker=marker, label=label, **run.look)
    if at:
        label, every = f"{label}, validation", max(1, len(at) // 40)
        color = run.look["color"]
        axis.plot(at, held_out, color=color, markevery=every, label=label, **VALIDATION)


def smoothing(rows: int) -> int:
    """Rows that one point of a smoothed curve is the mean of: odd, 1 for no smoothing."""
    return 1 if rows < 60 else 1 + 2 * max(2, rows // 200)


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Centred means over `width` values, over fewer at the ends; what is not finite is left out."""
    finite, window = np.isfinite(values), np.ones(width)
    total = np.convolve(np.where(finite, values, 0), window)
    count = np.convolve(finite, window)
    means = np.where(count, total / np.maximum(count, 1), np.nan)
    return means[width // 2 : width // 2 + len(values)]


def _plain(text: str) -> str:
    """A name as text: dollars are no formula, and a leading underscore hides no label."""
    text = text[:40].replace("$", r"\$")
    return " " + text if text.startswith("_") else text
