"""The pictures of a run, or of several beside each other: `python -m llama.report runs/quickstart`.

Run folders in; a self-contained HTML page and PNGs beside it out. Runs that are still written, or
that lack validation, checkpoint or shards, give what there is.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llama import cli, files
from llama.cli import UserError
from llama.report import content, runs
from llama.report.page import Contents, html

T = TypeVar("T")
MOST_RUNS = 21  # colours times dashes


def main(argv: list[str]) -> None:
    p = cli.parser("python -m llama.report", "One page and pictures of runs.")
    p.add_argument("run", type=str, nargs="+", help="One or more run folders.")
    p.add_argument(
        "-o",
        "--output",
        type=str,
        default=None,
        help="The page; PNGs go beside it. Default for one run: report.html in its folder.",
    )
    p.add_argument("--samples", type=int, default=3, help="Generations per run; 0 for none.")
    a = p.parse_args(argv)
    if a.samples < 0:
        raise UserError(f"--samples is {a.samples}, expected 0 or more")
    if len(a.run) > MOST_RUNS:
        raise UserError(f"{len(a.run)} runs are given, {MOST_RUNS} can be told apart in a picture")
    page, prefix = _place(a.run, a.output)
    found = runs.read(a.run)
    contents = gather(found, a.samples)
    for name, data in contents.pictures.items():
        _write(page.with_name(f"{prefix}{name}.png"), data)
    _write(page, html(contents).encode())
    pictures = ", ".join(f"{prefix}{name}.png" for name in contents.pictures)
    print(f"wrote {page}" + (f" and, beside it, {pictures}" if pictures else ""))


def _place(given: list[str], output: str | None) -> tuple[Path, str]:
    """(path of the page, what the names of its pictures begin with)."""
    if output is None:
        if len(given) > 1:
            raise UserError(f"{len(given)} runs are given: name the page, as in -o compare.html")
        return Path(given[0]) / "report.html", ""
    page = Path(output)
    if page.suffix not in (".html", ".htm") or page.is_dir():
        raise UserError(f"--output is {output}, expected a file name that ends in .html")
    return page, f"{page.stem}-"


def gather(found: list[runs.Run], n_samples: int) -> Contents:
    """Everything the page shows; what cannot be read becomes a sentence."""
    try:
        # imported here: --help and a wrong folder need no matplotlib
        from llama.report import plots
    except ImportError as error:
        raise UserError(
            f"matplotlib cannot be imported ({error}): the extra `report` brings it, "
            "`pip install -e '.[report]'`"
        ) from error
    mixtures = {run.label: _or_sentence(content.mixture, run) for run in found}
    known = [(run, m[1]) for run in found if not isinstance(m := mixtures[run.label], str)]
    contents = Contents(
        runs=found,
        pictures=plots.draw(found, known),
        colours=plots.COLOURS,
        smoothed_rows=max(plots.smoothing(len(run.rows)) for run in found),
        mixtures=mixtures,
        extracts={run.label: _or_sentence(content.extracts, run) for run in found},
    )
    if n_samples:
        for run in found:
            print(f"drawing samples from {run.folder}", file=sys.stderr)
            contents.samples[run.label] = _or_sentence(content.samples, run, n_samples)
    return contents


def _or_sentence(read: Callable[..., T], *of: Any) -> T | str:
    try:
        return read(*of)
    except UserError as error:
        return str(error)


def _write(path: Path, data: bytes) -> None:
    try:
        files.write_atomic(path, data)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    cli.run(main)
