"""How right the corpus is, by judges that are not ours: `python -m benchmarks.corpus_quality`.

In: --data, dumps as for `python -m llama.corpus all`; --debian, a folder for each unpacked package
of documentation; --marks, the main content of pages as people have marked it. Out: a row for each
judgement with its figure and the goal; where a judge or a dump is missing, how to get it.
"""

import re
import statistics
import tempfile
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from benchmarks import harness, planted
from benchmarks.dumps import (
    DEBIAN,
    Missing,
    articles,
    c4_judge,
    documents,
    ftz,
    lmplz,
    need,
    samples,
    some,
)
from llama import cli
from llama.corpus.document import Document, apply
from llama.corpus.executors import Executor
from llama.corpus.models import kneser_ney, linear, pieces
from llama.corpus.models import train as train_models
from llama.corpus.steps import c4_rules, containment, language, references, wikitext

# Of a dump: the judge is slow.
MAX_CHARS = 400_000
GONE = frozenset("table ref gallery references timeline imagemap".split())
# Languages with fewer texts to learn from are not judged.
MIN_TEXTS, MAX_TEXTS, MIN_CHARS = 50, 300, 300
# An edited copy changes one word in so many, and lacks its last tenth.
WORDS_A_CHANGE = 200
MIN_BOOK_CHARS = 50_000


@dataclass(frozen=True)
class Row:
    """A judgement: passed when the figure reaches the goal, or stays below one `at_most`."""

    what: str
    judge: str
    figure: float | None
    goal: float | None
    detail: str = ""
    at_most: bool = False

    @property
    def passed(self) -> str:
        if self.figure is None:
            return "missing"
        if self.goal is None:
            return ""
        return (
            "yes"
            if (self.figure <= self.goal if self.at_most else self.figure >= self.goal)
            else "no"
        )


def f1(ours: str, theirs: str) -> float:
    """Harmonic mean of the shares of words that the other has too."""
    a, b = (Counter(re.findall(r"\w+", text.lower())) for text in (ours, theirs))
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


# -- markup ----------------------------------------------------------------------------------------


def of_wikipedia(given: Any) -> Iterator[Row]:
    """Text of articles."""
    parser = need("mwparserfromhell")
    scores: dict[str, list[float]] = defaultdict(list)
    seen = Counter[str]()
    for dump, source in articles(given.data):
        seen[dump] += len(source)
        if seen[dump] <= MAX_CHARS and not re.match(r"\s*#\w+\s*:?\s*\[\[", source):
            ours, theirs = wikitext.plain_text(source), _stripped(parser.parse(source))
            scores[dump[:2]].append(f1(ours, theirs))
    mean = statistics.fmean(score for each in scores.values() for score in each)
    means = sorted((statistics.fmean(each), name) for name, each in scores.items())
    worst = ", ".join(f"{name} {score:.3f}" for score, name in means[:3])
    n = sum(map(len, scores.values()))
    detail = f"{n} articles, {len(scores)} languages, least {worst}"
    yield Row("Wikipedia text, F1 of words", "mwparserfromhell", mean, 0.98, detail)


def _stripped(code: Any) -> str:
    """Without tables, references, galleries, files and categories, then as the judge strips."""
    code.nodes = [node for node in code.nodes if not _is_gone(node)]
    for node in code.nodes:
        for inner in (getattr(node, "contents", None), getattr(node, "text", None)):
            if hasattr(inner, "nodes"):
                _stripped(inner)
    return str(code.strip_code())


def _is_gone(node: Any) -> bool:
    space, colon, _ = str(getattr(node, "title", "")).partition(":")
    if type(node).__name__ == "Wikilink" and colon:
        return space.strip().lower() in wikitext.FILES | wikitext.CATEGORIES
    return type(node).__name__ == "Tag" and str(node.tag).strip().lower() in GONE


