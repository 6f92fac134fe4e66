"""Pictures of runs: rows of metrics.jsonl and mixtures in, PNG bytes and their captions out.

The only importer of matplotlib here. The same numbers give the same bytes: own settings instead of
the user's, bundled fonts, no dates. Training is a line, validation has markers.
"""

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from llama.cli import UserError
from llama.html import Picture
from llama.report.runs import Points, Run, mixture, shorter, validation_weights

INK, GREY, TARGET = "#222222", "#555555", "#CBD5DD"
MARKER = {"marker": "o", "markersize": 4.5, "markerfacecolor": "white", "markeredgewidth": 1.3}
VALIDATION: dict[str, Any] = MARKER | {"linewidth": 0.9, "linestyle": (0, (3, 2)), "zorder": 3}
WIDTH_INCHES, DPI = 11.0, 150
MOST_SOURCES = 12
STYLE = {
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": INK,
    "legend.frameon": False,
}
LOSS = "loss (nats per token)"
# Per run: training and validation.
Panel = Sequence[tuple[Points, Points]]
CAPTIONS = {
    "loss": (
        "Loss over tokens",
        "{thin}Validation is the mean of the sources, {weights}.",
    ),
    "sources": (
        "Loss per source",
        "Training since the log line before, and validation on held-out documents. The highest "
        "2 % of the values may lie above a panel.",
    ),
    "optimizer": (
        "Learning rate and gradient norm",
        "Both of the step itself. Dotted: what the norm is clipped to.",
    ),
    "speed": (
        "Speed",
        "Without validation and saving; waiting is the loop's, for its next batch.",
    ),
    "mixture": (
        "Mixture, target and realised",
        "In brackets: realised minus target, in percentage points.",
    ),
}
THIN = "Thin: every log line; thick: mean over {rows} log lines, fewer at the beginning. "
WEIGHTED = "weighted as in the mixture"
UNWEIGHTED = "each weighted alike: the mixtures, and so the training losses, are not the same"


def draw(runs: Sequence[Run]) -> dict[str, Picture]:
    """Every picture that has something to show, by name, in the order of the page."""
    rows = max(smoothing(len(run.rows)) for run in runs)
    thin = THIN.format(rows=rows) if rows > 1 else ""
    weights = WEIGHTED if validation_weights(runs)[1] else UNWEIGHTED
    pictures = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figures = _loss(runs), _sources(runs), _optimizer(runs), _speed(runs), _mixture(runs)
        for (name, (title, caption)), figure in zip(CAPTIONS.items(), figures, strict=True):
            if figure:
                png = io.BytesIO()
                # matplotlib would write its version into the file
                figure.savefig(png, dpi=DPI, metadata={"Software": None})
                caption = caption.format(thin=thin, weights=weights)
                pictures[name] = Picture(title, caption, png.getvalue())
    return pictures


# -- one picture each ------------------------------------------------------------------------------


def _loss(runs: Sequence[Run]) -> Figure | None:
    """The whole run over a logarithmic axis, and its second half over a linear one."""
    weights, _ = validation_weights(runs)
    panel = [(run.series("loss"), run.validation(weights)) for run in runs]
    many = max(len(tokens) for (tokens, _), _ in panel) >= 8
    figure = _curves(runs, {"whole run": panel} | ({"second half": panel} if many else {}), 3.9)
    if figure:
        figure.supylabel(LOSS, fontsize=10)
        whole = figure.axes[0]
        whole.set(xscale="log", xlabel="tokens (logarithmic)")
        whole.autoscale(axis="x")
        whole.xaxis.set_major_formatter(_count)
        whole.xaxis.set_minor_formatter("")
    if figure and many:
        longest = max(tokens[-1] for pair in panel for tokens, _ in pair if tokens)
        figure.axes[1].set_xlim(longest / 2, longest * 1.01)
        _fit_y(figure.axes[1], panel, longest / 2)
    return figure


def _sources(runs: Sequence[Run]) -> Figure | None:
    names = dict.fromkeys(name for run in runs for name in run.sources("loss", "val"))
    panels: dict[str, Panel] = {
        name: [(run.series(f"loss/{name}"), run.series(f"val/{name}")) for run in runs]
        for name in list(names)[:MOST_SOURCES]
    }
    figure = _curves(runs, panels, 2.8)
    if figure:
        figure.supylabel(LOSS, fontsize=10)
        for axis, panel in zip(figure.axes, panels.values(), strict=True):
            _fit_y(axis, panel, 0, 0.02)
    return figure


def _optimizer(runs: Sequence[Run]) -> Figure | None:
    figure = _pair(runs, {"learning rate": "lr", "gradient norm before clipping": "grad_norm"})
    if figure:
        left, right = figure.axes
        for clip in {run.config["optim.clip"] for run in runs if "optim.clip" in run.config}:
            right.axhline(clip, color="#777777", linewidth=1.1, linestyle=(0, (1, 2)))
        values = [v for run in runs for v in run.series("grad_norm")[1] if 0 < v < math.inf]
        if values and max(values) > 20 * min(values):
            right.set_yscale("log")
            right.autoscale(axis="y")
        left.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_major_formatter("{x:g}")
    return figure


def _speed(runs: Sequence[Run]) -> Figure | None:
    wait = "% of the time waiting for data"
    figure = _pair(runs, {"tokens/s, all processes": "tokens_per_s", wait: "data_wait_pct"})
    if figure:
        figure.axes[0].yaxis.set_major_formatter(_count)
        figure.axes[1].set_ylim(0, max(5, figure.axes[1].get_ylim()[1]))
    return figure


