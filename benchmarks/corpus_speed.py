"""Speed of the steps of the corpus on one core: `python -m benchmarks.corpus_speed --input RAW`.

In: dumps, a folder per source as for `python -m llama.corpus all`. Out, for each step as a run
calls it: megabytes or records per second of CPU time beside the goal, what peers that are installed
do in the same run, and the most memory; then how the time grows with hostile input. Each step is
measured in a process of its own, with all that it starts.
"""

import gzip
import multiprocessing
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from functools import cache, partial
from hashlib import sha1
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import dumps, harness
from benchmarks.corpus_growth import HOSTILE, Work, cleaned, document, growth, masked, timed
from benchmarks.dumps import Missing, need, some
from llama import cli, files
from llama.corpus import recipes, warc
from llama.corpus.models import kneser_ney, linear, pieces
from llama.corpus.models import train as train_models
from llama.corpus.sources import arxiv, books, stackexchange
from llama.corpus.steps import (
    c4_rules,
    containment,
    html,
    language,
    latex,
    lines,
    minhash,
    perplexity,
    wikitext,
)

# Enough for a stable figure, little enough that slow peers end.
MB = 4_000_000
# What is identified or scored, as long as a page after cleaning; n-grams that it adds to a model.
PAGE_CHARS, PAGE_N_GRAMS = 2500, 1400
DEADLINE_S, MEMORY_BYTES, MAX_RECORD_BYTES = 5.0, 1 << 30, 1 << 28


class Case(NamedTuple):
    """What a step does to each record, how much that is in its unit, and loaders of peers."""

    records: list[Any]
    amount: float
    ours: Work
    peers: Mapping[str, Callable[[], Work]] = {}


def megabytes(texts: list[str], ours: Work, **peers: Callable[[], Work]) -> Case:
    """A case that is measured in MB of UTF-8."""
    size = sum(len(text.encode("utf-8", "replace")) for text in texts) / 1e6
    return Case(texts, size, ours, peers)


def texts(data: Path, source: str, **options: Any) -> list[str]:
    return some((d.text for d in dumps.documents(data, source, **options)), MB)


def crawl(data: Path) -> list[str]:
    return texts(data, "commoncrawl", languages=[], preset="llama1")


@cache
def pages(data: Path) -> list[str]:
    """Books, cut."""
    found = (d.text for d in dumps.documents(data, "books"))
    return [t[i : i + PAGE_CHARS] for t in found for i in range(0, len(t), PAGE_CHARS)]


# -- steps and their peers -------------------------------------------------------------------------


def warc_case(data: Path) -> Case:
    paths = sorted(map(str, (data / "commoncrawl").rglob("*pages*.warc.gz")))
    if not paths:
        raise Missing(f"no *pages*.warc.gz in {data / 'commoncrawl'}")

    def ours(path: str) -> list[int]:
        return [len(record.body) for record in warc.records(path, MAX_RECORD_BYTES)]

    def theirs(module: str, stream: str) -> Work:
        records = need(module).ArchiveIterator
        return lambda path: [getattr(r, stream).read() for r in records(open(path, "rb"))]

    peers = {
        "fastwarc": partial(theirs, "fastwarc.warc", "reader"),
        "warcio": partial(theirs, "warcio.archiveiterator", "raw_stream"),
    }
    return Case(paths, sum(sum(ours(path)) for path in paths) / 1e6, ours, peers)


def html_case(data: Path) -> Case:
    """Pages of about 33 kB, all at once, since a guard is for many."""
    found = (d.text for d in dumps.documents(data, "commoncrawl", languages=[]))
    records = some((page for page in found if 20_000 < len(page) < 50_000), MB)

    def ours(pages: list[str]) -> None:
        list(html.main_content(map(document, pages), DEADLINE_S, MEMORY_BYTES))

    def trafilatura() -> Work:
        # as datatrove calls it
        options = {"favor_precision": True, "include_comments": False, "deduplicate": True}
        extract = partial(need("trafilatura").extract, **options)
        return lambda pages: list(map(extract, pages))

    def bare() -> Work:
        return lambda pages: list(map(html.page_text, pages))

    peers = {"resiliparse without a guard": bare, "trafilatura": trafilatura}
    return Case([records], len(records), ours, peers)