def of_html(given: Any) -> Iterator[Row]:
    """Main content of pages."""
    judge = need("trafilatura").extract
    from llama.corpus.steps.html import page_text

    pages = documents(given.data, "commoncrawl", languages=[])
    if not given.marks:
        yield Row("main content, F1 of words", "people", None, None, f"--marks: {MARKS}")
    content = orjson.loads(Path(given.marks).read_bytes()).values() if given.marks else []
    marks = {mark["url"].split("//")[-1]: mark["articleBody"] for mark in content}
    marked: list[tuple[float, float]] = []
    alike: list[float] = []
    for page in pages:
        mark = marks.get(page.meta["url"].split("//")[-1])
        if mark or len(alike) < MAX_PAGES:
            ours, theirs = page_text(page.text)[1], judge(page.text) or ""
            if mark:
                marked.append((f1(ours, mark), f1(theirs, mark)))
            elif theirs:
                alike.append(f1(ours, theirs))
    if marked:
        mine, other = (statistics.fmean(column) for column in zip(*marked, strict=True))
        detail = f"{len(marked)} pages; trafilatura {other:.3f}"
        yield Row("main content, F1 of words", "people", mine, MARKED_GOAL, detail)
    mean = statistics.fmean(alike)
    yield Row("main content, F1 of words", "trafilatura", mean, None, f"{len(alike)} pages")


MARKS = "ground-truth.json of github.com/scrapinghub/article-extraction-benchmark"
MAX_PAGES = 200
MARKED_GOAL = 0.9


# -- language and fluency --------------------------------------------------------------------------


def of_language(given: Any) -> Iterator[Row]:
    """Identifiers, ours trained on other packages than those of the test."""
    if not given.debian:
        raise Missing(f"--debian DIR with packages of Debian, unpacked: {' '.join(DEBIAN)}")
    learnt, test = samples(given.debian, MIN_CHARS)
    names = [name for name in test if len(learnt.get(name, ())) >= MIN_TEXTS <= len(test[name])]
    cuts = partial(train_models.cuts, lengths=train_models.LENGTHS, n=train_models.PIECES)
    rng = np.random.default_rng(0)
    pairs = [(cut, name) for name in names for cut in cuts(learnt[name], rng=rng)]
    texts, labels = zip(*pairs, strict=True)
    ours = linear.fit(texts, labels, "characters")
    identifiers = {
        "ours": lambda: ours.predict,
        "py3langid": lambda: need("py3langid") and language.identifier("")[0],
        "lid.176.ftz": lambda: language.identifier(ftz())[0],
    }
    for chars, goal in ((2000, 0.995), (40, 0.95)):
        for who, load in identifiers.items():
            what = f"language of {'300 characters' if chars > 40 else '40 characters'}, {who}"
            try:
                share, detail = _accuracy(load(), {x: test[x][:MAX_TEXTS] for x in names}, chars)
                yield Row(what, "Debian's translators", share, goal, detail)
            except Missing as missing:
                yield Row(what, "Debian's translators", None, goal, str(missing))


def _accuracy(
    predict: Callable[[str], tuple[str, float]], test: dict[str, list[str]], chars: int
) -> tuple[float, str]:
    """(share that is right, what is worst) over languages of equal weight."""
    right, wrong = [], Counter[str]()
    for name, texts in test.items():
        found = [predict(text[:chars])[0] for text in texts]
        same = {"nb": "no", "nn": "no"}
        found = [same.get(each, each) for each in found]
        wrong.update(f"{name} as {each}" for each in found if each != name)
        right.append(found.count(name) / len(found))
    worst = ", ".join(f"{what} {n}" for what, n in wrong.most_common(3))
    n = sum(map(len, test.values()))
    return statistics.fmean(right), f"{n} texts, {len(test)} languages; {worst}"


def of_fluency(given: Any) -> Iterator[Row]:
    """Perplexity of held-out books by the same pieces and counts."""
    books = [d.text for d in _books(given.data)]
    train = some((text[:400_000] for text in books), 6_000_000)
    held_out = [text[:20_000] for text in books[len(train) :]]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pieces.train(train, folder / "model", max_pieces=8000)
        cut = pieces.Pieces(folder / "model")
        # what a document is to a crawl: some pages of text
        pages = [text[at : at + 4000] for text in train for at in range(0, len(text), 4000)]
        ours = kneser_ney.KneserNey.fit(map(cut.encode, pages), len(cut))
        tested = [cut.encode(text) for text in held_out]
        arpa = lmplz(map(cut.encode, pages), folder, given.lmplz)
        model = need("kenlm").Model(str(arpa))
        score = sum(model.score(" ".join(map(str, ids))) for ids in tested)
    length = sum(len(ids) + 1 for ids in tested)
    mine, theirs = (10 ** (-x / length) for x in (sum(map(ours.score, tested)), score))
    detail = f"{mine:.2f}, theirs {theirs:.2f}, {len(tested)} books"
    yield Row(
        "perplexity, apart from", "KenLM's lmplz", abs(mine / theirs - 1), 0.005, detail, True
    )


