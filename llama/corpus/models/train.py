"""`python -m llama.corpus train_models`: what CCNet learns, from the user's own text (paper §2.1).

In: folders of documents that the recipes wikipedia and commoncrawl have cleaned. Out: MODELS, with
a language identifier, for each language a SentencePiece and an n-gram model, a classifier of the
pages that Wikipedia refers to, cutoffs.json (perplexities below which a page is in the head or the
middle: 30th and 60th percentile of the crawl's pages), models.json (what was learnt from what, and
how good it is on text held out) and report.txt, the same for people.

Documents are counted first, and what is not enough is said before anything is trained. MODELS is
made aside and renamed; killed, the same command goes on, to the same bytes.
"""

import heapq
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from llama import cli, files
from llama.cli import UserError
from llama.corpus import executors, journal, runner
from llama.corpus.executors import Executor
from llama.corpus.journal import Record, stamp
from llama.corpus.models import linear, pieces, samples
from llama.corpus.models.kneser_ney import KneserNey
from llama.corpus.plan import header
from llama.corpus.pool import At
from llama.corpus.runner import Stage, Task
from llama.corpus.steps import perplexity
from llama.corpus.steps.references import LABEL, THRESHOLD

MIN_BYTES, MIN_PAGES, MIN_REFERENCES = 1_000_000, 100, 1000
# The identifier learns from pieces of text of these lengths, so many of a language, out of so many
# articles; it is judged on others.
LENGTHS, PIECES, ARTICLES = (20, 40, 80, 160, 320, 1000), 1500, 1000
JUDGED_LENGTHS, JUDGED_PIECES = (40, 300), 200
SAMPLES, MODELS, REPORT = "samples", "models.json", "report.txt"


def main(argv: Sequence[str]) -> None:
    """Read the command line, then train."""
    p = cli.parser("python -m llama.corpus train_models", "Models of languages and quality.")
    p.add_argument("--wikipedia", nargs="+", required=True, help="Folders of clean articles.")
    p.add_argument("--crawl", nargs="+", required=True, help="Folders of clean pages.")
    p.add_argument("--output", required=True, help="Folder of the models.")
    what = "Those that need an n-gram model; if not given, all that have enough text."
    p.add_argument("--languages", nargs="+", default=[], help=what)
    executors.add_arguments(p)
    values = p.parse_args(list(argv))
    wikipedia, crawl = (list(map(Path, given)) for given in (values.wikipedia, values.crawl))
    executor = executors.from_arguments(values)
    train(wikipedia, crawl, Path(values.output), executor, values.languages)


def train(
    wikipedia: Sequence[Path],
    crawl: Sequence[Path],
    output: Path,
    executor: Executor,
    languages: Sequence[str] = (),
    needs_all: bool = True,
) -> dict[str, Any]:
    """Make the folder of models, unless it is made already; prints the report.

    Returns models.json. Raises `UserError` naming the count of what is not enough; without
    `needs_all` what cannot be trained for that is left out, and the report says so.
    """
    articles, pages = _files("wikipedia", wikipedia), _files("crawl", crawl)
    inputs = {name: files.sha256(path) for name, path in (articles | pages).items()}
    identity = header("train_models", {"languages": sorted(languages)}, inputs)
    if not output.exists():
        # where a killed run has left what it had
        aside = output.with_name(f".{output.name}.part")
        paths = list(articles.values()), list(pages.values())
        size = sum(path.stat().st_size for side in paths for path in side)
        count = Task("samples", size, (*paths, aside / SAMPLES))
        stage = Stage("models, samples", aside / SAMPLES, identity, [count], _sample)
        [[found]] = runner.run([stage], executor)
        tasks, missing = _tasks(found["counts"], languages)
        asked = {"references", *(f"lm-{language}" for language in languages)}
        if needs_all and (told := [why for name, why in missing.items() if name in asked]):
            shutil.rmtree(aside)
            raise UserError(f"too little to learn from: {'; '.join(told)}")
        stage = Stage("models", aside, identity, tasks, partial(_learn, aside))
        [records] = runner.run([stage], executor)
        _write(aside, identity, found["counts"], records, missing)
        os.rename(aside, output)
        files.fsync(output.parent)
    models: dict[str, Any] = files.read_json(output / MODELS)
    if models.get("plan") != identity["plan"]:
        raise UserError(f"{output} holds models learnt from other documents: remove or move it")
    shutil.rmtree(output / SAMPLES, ignore_errors=True)
    for left in (journal.NAME, ".lock"):
        (output / left).unlink(missing_ok=True)
    print((output / REPORT).read_text(), end="")
    return models


