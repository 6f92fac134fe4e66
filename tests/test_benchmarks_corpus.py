"""The benchmarks of the corpus: what judges and peers are compared on, and what is said without."""

import bz2
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("resiliparse", reason="the extra corpus is not installed")

from benchmarks import corpus_growth, corpus_quality, corpus_speed, dumps, planted
from llama.corpus.document import Document
from llama.corpus.models.samples import address
from llama.files import read_documents

WORDS = [a + b + c for a in "bdfgklm" for b in "aeiou" for c in "nrst"]


def prose(seed: int, n: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + rng.choice(WORDS) for _ in range(n))


def test_a_missing_dump_or_judge_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(dumps.Missing, match="gutenberg.org"):
        dumps.documents(tmp_path, "books")
    with pytest.raises(dumps.Missing, match="dumps.wikimedia.org"):
        list(dumps.articles(tmp_path))
    with pytest.raises(dumps.Missing, match="pip install no_such_judge"):
        dumps.need("no_such_judge.part")
    with pytest.raises(dumps.Missing, match="apt-get download"):
        dumps.samples(tmp_path, 300)


def test_nothing_is_left_out_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus_quality.main(["--data", str(tmp_path)])
    said = capsys.readouterr().out
    assert all(f"\n{name} " in said for name in corpus_quality.CHECKS), said
    assert said.count("missing") == len(corpus_quality.CHECKS), said


def test_figures_and_goals() -> None:
    row = corpus_quality.Row("what", "judge", 0.99, 0.98)
    assert row.passed == "yes"
    assert corpus_quality.Row("what", "judge", 0.97, 0.98).passed == "no"
    assert corpus_quality.Row("what", "judge", 0.004, 0.005, at_most=True).passed == "yes"
    assert corpus_quality.Row("what", "judge", None, 0.98).passed == "missing"
    assert corpus_quality.f1("a b c", "A, b!") == pytest.approx(0.8)
    assert corpus_quality.f1("", "") == 1 and corpus_quality.f1("a", "b") == 0


def test_articles_are_wikitext_without_redirects(tmp_path: Path) -> None:
    pages = (
        "<page><ns>0</ns><text bytes=9>&lt;b&gt;x</text></page>"
        "<page><ns>1</ns><text>talk</text></page><page><ns>0</ns><redirect /><text>y</text></page>"
    )
    (tmp_path / "wikipedia").mkdir()
    (tmp_path / "wikipedia" / "dewiki.xml.bz2").write_bytes(bz2.compress(pages.encode()))
    assert list(dumps.articles(tmp_path)) == [("dewiki.xml.bz2", "<b>x")]


