"""Pictures of runs: rows of metrics.jsonl and mixtures in, PNG bytes out.

The only importer of matplotlib. The same numbers give the same bytes: own settings instead of the
user's, bundled fonts, no dates. One colour per run everywhere, told apart by colour-blind readers
(Okabe and Ito 2008); training is a line, validation has markers.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from llama.report.content import Mixture
from llama.report.runs import Run, shorter, validation_weights

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
DASHES = ("-", (0, (6, 2)), (0, (2, 2)))
INK = "#222222"
CLIP: dict[str, Any] = {"color": "#777777", "linewidth": 1.1, "linestyle": (0, (1, 2))}
VALIDATION: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (3, 2)), "zorder": 3}
MARKER: dict[str, Any] = {
    "marker": "o",
    "markersize": 4.5,
    "markerfacecolor": "white",
    "markeredgewidth": 1.3,
}
WIDTH_INCHES, DPI = 11.0, 150
MOST_SOURCES = 12
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
Points = tuple[Sequence[float], Sequence[float]]


def draw(runs: Sequence[Run], mixtures: Sequence[tuple[Run, list[Mixture]]]) -> dict[str, bytes]:
    """Every picture that has something to show, by name, in the order of the page."""
    pictures = {
        "loss": _loss(runs),
        "sources": _sources(runs),
        "optimizer": _optimizer(runs),
        "speed": _speed(runs),
        "mixture": _mixture(mixtures),
    }
    return {name: data for name, data in pictures.items() if data}


# -- one picture each ------------------------------------------------------------------------------


def _loss(runs: Sequence[Run]) -> bytes | None:
    """The whole run over a logarithmic axis, and its second half over a linear one."""
    weights, _ = validation_weights(runs)
    curves = [(run.series("loss"), run.validation(weights)) for run in runs]
    if not any(len(train[0]) for train, _ in curves):
        return None
    longest = max(max((*train[0], *held_out[0], 0)) for train, held_out in curves)
    rows = max(len(train[0]) for train, _ in curves)
    with _figure(3.9, 2 if rows >= 8 else 1) as (figure, axes, png):
        for axis, title in zip(axes, ("whole run", "second half"), strict=False):
            for i, (train, held_out) in enumerate(curves):
                _curve(axis, train, **_line(i))
                _marked(axis, held_out, **_line(i))
            axis.set(title=title, xlabel="tokens", ylabel="loss (nats per token)")
            axis.xaxis.set_major_formatter(FuncFormatter(_count))
        axes[0].set(xscale="log", xlabel="tokens (logarithmic)")
        axes[0].xaxis.set_minor_formatter("")
        if len(axes) > 1:
            axes[1].set_xlim(longest / 2, longest * 1.01)
            _fit_y(axes[1], [points for pair in curves for points in pair], longest / 2)
        _legend(figure, runs, any(held_out[0] for _, held_out in curves))
    return png.getvalue()


def _sources(runs: Sequence[Run]) -> bytes | None:
    names = list(dict.fromkeys(name for run in runs for name in run.sources()))[:MOST_SOURCES]
    if not names:
        return None
    held_out = False
    columns = min(len(names), 4 if len(names) in (4, 7, 8) or len(names) > 9 else 3)
    with _figure(2.7 * math.ceil(len(names) / columns) + 0.2, columns, len(names)) as drawn:
        figure, axes, png = drawn
        for place, (axis, name) in enumerate(zip(axes, names, strict=True)):
            curves = [(run.series(f"loss/{name}"), run.series(f"val/{name}")) for run in runs]
            for i, (train, valid) in enumerate(curves):
                _curve(axis, train, **_line(i))
                _marked(axis, valid, **_line(i))
                held_out = held_out or bool(valid[0])
            _fit_y(axis, [points for pair in curves for points in pair], 0, 0.02)
            axis.set(title=_plain(name), xlabel="tokens", xlim=(0, None))
            axis.set_ylabel("loss (nats per token)" if place % columns == 0 else "")
            axis.xaxis.set_major_formatter(FuncFormatter(_count))
            axis.locator_params(axis="x", nbins=4)
        _legend(figure, runs, held_out)
    return png.getvalue()


def _optimizer(runs: Sequence[Run]) -> bytes | None:
    rates = [run.series("lr") for run in runs]
    norms = [run.series("grad_norm") for run in runs]
    if not any(len(points[0]) for points in (*rates, *norms)):
        return None
    with _figure(3.4, 2) as (figure, (left, right), png):
        for i, (rate, norm) in enumerate(zip(rates, norms, strict=True)):
            left.plot(*rate, linewidth=1.6, **_line(i))
            _curve(right, norm, **_line(i))
        left.set(title="learning rate", xlabel="tokens", ylabel="learning rate", ylim=(0, None))
        right.set(title="gradient norm before clipping", xlabel="tokens", ylabel="L2 norm")
        positive = [v for _, values in norms for v in values if v > 0 and math.isfinite(v)]
        if positive and max(positive) > 20 * min(positive):
            right.set_yscale("log")
        else:
            right.set_ylim(0, None)
        for axis in (left, right):
            axis.yaxis.set_major_formatter(FuncFormatter(_short))
        clips = sorted({c for run in runs if (c := run.config.get("optim.clip"))})
        for clip in clips:
            right.axhline(clip, **CLIP)
        limits = [(Line2D([], [], **CLIP), f"clipped to {clip:g}") for clip in clips]
        _token_axes(left, right)
        _legend(figure, runs, False, limits)
    return png.getvalue()


def _speed(runs: Sequence[Run]) -> bytes | None:
    rates = [run.series("tokens_per_s") for run in runs]
    waits = [run.series("data_wait_pct") for run in runs]
    if not any(len(points[0]) for points in (*rates, *waits)):
        return None
    with _figure(3.4, 2) as (figure, (left, right), png):
        for i, (rate, wait) in enumerate(zip(rates, waits, strict=True)):
            _curve(left, rate, **_line(i))
            _curve(right, wait, **_line(i))
        left.set(title="throughput", xlabel="tokens", ylabel="tokens/s, all processes")
        left.set_ylim(0, None)
        left.yaxis.set_major_formatter(FuncFormatter(_count))
        right.set(title="waiting for data", xlabel="tokens", ylabel="% of the time")
        most = max((v for _, values in waits for v in values if math.isfinite(v)), default=0)
        right.set_ylim(0, max(5.0, 1.1 * most))
        _token_axes(left, right)
        _legend(figure, runs, False)
    return png.getvalue()


def _mixture(mixtures: Sequence[tuple[Run, list[Mixture]]]) -> bytes | None:
    """Per run a wide light bar for the target of each source and a thin dark one for what came."""
    if not mixtures:
        return None
    columns = min(len(mixtures), 2)
    most = max(len(lines) for _, lines in mixtures)
    height = (0.36 * most + 1.0) * math.ceil(len(mixtures) / columns) + 0.4
    with _figure(height, columns, len(mixtures)) as (figure, axes, png):
        for i, (axis, (run, lines)) in enumerate(zip(axes, mixtures, strict=True)):
            places = range(len(lines))
            axis.barh(places, [100 * m.target for m in lines], 0.72, color="#CBD5DD")
            axis.barh(places, [100 * m.realised for m in lines], 0.26, color=_line(i)["color"])
            for place, m in enumerate(lines):
                text = f"{100 * m.realised:.2f} %  ({_signed(100 * (m.realised - m.target))})"
                end = 100 * max(m.target, m.realised)
                axis.annotate(
                    text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9
                )
            axis.set_yticks(places, [_plain(m.source) for m in lines], color=INK)
            axis.invert_yaxis()
            axis.grid(False, axis="y")
            axis.set_xlabel("% of the tokens")
            axis.set_xlim(0, 100 * max(max(m.target, m.realised) for m in lines) * 1.42)
            axis.set_title(_plain(run.label) if len(mixtures) > 1 else "")
        handles = [Line2D([], [], color=c, linewidth=w) for c, w in (("#CBD5DD", 9), (INK, 3.5))]
        figure.legend(handles, ["target", "realised"], loc="outside upper left", ncols=2)
    return png.getvalue()


# -- shared by all ---------------------------------------------------------------------------------


@contextmanager
def _figure(
    height: float, columns: int, panels: int | None = None
) -> Iterator[tuple[Figure, list[Axes], io.BytesIO]]:
    """A figure with panels and the buffer that holds its PNG when the block has ended."""
    panels = panels or columns
    buffer = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03)  # type: ignore
        rows = math.ceil(panels / columns)
        axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
        yield figure, axes, buffer
        # matplotlib would write its version into the file
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})


def _line(run: int) -> dict[str, Any]:
    """How the lines of the i-th run look."""
    dashes = DASHES[run // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[run % len(COLOURS)], "linestyle": dashes}


def _curve(axis: Axes, points: Points, **look: Any) -> None:
    """Every row thin, and the mean of neighbouring rows over it where there are many."""
    x, y = np.asarray(points[0], float), np.asarray(points[1], float)
    width = smoothing(len(x))
    if width == 1:
        axis.plot(x, y, linewidth=1.6, marker="." if len(x) < 3 else None, **look)
        return
    axis.plot(x, y, linewidth=0.7, alpha=0.35, **look)
    axis.plot(x, smoothed(y, width), linewidth=1.8, **look)


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


def _marked(axis: Axes, points: Points, color: str, **_: Any) -> None:
    """Validation: a thin line, and markers that stay apart when there are many."""
    x, y = points
    axis.plot(x, y, color=color, markevery=max(1, len(x) // 40), **VALIDATION, **MARKER)


def _legend(
    figure: Figure,
    runs: Sequence[Run],
    held_out: bool,
    others: Sequence[tuple[Line2D, str]] = (),
) -> None:
    """Above the panels, where it covers nothing: runs by colour, then what the lines mean."""
    several = len(runs) > 1
    entries = [(Line2D([], [], linewidth=2, **_line(i)), run.label) for i, run in enumerate(runs)]
    entries = entries if several else []
    if held_out:
        color = "#555555" if several else COLOURS[0]
        entries.append((Line2D([], [], color=color, linewidth=1.8), "training"))
        entries.append((Line2D([], [], color=color, **VALIDATION, **MARKER), "validation"))
    entries += others
    if entries:
        handles, labels = zip(*((handle, _plain(label)) for handle, label in entries), strict=True)
        columns = max(1, min(len(labels), 120 // (max(map(len, labels)) + 6)))
        figure.set_figheight(figure.get_figheight() + 0.23 * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def _fit_y(axis: Axes, curves: Sequence[Points], first: float, rest: float = 0.0) -> None:
    """Limit y to the values at or behind a position; `rest` leaves out that share at the top."""
    values = [v for x, y in curves for at, v in zip(x, y, strict=True) if at >= first]
    finite = np.array([v for v in values if math.isfinite(v)])
    if len(finite):
        low, high = finite.min(), np.quantile(finite, 1 - rest)
        margin = 0.06 * max(high - low, 1e-3)
        axis.set_ylim(low - margin, high + margin)


def _token_axes(*axes: Axes) -> None:
    for axis in axes:
        axis.set_xlim(0, None)
        axis.xaxis.set_major_formatter(FuncFormatter(_count))
        axis.locator_params(axis="x", nbins=6)


def _count(number: float, _: Any = None) -> str:
    """1500 -> 1.5k, 2e9 -> 2B: tick labels."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def _signed(number: float) -> str:
    return f"{number:+.3f}".replace("-", "\u2212")


def _short(number: float, _: Any = None) -> str:
    return f"{number:g}"


def _plain(text: str) -> str:
    """A name as text: dollars are no formula, and a leading underscore hides no label."""
    text = shorter(text, 40).replace("$", r"\$")
    return " " + text if text.startswith("_") else text