def _files(side: str, folders: Sequence[Path]) -> dict[str, Path]:
    """Files of documents, by names that do not tell where the folders are."""
    found: dict[str, Path] = {}
    for i, folder in enumerate(folders):
        paths = files.document_files(folder) if folder.is_dir() else []
        if not paths:
            raise UserError(f"{folder} is no folder of documents")
        found |= {f"{side}-{i}/{path.relative_to(folder)}": path for path in paths}
    return found


def _write(
    aside: Path, identity: Record, counts: Any, records: Sequence[Record], missing: Any
) -> None:
    """What is said of the models, beside them."""
    learnt = {record["unit"]: record["figures"] for record in records}
    packages = {name: version(name) for name in ("numpy", "sentencepiece")}
    models = {
        **identity,
        "versions": {"python": platform.python_version(), **packages},
        "counts": counts,
        "learnt": learnt,
        "not_learnt": missing,
    }
    cutoffs = {name[3:]: f["cutoffs"] for name, f in learnt.items() if name.startswith("lm-")}
    files.write_json(aside / "cutoffs.json", cutoffs)
    files.write_atomic(aside / REPORT, report(models))
    files.write_json(aside / MODELS, models)


def _sample(task: Task, at: At) -> Record:
    wikipedia, crawl, folder = task.what
    counts = samples.write(wikipedia, crawl, folder)
    made = {path.name: stamp(path) for path in sorted(folder.glob("*.zst"))}
    return {"unit": task.name, "files": made, "counts": counts}


def _tasks(
    counts: Mapping[str, Mapping[str, int]], languages: Sequence[str]
) -> tuple[list[Task], dict[str, str]]:
    """What can be learnt; and what cannot, with the count that is too small."""
    none = {"documents": 0, "bytes": 0}
    tasks, missing = [], {}
    known = [kind.partition("-")[2] for kind in counts if kind.startswith("articles-")]
    enough = [x for x in known if counts[f"articles-{x}"]["bytes"] >= MIN_BYTES]
    if len(enough) > 1:
        size = sum(counts[f"articles-{x}"]["bytes"] for x in enough)
        tasks.append(Task("language", size, (enough,)))
    else:
        missing["language"] = f"{len(enough)} languages of {MIN_BYTES:,} bytes, 2 needed"
    for x in sorted(languages or known):
        articles, pages = (counts.get(f"{kind}-{x}", none) for kind in ("articles", "pages"))
        if articles["bytes"] < MIN_BYTES:
            missing[f"lm-{x}"] = f"{articles['bytes']:,} bytes in {x}, {MIN_BYTES:,} needed"
        elif pages["documents"] < MIN_PAGES:
            missing[f"lm-{x}"] = f"{pages['documents']:,} pages in {x}, {MIN_PAGES:,} needed"
        else:
            tasks.append(Task(f"lm-{x}", articles["bytes"], (x,)))
    classes = {"references": "that Wikipedia refers to", "others": "that it does not refer to"}
    for kind, what in classes.items():
        n = counts.get(kind, none)["documents"]
        if n < MIN_REFERENCES:
            missing["references"] = f"{n:,} pages {what}, {MIN_REFERENCES:,} needed"
            return tasks, missing
    return [*tasks, Task("references", counts["references"]["bytes"], ())], missing


def _learn(aside: Path, task: Task, at: At) -> Record:
    """One model: its files, and how good it is."""
    learners: dict[str, Callable[..., tuple[list[str], dict[str, Any]]]] = {
        "language": _identifier,
        "lm": _language_model,
        "references": _references,
    }
    made, figures = learners[task.name.partition("-")[0]](aside, *task.what)
    known = {name: stamp(aside / name) for name in made}
    return {"unit": task.name, "files": known, "figures": figures}


