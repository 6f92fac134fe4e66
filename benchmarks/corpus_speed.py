"""Speed of the cleaners of text on one core: `python -m benchmarks.corpus_speed --input RAW`.

In: dumps, a folder per source as for `python -m llama.corpus all`. Out, per cleaner: MB and records
per second of CPU time, and the ratio to a peer in the same run where one is installed.
"""

import bz2
import gzip
import html
import zipfile
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from benchmarks import harness
from llama import cli
from llama.cli import UserError
from llama.corpus.sources import arxiv, books, stackexchange, wikipedia
from llama.corpus.steps import c4_rules, containment, latex, wikitext

# Enough for a stable figure, little enough that slow peers end.
MB = 4


class Case(NamedTuple):
    """A cleaner, its records, the bytes that go in, and a peer's function of a record."""

    records: list[Any]
    n_bytes: int
    ours: Callable[[Any], object]
    peer: str = ""
    theirs: Callable[[Any], object] | None = None


def _some(texts: Iterator[str]) -> tuple[list[str], int]:
    """The first megabytes of texts, and their bytes."""
    found: list[str] = []
    size = 0
    for text in texts:
        found.append(text)
        size += len(text.encode("utf-8", "replace"))
        if size > MB * 1_000_000:
            break
    return found, size


def wikipedia_case(folder: Path) -> Case:
    def sources() -> Iterator[str]:
        for path in sorted(folder.glob("*.bz2"), key=lambda path: -path.stat().st_size):
            content = bz2.decompress(path.read_bytes())
            for page in wikipedia.pages(iter([content])):
                if isinstance(page, str) and "<redirect" not in page:
                    yield html.unescape(page.partition("<text")[2].partition(">")[2])

    records, size = _some(sources())
    theirs = None
    if find_spec("mwparserfromhell"):
        parse = import_module("mwparserfromhell").parse
        theirs = lambda text: parse(text).strip_code()  # noqa: E731
    return Case(records, size, wikitext.plain_text, "mwparserfromhell", theirs)


def stackexchange_case(folder: Path) -> Case:
    files = sorted(folder.glob("*/Posts.xml"))
    records = [file.read_bytes() for file in files]

    def ours(data: bytes) -> None:
        for row in stackexchange.Rows("x", 1 << 30).feed(data):
            assert isinstance(row, dict)
            stackexchange.strip_tags(row.get("Body", ""))

    def theirs(data: bytes) -> None:
        soup = import_module("bs4").BeautifulSoup
        parse = import_module("xml.etree.ElementTree").fromstring
        for line in data.decode("utf-8-sig").splitlines():
            if line.lstrip().startswith("<row"):
                soup(parse(line).get("Body", ""), "lxml").get_text()

    size = sum(map(len, records))
    return Case(records, size, ours, "ElementTree and bs4", theirs if find_spec("bs4") else None)


def arxiv_case(folder: Path) -> Case:
    records = []
    for path in sorted(folder.glob("*.gz")):
        files, _ = arxiv.unpacked(path.read_bytes(), 1 << 30)
        if files and (main := latex.find_main(files)):
            records.append((files, main))
    size = sum(len(text.encode()) for files, _ in records for text in files.values())
    return Case(records, size, lambda paper: latex.clean(*paper))


def c4_case(folder: Path) -> Case:
    lines = (line for path in sorted(folder.glob("*.gz")) for line in gzip.open(path))
    records, size = _some(orjson.loads(line)["text"] for line in lines)
    rules = c4_rules.PRESETS["reference"]
    return Case(records, size, lambda text: c4_rules.clean(text, rules, None))


def books_case(folder: Path) -> Case:
    def texts() -> Iterator[str]:
        for path in sorted(folder.glob("*.zip")):
            with zipfile.ZipFile(path) as archive:
                yield archive.read(archive.namelist()[0]).decode("utf-8", "replace")

    records, size = _some(texts())

    def ours(text: str) -> None:
        book, _, _ = books.unframed(text.replace("\r\n", "\n"))
        containment.shingles(book)

    return Case(records, size, ours)


CASES = {
    "wikipedia": wikipedia_case,
    "stackexchange": stackexchange_case,
    "arxiv": arxiv_case,
    "c4": c4_case,
    "books": books_case,
}


def measure(case: Case, n: int) -> dict[str, Any]:
    """Medians over `n` rounds of all records."""

    def through(function: Callable[[Any], object]) -> Callable[[], None]:
        return lambda: [function(record) for record in case.records] and None

    works = [through(case.ours), *([through(case.theirs)] if case.theirs else [])]
    turns = harness.rounds(n, *works)
    seconds = harness.Spread.of([turn[0].cpu_s for turn in turns]).median
    found: dict[str, Any] = {
        "records": len(case.records),
        "mb": case.n_bytes / 1e6,
        "mb_per_s": case.n_bytes / 1e6 / seconds,
    }
    if case.theirs:
        found |= {"peer": case.peer, "ratio": harness.Comparison.of(turns).ratio_cpu}
    return found


def main(argv: list[str]) -> None:
    p = cli.parser("python -m benchmarks.corpus_speed", "Cleaners of text, on one core.")
    p.add_argument("--input", required=True, help="Folder with a folder of dumps per source.")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    a = p.parse_args(argv)
    results = {}
    for name, case in CASES.items():
        if (Path(a.input) / name).is_dir():
            results[name] = measure(case(Path(a.input) / name), a.rounds)
    if not results:
        raise UserError(f"--input {a.input} holds no folder called {', '.join(CASES)}")
    rows = [
        (name, r["records"], f"{r['mb']:.1f}", f"{r['mb_per_s']:.1f}", r.get("peer", "-"),
         r["ratio"].show() if "ratio" in r else "-")
        for name, r in results.items()
    ]  # fmt: skip
    print(cli.table(("source", "records", "MB", "MB/s", "peer", "times as fast"), rows))
    if a.save:
        print("saved in", harness.save("corpus_speed", results).name)


if __name__ == "__main__":
    cli.run(main)