def lines_case(data: Path) -> Case:
    """The peer is a plain way of doing what CCNet does, written here: a line at a time."""
    digits = str.maketrans("123456789", "000000000")
    marks = re.compile(r"[,.:;!?'\"()\[\]/~_%*-“”„‘’«»–—…、。，：；！？（）·\x00-\x1f\x7f-\x9f]")

    def by_line(text: str) -> None:
        for line in text.split("\n"):
            sha1(marks.sub("", line.strip().lower().translate(digits)).encode()).digest()

    return megabytes(crawl(data), lines.line_keys, plain=lambda: by_line)


def identifier(data: Path) -> linear.Linear:
    """Ours, of the languages of the Wikipedias, learnt in haste."""
    rng, learnt = np.random.default_rng(0), []
    for dump, source in dumps.articles(data):
        found = [wikitext.plain_text(source)]
        cuts = train_models.cuts(found, train_models.LENGTHS, 6, rng)
        learnt += [(cut, dump[:2]) for cut in cuts if found[0]]
    known, labels = zip(*learnt, strict=True)
    return linear.fit(known, labels, "characters", passes=1)


def language_case(data: Path) -> Case:
    def head(predict: Work) -> Work:
        return lambda text: predict(text[: language.HEAD_CHARS])

    def theirs(load: Callable[[], str]) -> Work:
        return head(language.identifier(load())[0])

    found = pages(data)[:1000]
    peers = {"py3langid": lambda: theirs(str), "lid.176.ftz": lambda: theirs(dumps.ftz)}
    return Case(found, len(found), head(identifier(data).predict), peers)