def _identifier(aside: Path, languages: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Learns from pieces of articles; the same number of every language."""
    rng = np.random.default_rng(0)
    learn: list[tuple[str, str]] = []
    judge: list[tuple[str, str]] = []
    for language in languages:
        some = heapq.nsmallest(ARTICLES, samples.read(aside / SAMPLES, f"articles-{language}"))
        for side, held_out, lengths, n in (
            (learn, False, LENGTHS, PIECES),
            (judge, True, JUDGED_LENGTHS, JUDGED_PIECES),
        ):
            articles = [each.text for each in some if each.is_held_out == held_out]
            # a few long articles may all be on one side
            articles = articles or [each.text for each in some]
            side += [(cut, language) for cut in cuts(articles, lengths, n, rng)]
    texts, labels = zip(*learn, strict=True)
    model = linear.fit(texts, labels, "characters")
    model.save(aside / "language.npz")
    told = [f"tells {len(languages)} languages apart, takes any other for one of them"]
    figures: dict[str, Any] = {"languages": list(languages), "right": {}, "told": told}
    for i, length in enumerate(JUDGED_LENGTHS):
        right = Counter(
            x for text, x in judge[i :: len(JUDGED_LENGTHS)] if model.predict(text)[0] == x
        )
        each = JUDGED_PIECES // len(JUDGED_LENGTHS)
        shares = figures["right"][str(length)] = {x: right[x] / each for x in languages}
        mean, worst = sum(shares.values()) / len(shares), min(shares, key=lambda x: shares[x])
        end = f"{mean:.1%} right, in {worst} {shares[worst]:.1%}"
        told.append(f"pieces of {length} characters: {end}")
    return ["language.npz"], figures


def cuts(
    texts: Sequence[str], lengths: Sequence[int], n: int, rng: np.random.Generator
) -> Iterator[str]:
    """n pieces of texts, of one length after the other."""
    for i in range(n):
        text, length = texts[i % len(texts)], lengths[i % len(lengths)]
        start = int(rng.integers(max(1, len(text) - length)))
        yield text[start : start + length]


def _references(aside: Path) -> tuple[list[str], dict[str, Any]]:
    """Pages that Wikipedia refers to against others, in pairs of the same length."""
    sides: list[list[tuple[str, str]]] = [[], []]
    read = partial(samples.read, aside / SAMPLES)
    # by the text, so that copies of one page at several addresses are one
    classes = [{each.text: each for each in sorted(read(kind))} for kind in (LABEL, "others")]
    for held_out, pairs in enumerate(sides):
        both = (
            [each.text for each in pages.values() if each.is_held_out == held_out]
            for pages in classes
        )
        for page, other in zip(*both, strict=False):
            # cut to the shorter one: length must not tell them apart
            length = min(len(page), len(other))
            pairs += [(page[:length], LABEL), (other[:length], "others")]
    learn, judge = sides if sides[0] else sides[::-1]
    texts, labels = zip(*learn, strict=True)
    model = linear.fit(texts, labels, "words")
    model.save(aside / "references.npz")
    scores = np.array([model.probability(text, LABEL) for text, _ in judge])
    is_reference = np.arange(len(judge)) % 2 == 0
    told = [f"learnt from {len(learn):,} pages, judged on {len(judge):,} of other sites"]
    if judge:
        kept = scores >= THRESHOLD
        told += [
            f"{((scores >= 0.5) == is_reference).mean():.1%} right",
            f"{THRESHOLD} or more: {kept[is_reference].mean():.1%} of references, "
            f"{kept[~is_reference].mean():.1%} of others",
        ]
    return ["references.npz"], {"learnt": len(learn), "judged": len(judge), "told": told}


def _language_model(aside: Path, language: str) -> tuple[list[str], dict[str, Any]]:
    """The n-gram model of a language, and its cut-offs on the pages of the crawl."""
    names = [f"lm/{language}.model", f"lm/{language}.npy"]
    folder, articles = aside / SAMPLES, f"articles-{language}"

    def texts() -> Iterator[str]:
        return (each.text for each in samples.read(folder, articles) if not each.is_held_out)

    of_pieces = pieces.train(texts(), aside / names[0])
    cut = pieces.Pieces(aside / names[0])
    model = KneserNey.fit(map(cut.encode, texts()), len(cut))
    model.save(aside / names[1])
    score = perplexity.scorer(str(aside), language)
    assert score, "a model that was just made"
    held_out = [score(each.text) for each in samples.read(folder, articles) if each.is_held_out]
    pages = [score(each.text) for each in samples.read(folder, f"pages-{language}")]
    known = perplexity.cutoffs(pages)
    median = np.median(held_out) if held_out else np.nan
    told = [
        f"{of_pieces['pieces']:,} pieces, learnt from {model.figures['tokens']:,}",
        f"perplexity of articles held out: {median:.1f}",
        f"of {len(pages):,} pages: head < {known['head']:.1f}, middle < {known['middle']:.1f}",
    ]
    return names, {"pieces": of_pieces, "n_grams": model.figures, "cutoffs": known, "told": told}


def report(models: Mapping[str, Any]) -> str:
    """What a person wants to know of models.json, in lines of 80 characters."""
    rows = [
        ("" if i else name, line)
        for name, figures in models["learnt"].items()
        for i, line in enumerate(figures["told"])
    ]
    parts = [cli.table(("learnt", "on text held out"), rows)] if rows else []
    if missing := models["not_learnt"]:
        rows = [(name, f"there are {why}") for name, why in missing.items()]
        parts.append(cli.table(("NOT LEARNT", "because"), rows))
    return "\n\n".join(parts) + "\n"