def of_references(given: Any) -> Iterator[Row]:
    """The classifier of a planted crawl: books, which are referred to, among pages and posts."""
    books = [d for d in _books(given.data) if d.meta.get("language", "English") == "English"]
    pages = [*documents(given.data, "c4"), *documents(given.data, "stackexchange")]
    # the same texts, of which half are said to be references: there is nothing to learn
    halves = [[d for d in pages if planted.coin(d.id) == side] for side in (0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        scores, is_reference = _judged((books, pages), Path(folder) / "crawl")
        blind, side = _judged(halves, Path(folder) / "blind")
    n, what = f"{len(scores):,} pages of sites not seen", "planted references"
    right = float(((scores >= 0.5) == is_reference).mean())
    kept = scores >= references.THRESHOLD
    detail = f"{n}; of others {kept[~is_reference].mean():.1%} would be kept"
    yield Row(f"{what}, told from others", "the benchmark", right, 0.95, n)
    yield Row(f"{what}, kept", "the benchmark", float(kept[is_reference].mean()), 0.95, detail)
    guessed = [float(((blind >= 0.5) == side)[side == each].mean()) for each in (True, False)]
    detail = f"{len(blind):,} pages of one kind; half is chance"
    yield Row(
        f"{what}, none to tell", "the benchmark", statistics.fmean(guessed), 0.6, detail, True
    )


def _judged(kinds: Sequence[Sequence[Document]], folder: Path) -> tuple[Any, Any]:
    """(scores of the classifier learnt on a crawl, whether they are of references) of its test."""
    crawl = planted.plant(kinds, folder)
    with redirect_stdout(StringIO()):
        learnt = train_models.train(
            [crawl.wikipedia], [crawl.crawl], folder / "models", Executor(1), needs_all=False
        )
    if why := learnt["not_learnt"].get("references"):
        raise Missing(f"more books and pages: {why}")
    model = references.classifier(str(folder / "models"))
    texts, is_reference = zip(*crawl.test, strict=True)
    scores = [model.probability(text, references.LABEL) for text in texts]
    return np.array(scores), np.array(is_reference)


# -- rules and duplicates --------------------------------------------------------------------------


def of_c4(given: Any) -> Iterator[Row]:
    """Decisions on pages of C4 and of a crawl, with the constants of the reference."""
    judge, record = c4_judge()
    crawl = documents(given.data, "commoncrawl", languages=[], preset="llama1")
    texts = [d.text for d in documents(given.data, "c4")]
    texts += some((d.text for d in crawl), 4_000_000)
    rules, same, alike, kept = c4_rules.PRESETS["reference"], 0, 0, 0
    for text in texts:
        page = record(text=text, id="")
        verdict = judge.filter(page)
        reason = "" if verdict is True else verdict[1]
        ours, why, _ = c4_rules.clean(text, rules, None)
        same += why == reason
        kept += not reason
        alike += not reason and ours == page.text
    detail = f"{len(texts)} pages, {kept} kept, of these {alike / kept:.1%} the same text"
    yield Row("decisions of C4", "datatrove, set to the reference", same / len(texts), 0.99, detail)


def of_books(given: Any) -> Iterator[Row]:
    """Copies planted among real books, and books that only look like one."""
    books = [d for d in _books(given.data) if len(d.text) >= MIN_BOOK_CHARS]
    # of the editions of a work one, by its title, or where that is cut off by its number
    number = {d.id: re.split(r"-ed\d|\.", d.id)[0] for d in books}
    title = {
        number[d.id]: re.split("[;:,(]", d.meta["title"])[0].lower()
        for d in books
        if "title" in d.meta
    }
    works = {title.get(number[d.id], number[d.id]): d for d in reversed(books)}
    real = [works[name] for name in sorted(works)]
    cli.expect(len(real) >= 9, f"--data {given.data} holds {len(real)} works", "9 or more")
    third = len(real) // 9 * 3
    edited, abridged, bound = (real[i * third : (i + 1) * third] for i in range(3))
    planted = [*map(_edited, edited), *map(_abridged, abridged)]
    anthologies = [_together(bound[i : i + 3]) for i in range(0, third, 3)]
    mixed = [_mixed(a, b) for a, b in zip(edited, abridged, strict=True)]
    every = [*real, *planted, *anthologies, *mixed]
    gone = {every[i].id for i in _contained(every)}
    copies = {book.id for book in [*planted, *bound]}
    others = {book.id for book in every} - copies
    missed, lost = sorted(copies - gone), sorted(others & gone)
    kinds = f"{len(planted)} copies and abridgements, {len(bound)} books of anthologies"
    share, detail = 1 - len(missed) / len(copies), f"{kinds}; missed: {missed[:3]}"
    yield Row("planted duplicates found", "the benchmark", share, 1.0, detail)
    kinds = f"{len(others)} books, {len(mixed)} of them 60 % of another one, and translations"
    share, detail = 1 - len(lost) / len(others), f"{kinds}; lost: {lost[:3]}"
    yield Row("other books kept", "the benchmark", share, 1.0, detail)


def _books(data: Path) -> list[Document]:
    from llama.corpus.sources import books

    steps = [step for step in books.steps(books.Options()) if not hasattr(step, "reduce")]
    return [d for d in apply(steps, list(documents(data, "books"))) if isinstance(d, Document)]


def _edited(book: Document) -> Document:
    """Another header, some words others, the end missing."""
    words = book.text.split(" ")
    words[::WORDS_A_CHANGE] = ["edited"] * len(words[::WORDS_A_CHANGE])
    text = " ".join(["A new edition.\n\n", *words[: len(words) * 9 // 10]])
    return book._replace(id=f"edited {book.id}", text=text)


def _abridged(book: Document) -> Document:
    """Three fifths of it."""
    n = len(book.text) // 5
    text = "".join(book.text[i * n : (i + 1) * n] for i in (0, 2, 4))
    return book._replace(id=f"abridged {book.id}", text=text)


def _together(books: Sequence[Document]) -> Document:
    text = "\n\n".join(["An anthology.", *(book.text for book in books), "The end."])
    return books[0]._replace(id=f"anthology from {books[0].id}", text=text)


def _mixed(book: Document, other: Document) -> Document:
    """Sixty percent of one, the rest of another."""
    n = min(len(book.text), len(other.text) * 3 // 2)
    text = book.text[: n * 6 // 10] + other.text[-(n * 4 // 10) :]
    return book._replace(id=f"mixed {book.id}", text=text)


def _contained(books: Sequence[Document]) -> list[int]:
    """Which of them the step drops."""
    step = containment.Containment()
    records, _ = step.map(0, iter(books))
    return step.resolve(iter([step.reduce(np.sort(records, order=["key", "document"]))]))[
        "document"
    ].tolist()


CHECKS = {
    "wikipedia": of_wikipedia,
    "html": of_html,
    "language": of_language,
    "fluency": of_fluency,
    "references": of_references,
    "c4": of_c4,
    "books": of_books,
}


def main(argv: list[str]) -> None:
    p = harness.parser("corpus_quality", "The corpus by judges that are not ours.")
    p.add_argument("--only", type=str, nargs="+", choices=CHECKS, default=list(CHECKS))
    p.add_argument("--data", type=Path, default=Path("raw"), help="a folder of dumps per source")
    p.add_argument("--debian", type=Path, default=None, help="a folder per unpacked package")
    p.add_argument("--marks", type=str, default="", help=MARKS)
    p.add_argument(
        "--lmplz", type=str, default="", help="path of KenLM's lmplz, if not on the PATH"
    )
    a = p.parse_args(argv)
    rows: list[Row] = []
    for name in a.only:
        try:
            rows += CHECKS[name](a)
        except Missing as missing:
            rows.append(Row(name, "", None, None, str(missing)))
    print(f"{'what':<41}{'figure':>9}{'goal':>9}  passed")
    for r in rows:
        print(f"{r.what:<41}{_show(r.figure):>9}{_show(r.goal):>9}  {r.passed}")
        print(textwrap.indent(textwrap.fill(f"{r.judge}: {r.detail}", 74), "    "))
    found = [{**asdict(row), "passed": row.passed} for row in rows]
    harness.keep(a.save, "corpus_quality", {"rows": found})


def _show(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.2%}"


if __name__ == "__main__":
    cli.run(main)
