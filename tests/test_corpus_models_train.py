"""train_models: planted articles and crawls; what is too little; traps of other classifiers."""

import random
import re
from pathlib import Path

import numpy as np
import orjson
import pytest
from test_corpus_models_linear import words

from llama.cli import UserError
from llama.corpus.executors import Executor
from llama.corpus.models import linear, samples, train
from llama.corpus.steps import perplexity, references
from llama.files import LineWriter, read_json

LANGUAGES = {"en": "abcdefghij", "fr": "fghijklmno", "ru": "абвгдежзик"}


def documents(path: Path, many: list[dict]) -> Path:
    with LineWriter(path / "00000.jsonl.zst") as out:
        for each in many:
            out.write(orjson.dumps(each))
    return path


def lexicons(rng: random.Random) -> dict[str, list[str]]:
    return {x: words(rng, letters, 300).split() for x, letters in LANGUAGES.items()}


def text(rng: random.Random, lexicon: list[str], n: int) -> str:
    """Words that follow one another more often than by chance, so that there is what to learn."""
    place, out = 0, []
    for _ in range(n):
        place = (
            rng.randrange(len(lexicon)) if rng.random() < 0.4 else (place * 7 + 1) % len(lexicon)
        )
        out.append(lexicon[place] + ("\n" if rng.random() < 0.1 else ""))
    return " ".join(out)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, Path]:
    """(articles, pages): references hold other words than the rest, and are ten times as long."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("planted")
    known = lexicons(rng)
    dull = words(rng, "abcdefghij", 300).split()
    articles, pages = [], []
    for language, lexicon in known.items():
        for i in range(60):
            links = [f"https://www.site{i % 50}.org/page{i}?q=1#top"] if language == "en" else []
            articles.append(
                {
                    "id": f"{language}wiki:{i}",
                    "text": text(rng, lexicon, 200),
                    "meta": {"language": language, "references": links},
                }
            )
    for i in range(60):
        # the same address, as others write it
        url = (
            f"http://SITE{i % 50}.org/page{i}/?q=1"
            if i % 2
            else f"http://site{i % 50}.org/page{i}?q=1"
        )
        page = text(rng, known["en"], 400)
        pages.append({"id": f"r{i}", "text": page, "meta": {"url": url, "language": "en"}})
        url = f"http://spam{i}.com/"
        page = text(rng, dull, rng.randrange(20, 60))
        pages.append({"id": f"o{i}", "text": page, "meta": {"url": url, "language": "en"}})
    pages += [{**page, "id": f"again {page['id']}"} for page in pages[:20]]
    pages.append({"id": "odd", "text": "odd", "meta": {"url": 3, "language": "../../etc"}})
    pages.append({"id": "bare", "text": "bare"})
    rng.shuffle(pages)
    return documents(folder / "wikipedia", articles), documents(folder / "crawl", pages)


@pytest.fixture
def little(monkeypatch) -> None:
    """Small numbers are enough; only what the parent process decides may be patched."""
    monkeypatch.setattr(train, "MIN_BYTES", 40_000)
    monkeypatch.setattr(train, "MIN_PAGES", 50)
    monkeypatch.setattr(train, "MIN_REFERENCES", 50)


def made(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_models_of_planted_text(planted, little, tmp_path, capsys) -> None:
    wikipedia, crawl = planted
    out = tmp_path / "models"
    train.train([wikipedia], [crawl], out, Executor(2))
    told = capsys.readouterr().out
    assert sorted(made(out)) == sorted(
        ["cutoffs.json", "language.npz", "lm/en.model", "lm/en.npy", "models.json"]
        + ["references.npz", "report.txt"]
    )
    assert told == (out / "report.txt").read_text() and max(map(len, told.split("\n"))) <= 80
    models = read_json(out / "models.json")
    assert models["counts"]["references"]["documents"] == 60
    assert models["counts"]["others"]["documents"] == 62
    assert models["not_learnt"] == {
        f"lm-{x}": f"0 pages in {x}, 50 needed" for x in ("fr", "ru")
    } and all(re.search(f"lm-{x}  +there are 0 pages in {x}", told) for x in ("fr", "ru"))
    assert all(x >= 0.9 for x in models["learnt"]["language"]["right"]["300"].values())
    found = models["learnt"]["references"]
    assert found["judged"] > 0 and float(found["told"][1].partition("%")[0]) > 90
    cut = models["learnt"]["lm-en"]["cutoffs"]
    assert read_json(out / "cutoffs.json") == {"en": cut} and 0 < cut["head"] < cut["middle"]
    assert f"of 120 pages: head < {cut['head']:.1f}, middle < {cut['middle']:.1f}" in told
    perplexity.check(str(out), ["head"], ["en"])
    # another place, other numbers of workers: the same bytes; and once made it stays
    train.train([wikipedia], [crawl], tmp_path / "again", Executor(1))
    assert made(tmp_path / "again") == made(out)
    capsys.readouterr()
    train.train([wikipedia], [crawl], out, Executor(1))
    assert capsys.readouterr().out == told
    documents(tmp_path / "more", [{"id": "1", "text": "x"}])
    with pytest.raises(UserError, match="holds models learnt from other documents"):
        train.train([wikipedia], [crawl, tmp_path / "more"], out, Executor(1))


def test_both_classes_are_learnt_with_the_same_lengths(tmp_path, monkeypatch, rng) -> None:
    """References are ten times as long; what is cut off must not tell them."""
    for kind, n in ((references.LABEL, 4000), ("others", 400)):
        with LineWriter(tmp_path / train.SAMPLES / f"{kind}.zst") as out:
            pages = [f"{kind[:3]}{i}" + "x" * rng.randrange(n) for i in range(199)]
            # the last is a copy of the first, at another address
            for i, page in enumerate([*pages, pages[0]]):
                out.write(orjson.dumps([i, page, i % 10 == 0]))
    seen = []
    fit = linear.fit
    monkeypatch.setattr(linear, "fit", lambda *given: seen.extend(given) or fit(*given))
    _, figures = train._references(tmp_path)
    texts, labels, kind = seen
    lengths = {
        label: sorted(len(t) for t, x in zip(texts, labels, strict=True) if x == label)
        for label in set(labels)
    }
    assert lengths[references.LABEL] == lengths["others"] and len(set(lengths["others"])) > 50
    assert kind == "words" and len(set(texts)) == len(texts)
    assert figures["learnt"] == len(texts) and figures["judged"] in (38, 40)


def test_negatives_are_random_and_not_the_first(tmp_path) -> None:
    links = [f"http://ref{i}.org/" for i in range(100)]
    wiki = documents(
        tmp_path / "w", [{"id": "a", "text": "x", "meta": {"references": links, "language": "en"}}]
    )
    pages = [{"id": str(i), "text": "t", "meta": {"url": url}} for i, url in enumerate(links)]
    pages += [
        {"id": str(i), "text": str(i), "meta": {"url": f"http://o{i}.org"}} for i in range(2000)
    ]
    crawl = documents(tmp_path / "c", pages)
    counts = samples.write([wiki / "00000.jsonl.zst"], [crawl / "00000.jsonl.zst"], tmp_path)
    assert (counts["references"]["documents"], counts["others"]["documents"]) == (100, 2000)
    chosen = [int(each.text) for each in samples.read(tmp_path, "others")]
    assert len(chosen) == 100 and 600 < np.mean(chosen) < 1400 and chosen == sorted(chosen)
    held_out = sum(each.is_held_out for each in samples.read(tmp_path, "others"))
    assert 0 < held_out < 30


def test_addresses_that_mean_one_page() -> None:
    same = (
        "http://www.Example.org/a/",
        "https://example.org/a#part",
        "//example.org/a",
        "https://web.archive.org/web/20100101000000*/http://www.example.org/a",
        " example.org/a ",
    )
    assert {samples.address(url) for url in same} == {"example.org/a"}
    other = (
        "http://example.org/A",
        "http://example.org/a?b",
        "http://a.example.org/a",
        "",
        "#",
        "/",
    )
    assert len({samples.address(url) for url in other}) == 4


def test_what_is_too_little_is_named_with_its_count(planted, tmp_path, monkeypatch) -> None:
    wikipedia, crawl = planted
    monkeypatch.setattr(
        train, "_learn", lambda *given: pytest.fail("trained before it was checked")
    )

    def told(*languages: str) -> str:
        with pytest.raises(UserError) as error:
            line = ["--wikipedia", str(wikipedia), "--crawl", str(crawl)]
            line += ["--output", str(tmp_path / "m"), "--workers", "1"]
            train.main([*line, *(["--languages", *languages] if languages else [])])
        assert not list(tmp_path.glob("*m*"))
        return str(error.value)

    assert "60 pages that Wikipedia refers to, 1,000 needed" in told()
    assert re.search(r"[\d,]+ bytes in en, 1,000,000 needed; 60 pages", told("en"))
    assert "0 bytes in xx, 1,000,000 needed" in told("xx")
    with pytest.raises(UserError, match="nowhere is no folder of documents"):
        train.train([tmp_path / "nowhere"], [crawl], tmp_path / "m", Executor(1))
    (tmp_path / "own").mkdir()
    with pytest.raises(UserError, match="own/models.json cannot be read"):
        train.train([wikipedia], [crawl], tmp_path / "own", Executor(1))


def test_left_out_is_said_loudly(planted, tmp_path, capsys) -> None:
    wikipedia, crawl = planted
    models = train.train([wikipedia], [crawl], tmp_path / "m", Executor(1), needs_all=False)
    assert not models["learnt"] and set(models["not_learnt"]) == {
        "language",
        "lm-en",
        "lm-fr",
        "lm-ru",
        "references",
    }
    told = capsys.readouterr().out
    assert "NOT LEARNT" in told and "0 languages of 1,000,000 bytes, 2 needed" in told
    assert max(map(len, told.split("\n"))) <= 80