def _pair(runs: Sequence[Run], keys: Mapping[str, str]) -> Figure | None:
    """Values that begin at 0, a panel for each key below its title."""
    none: Points = [], []
    panels = {title: [(run.series(key), none) for run in runs] for title, key in keys.items()}
    figure = _curves(runs, panels, 3.4)
    for axis in figure.axes if figure else ():
        axis.set_ylim(0, None)
    return figure


def _mixture(runs: Sequence[Run]) -> Figure | None:
    """Per run a wide light bar for the target of each source and a thin dark one for what came."""
    mixtures = []
    for run in runs:
        with suppress(UserError):
            mixtures.append((run, mixture(run)[1]))
    if not mixtures:
        return None
    most = max(len(lines) for _, lines in mixtures)
    figure = _figure(len(mixtures), min(len(mixtures), 2), 0.36 * most + 1.2)
    for axis, (run, lines) in zip(figure.axes, mixtures, strict=True):
        places = range(len(lines))
        bars = axis.barh(places, [100 * m.target for m in lines], 0.72, color=TARGET)
        axis.barh(places, [100 * m.realised for m in lines], 0.26, color=run.look["color"])
        off = [f"{100 * (m.realised - m.target):+.3f}".replace("-", "−") for m in lines]
        labels = [f"{100 * m.realised:.2f} %  ({o})" for m, o in zip(lines, off, strict=True)]
        axis.bar_label(bars, labels, padding=5, fontsize=9)
        axis.set_yticks(places, [_plain(m.source) for m in lines], color=INK)
        axis.invert_yaxis()
        axis.grid(False, axis="y")
        axis.set(xlabel="% of the tokens", xlim=(0, 142 * max(m.target for m in lines)))
        axis.set_title(_plain(run.label) if len(runs) > 1 else "")
    handles = [Line2D([], [], color=c, linewidth=w) for c, w in ((TARGET, 9), (INK, 3.5))]
    figure.legend(handles, ["target", "realised"], loc="outside upper left", ncols=2)
    return figure


# -- shared by all ---------------------------------------------------------------------------------


def _figure(panels: int, columns: int, height: float) -> Figure:
    """A figure with `panels` in rows of this height."""
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(WIDTH_INCHES, rows * height + 0.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03)  # type: ignore
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
    n = len(panels)
    columns = min(n, 4 if n in (4, 7, 8) or n > 9 else 3)
    figure = _figure(n, columns, height)
    for axis, (title, panel) in zip(figure.axes, panels.items(), strict=True):
        for run, ((tokens, values), (at, held_out)) in zip(runs, panel, strict=True):
            width = smoothing(len(tokens))
            if width > 1:
                axis.plot(tokens, values, linewidth=0.7, alpha=0.35, zorder=1, **run.look)
                values = smoothed(np.array(values), width).tolist()
            marker = "." if len(tokens) < 3 else None
            axis.plot(tokens, values, linewidth=1.7, marker=marker, **run.look)
            every = max(1, len(at) // 40)
            axis.plot(at, held_out, color=run.look["color"], markevery=every, **VALIDATION)
        axis.set(title=_plain(title), xlabel="tokens", xlim=(0, None))
        axis.xaxis.set_major_formatter(_count)
        axis.locator_params(axis="x", nbins=min(6, 12 // columns))
    _legend(figure, runs, any(at for panel in panels.values() for _, (at, _) in panel))
    return figure


def smoothing(rows: int) -> int:
    """Rows that one point of a smoothed curve is the mean of: odd, 1 for no smoothing."""
    return 1 if rows < 60 else 1 + 2 * max(2, rows // 200)


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Centred means over `width` values, over fewer at the ends; what is not finite is left out.

    Near the beginning at most a quarter of the way back and as far ahead: losses fall too steeply.
    """
    finite = np.isfinite(values)
    total = np.concatenate([[0], np.cumsum(np.where(finite, values, 0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    half = np.minimum(at // 4, width // 2)
    first, end = at - half, np.minimum(at + half + 1, len(values))
    count = number[end] - number[first]
    return np.where(count, (total[end] - total[first]) / np.maximum(count, 1), np.nan)


def _legend(figure: Figure, runs: Sequence[Run], held_out: bool) -> None:
    """Above the panels, where it covers nothing: runs by colour, then what the lines mean."""
    entries = [(_plain(run.label), Line2D([], [], linewidth=2, **run.look)) for run in runs]
    color = GREY if len(runs) > 1 else runs[0].look["color"]
    entries = entries if len(runs) > 1 else []
    if held_out:
        entries.append(("training", Line2D([], [], color=color, linewidth=1.8)))
        entries.append(("validation", Line2D([], [], color=color, **VALIDATION)))
    if entries:
        labels, handles = zip(*entries, strict=True)
        columns = max(1, min(len(labels), 120 // (max(map(len, labels)) + 6)))
        figure.set_figheight(figure.get_figheight() + 0.23 * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def _fit_y(axis: Axes, panel: Panel, first: float, rest: float = 0.0) -> None:
    """Limit y to the values at or behind a position; `rest` leaves out that share at the top."""
    pairs = [pair for curves in panel for points in curves for pair in zip(*points, strict=True)]
    if values := [v for tokens, v in pairs if tokens >= first and math.isfinite(v)]:
        low, high = min(values), np.quantile(values, 1 - rest)
        margin = 0.06 * max(high - low, 1e-3)
        axis.set_ylim(low - margin, high + margin)


def _count(number: float, _: Any = None) -> str:
    """1500 -> 1.5k, 2e9 -> 2B: tick labels."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def _plain(text: str) -> str:
    """A name as text: dollars are no formula, and a leading underscore hides no label."""
    text = shorter(text, 40).replace("$", r"\$")
    return " " + text if text.startswith("_") else text