def model_of(data: Path, n_grams: int, folder: Path) -> list[Any]:
    """A language model in a folder of models; the pieces that it was made from."""
    (folder / "lm").mkdir(parents=True)
    pieces.train(pages(data)[:2000], folder / "lm/en.model", max_pieces=16_000)
    cut = pieces.Pieces(folder / "lm/en.model")
    ids = list(map(cut.encode, pages(data)[: n_grams // PAGE_N_GRAMS]))
    kneser_ney.KneserNey.fit(ids, len(cut)).save(folder / "lm/en.npy")
    files.write_json(folder / "cutoffs.json", {"en": {"head": 300.0, "middle": 600.0}})
    return ids


def perplexity_case(data: Path, n_grams: int) -> Case:
    folder = Path(tempfile.mkdtemp())
    learnt = model_of(data, n_grams, folder)
    ours = perplexity.scorer(str(folder), "en")
    assert ours

    def kenlm() -> Work:
        model = need("kenlm").Model(str(dumps.lmplz(learnt, folder)))
        cut = pieces.Pieces(folder / "lm/en.model")
        return lambda text: model.score(" ".join(map(str, cut.encode(text))))

    return Case(pages(data)[-1000:], 1000, ours, {"kenlm": kenlm})


def c4_case(data: Path) -> Case:
    def datatrove() -> Work:
        judge, record = dumps.c4_judge()
        return lambda text: judge.filter(record(text=text, id=""))

    rules = c4_rules.PRESETS["reference"]
    ours = partial(c4_rules.clean, rules=rules, bad=None)
    return megabytes(texts(data, "c4"), ours, datatrove=datatrove)


def code_case(data: Path) -> Case:
    """Files of Python's own library; no cleaner of code installs as a package."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*/*.py"))
    return megabytes(some((path.read_text("utf-8", "replace") for path in paths), MB), cleaned)


def wikipedia_case(data: Path) -> Case:
    def mwparserfromhell() -> Work:
        parse = need("mwparserfromhell").parse
        return lambda text: parse(text).strip_code()

    large = reversed([source for _, source in dumps.articles(data)])
    return megabytes(some(large, MB), wikitext.plain_text, mwparserfromhell=mwparserfromhell)


def books_case(data: Path) -> Case:
    def ours(text: str) -> None:
        containment.shingles(books.unframed(text.replace("\r\n", "\n"))[0])

    return megabytes(texts(data, "books"), ours)


def arxiv_case(data: Path) -> Case:
    found = (arxiv.unpacked(p.read_bytes(), 1 << 30)[0] for p in (data / "arxiv").glob("*.gz"))
    records = [(paper, main) for paper in found if paper and (main := latex.find_main(paper))]
    size = sum(len(text.encode()) for paper, _ in records for text in paper.values())
    return Case(records, size / 1e6, lambda paper: latex.clean(*paper))


def stackexchange_case(data: Path) -> Case:
    records = [path.read_bytes() for path in sorted((data / "stackexchange").glob("*/Posts.xml"))]

    def ours(posts: bytes) -> None:
        for row in stackexchange.Rows("x", 1 << 30).feed(posts):
            assert isinstance(row, dict)
            stackexchange.strip_tags(row.get("Body", ""))

    def soup() -> Work:
        make, parse = need("bs4").BeautifulSoup, need("xml.etree.ElementTree").fromstring
        rows = re.compile(rb"^\s*(<row.*)", re.MULTILINE)
        return lambda posts: [
            make(parse(row).get("Body", ""), "lxml").get_text() for row in rows.findall(posts)
        ]

    n_posts = sum(posts.count(b"<row ") for posts in records)
    return Case(records, n_posts, ours, {"ElementTree and bs4": soup})


def minhash_case(data: Path) -> Case:
    def shingles(text: str) -> list[str]:
        words = text.lower().split()
        return [" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))]

    def datatrove() -> Work:
        need("spacy")
        dedup = need("datatrove.pipeline.dedup.minhash")
        # its default does not take what xxhash 4 asks for
        config = dedup.MinhashConfig(hash_config=dedup.HashConfig(hash_fc="sha1"))
        signer = dedup.MinhashDedupSignature("memory://", config)
        return lambda text: signer.get_signature(signer.get_shingles(text))

    def datasketch() -> Work:
        sketch = need("datasketch").MinHash
        return lambda text: sketch(112).update_batch([x.encode() for x in shingles(text)])

    def rensa() -> Work:
        sketch = need("rensa").RMinHash
        return lambda text: sketch(112, 1).update(shingles(text))

    step = minhash.MinHash()
    peers = {"datatrove": datatrove, "datasketch": datasketch, "rensa": rensa}
    return Case(pages(data)[:300], 300, lambda text: step.map(0, iter([document(text)])), peers)


def personal_case(data: Path) -> Case:
    """The peer does without phone numbers."""
    formatter = "datatrove.pipeline.formatters"
    return megabytes(crawl(data), masked, datatrove=lambda: need(formatter).PIIFormatter().format)


def wet_case(data: Path) -> Case:
    """The recipe from a WET file to written documents: lines, language and perplexity."""
    folder = Path(tempfile.mkdtemp())
    model_of(data, 10_000_000, folder / "models")
    identifier(data).save(folder / "models/language.npz")
    found = [*pages(data)[-4000:], *crawl(data)]
    (folder / "in").mkdir()
    with gzip.open(folder / "in" / "pages.warc.wet.gz", "wb") as file:
        for page in found:
            body = f"title\n{page}".encode("utf-8", "replace")
            head = f"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: {len(body)}\r\n\r\n"
            file.write(head.encode() + body + b"\r\n\r\n")
    given = f"--recipe commoncrawl --preset llama1 --languages [] --workers 1 --input {folder}/in"
    given += f" --models {folder}/models --language_model {folder}/models/language.npz"
    given += " --min_reference_score 0 --output"

    def ours(output: Path) -> None:
        shutil.rmtree(output, ignore_errors=True)
        with redirect_stdout(StringIO()):
            recipes.main([*given.split(), str(output)])

    return Case([folder / "out"], len(found), ours)


# Unit, goal in units per second (0: none) and the case.
STEPS: dict[str, tuple[str, float, Callable[[Path], Case]]] = {
    "WARC records": ("MB", 300, warc_case),
    "HTML, with the guard": ("pages", 300, html_case),
    "lines": ("MB", 30, lines_case),
    "language": ("documents", 2500, language_case),
    "perplexity, 1M n-grams": ("documents", 800, partial(perplexity_case, n_grams=1_000_000)),
    "perplexity, 10M n-grams": ("documents", 400, partial(perplexity_case, n_grams=10_000_000)),
    "C4 rules": ("MB", 40, c4_case),
    "code": ("MB", 80, code_case),
    "wikitext": ("MB", 8, wikipedia_case),
    "books": ("MB", 8, books_case),
    "LaTeX": ("MB", 10, arxiv_case),
    "posts": ("posts", 25_000, stackexchange_case),
    "MinHash": ("documents", 1800, minhash_case),
    "personal data": ("MB", 0, personal_case),
    "WET, end to end": ("documents", 500, wet_case),
}


def measure(name: str, data: Path, n: int) -> dict[str, Any]:
    """Medians over `n` rounds of ours and of the peers in alternation."""
    unit, goal, make = STEPS[name]
    case = make(data)
    works, rates = {"": case.ours}, {}
    # the peak is that of the step: what made its input is forgotten, peers come later
    Path("/proc/self/clear_refs").write_text("5")
    timed(case.ours, case.records)
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    for peer, load in case.peers.items():
        with suppress(Missing):
            works[peer] = load()
    turns = [[timed(work, case.records) for work in works.values()] for _ in range(n)]
    for peer, seconds in zip(works, zip(*turns, strict=True), strict=True):
        rates[peer] = case.amount / harness.Spread.of(seconds).median
    found = {"unit": unit, "amount": case.amount, "goal": goal, "per_s": rates.pop("")}
    return found | {"peers": rates, "peak_mb": int(peak[1]) / 1000 if peak else None}


def main(argv: list[str]) -> None:
    p = harness.parser("corpus_speed", "Steps of the corpus on one core, and their peers.")
    p.add_argument("--input", required=True, help="Folder with a folder of dumps per source.")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--only", type=str, nargs="+", choices=STEPS, default=list(STEPS))
    a = p.parse_args(argv)
    steps, rows, told = {}, [], []
    for name in a.only:
        # a process each, so that its memory is that of the step
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                r = steps[name] = pool.submit(measure, name, Path(a.input), a.rounds).result()
            except Missing as missing:
                rows.append((name, "-", "", "-", "-"))
                told.append(f"{name}: {missing}")
                continue
        met = ("no", "yes")[r["per_s"] >= r["goal"]] if r["goal"] else ""
        rows.append((name, f"{r['per_s']:,.1f}", r["unit"], met, f"{r['peak_mb']:.0f}"))
        rows += [(f"  {peer}", f"{rate:,.1f}", "", "", "") for peer, rate in r["peers"].items()]
    print(cli.table(("step, peers", "per second", "of", "goal met", "peak MB"), rows))
    print("".join(f"missing: {line}\n" for line in told), end="")
    hostile = {name: growth(name) for name in HOSTILE}
    header = ("hostile to", "input", "times as long for 4 times as much", "seconds")
    shown = [(x, repr(unit), f"{times:.1f}", f"{s:.3f}") for x, (times, unit, s) in hostile.items()]
    print("\n" + cli.table(header, shown))
    harness.keep(a.save, "corpus_speed", {"steps": steps, "hostile": hostile})


if __name__ == "__main__":
    cli.run(main)