def test_paragraphs_that_are_not_translated_count_for_english_alone(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    same, english, german = (prose(seed + i, 60) for i in range(3))
    for language, text in (("C", english), ("de", german)):
        folder = tmp_path / "gnome-user-docs/usr/share/help" / language
        folder.mkdir(parents=True)
        (folder / "a.page").write_text(f"<page><p>{same} <em>x</em></p><p>{text}</p></page>")
    learnt, test = dumps.samples(tmp_path, 300)
    assert learnt == {"de": [german], "en": sorted([f"{same} x", english], key=dumps._sha1)}
    assert test == {}


def test_planted_books_are_found_and_others_stay(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    (tmp_path / "books").mkdir()
    for i in range(9):
        (tmp_path / f"books/{i}.txt").write_text(prose(seed + i, 9000))
    found, kept = corpus_quality.of_books(SimpleNamespace(data=tmp_path))
    assert (found.figure, kept.figure) == (1, 1), (found, kept)
    # a step that drops a book which shares 60 %, or none, would be seen
    books = [Document(str(i), prose(seed, 9000), "books", {}) for i in range(2)]
    assert corpus_quality._contained(books) == [1]
    mixed = corpus_quality._mixed(books[0], books[1]._replace(text=prose(seed + 1, 9000)))
    assert corpus_quality._contained([books[0], mixed]) == []


def test_work_of_child_processes_is_counted() -> None:
    pages = ["<html><body><p>" + "text of a page. " * 2000] * 60

    def guarded(pages: list[str]) -> None:
        records = map(corpus_growth.document, pages)
        list(corpus_speed.html.main_content(records, 5.0, 1 << 30))

    alone = corpus_growth.timed(
        lambda pages: list(map(corpus_speed.html.page_text, pages)), [pages]
    )
    assert corpus_growth.timed(guarded, [pages]) > 0.5 * alone > 0


def test_every_step_of_the_table_has_hostile_input_or_needs_none() -> None:
    assert set(corpus_speed.STEPS) >= {"lines", "language", "WET, end to end"}
    # each unit is not empty, and a step takes a little of it
    for work, units in corpus_growth.HOSTILE.values():
        for unit in units.split(" "):
            assert unit
            work(unit * 9)


@pytest.mark.slow
def test_a_step_is_measured_with_its_goal_and_memory(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books/a.txt").write_text(prose(1, 20_000))
    found = corpus_speed.measure("MinHash", tmp_path, 1)
    assert found["goal"] == 1800 and found["per_s"] > 0 and found["peak_mb"] > 10
    assert all(rate > 0 for rate in found["peers"].values())


def test_the_page_on_scale_adds_up_and_names_rows_that_exist() -> None:
    page = (Path(__file__).parent.parent / "docs/corpus-at-scale.md").read_text()
    rows = [re.split(r" \| ", line.strip("| ")) for line in page.splitlines() if " /s | " in line]
    assert len(rows) > 10
    for what, row, amount, rate, hours in rows:
        n, per_s, said = (float(x.split()[0].replace(",", "")) for x in (amount, rate, hours))
        assert amount.endswith(corpus_speed.STEPS[row][0]), what
        assert said == pytest.approx(n / per_s / 3600, abs=0.6), what


@pytest.mark.slow
def test_a_planted_crawl_is_learnt_and_chance_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    monkeypatch.setattr(corpus_quality.train_models, "MIN_REFERENCES", 50)
    words = [prose(seed + i, 400).split() for i in range(2)]
    rng = random.Random(seed)
    kinds = [
        [Document(f"{k}{i}", " ".join(rng.choices(words[k], k=6000)), "s", {}) for i in range(16)]
        for k in (0, 1)
    ]
    scores, is_reference = corpus_quality._judged(kinds, tmp_path / "two")
    assert len(scores) > 50 and ((scores >= 0.5) == is_reference).mean() > 0.9
    halves = [kinds[0][::2], kinds[0][1::2]]
    scores, is_reference = corpus_quality._judged(halves, tmp_path / "one")
    assert abs(((scores >= 0.5) == is_reference).mean() - 0.5) < 0.35
    with pytest.raises(dumps.Missing, match="pages that Wikipedia refers to"):
        monkeypatch.undo()
        corpus_quality._judged(kinds, tmp_path / "few")


def test_wikipedia_refers_to_planted_pages_as_people_write(tmp_path: Path) -> None:
    kinds = [[Document(f"{k}{i}", prose(i, 3000), "s", {}) for i in range(9)] for k in "ab"]
    crawl = planted.plant(kinds, tmp_path)
    read = [list(read_documents(f / "00000.jsonl.zst")) for f in (crawl.wikipedia, crawl.crawl)]
    cited = {address(url) for each in read[0] for url in each["meta"]["references"]}
    pages = {address(each["meta"]["url"]) for each in read[1]}
    assert cited < pages and 0.3 < len(cited) / len(pages) < 0.7
    kept_back = {text for text, _ in crawl.test}
    assert kept_back and not kept_back & {each["text"] for each in read[1]}
    assert planted.plant(kinds, tmp_path / "again").test == crawl.test
