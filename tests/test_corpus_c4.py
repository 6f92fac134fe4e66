"""Recipe `c4`: each rule by its name, on lines and pages that only just pass or fail it."""

import gzip
import os
from pathlib import Path

import orjson
import pytest

from llama.cli import UserError
from llama.corpus import engine
from llama.corpus.executors import Executor
from llama.corpus.shuffle import pipeline
from llama.corpus.sources import c4
from llama.corpus.steps.c4_rules import PRESETS, bad_word_pattern, clean
from llama.files import read_documents

PAGE = [
    "The river rises in the hills above the town.",
    "It has never been known to fall below its banks!",
    'Who would have thought so, asked the miller of "Dee"?',
]


def cleaned(lines: list[str], preset: str = "reference", bad=None):
    return clean("\n".join(lines), PRESETS[preset], bad)


def test_a_page_of_sentences_stays_as_it_is() -> None:
    assert cleaned(PAGE) == ("\n".join(PAGE), "", {})


@pytest.mark.parametrize(
    "line, reason",
    [
        ("Read more about this long story here", "no_end_mark"),
        ("And so it went on and on and on...", "no_end_mark"),
        ("It says here: ‘never again, not even once’", "no_end_mark"),
        ("Only four words here.", "few_words"),
        (f"This one has a word of {'x' * 1001} and an end.", "long_word"),
        ("Please enable JavaScript in your browser to read.", "javascript"),
        ("By going on you accept our Privacy Policy in full.", "policy"),
        ("This site uses cookies to make it all better.", "policy"),
    ],
)
def test_lines_that_go(line: str, reason: str) -> None:
    text, why, removed = cleaned([PAGE[0], line, *PAGE[1:]])
    assert (text, why, dict(removed)) == ("\n".join(PAGE), "", {reason: 1})


@pytest.mark.parametrize(
    "line",
    [
        f"This one has a word of {'x' * 1000} and an end.",
        'He said that it was "over and done with"',
        "Exactly five words are here.",
    ],
)
def test_lines_that_only_just_stay(line: str) -> None:
    assert cleaned([*PAGE, line])[0].endswith(line)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("Then it says lorem ipsum dolor sit amet.", "lorem_ipsum"),
        ("They write a set as { 1, 2, 3 } in books.", "curly_bracket"),
    ],
)
def test_pages_that_go(line: str, reason: str) -> None:
    assert cleaned([*PAGE, line])[:2] == ("", reason)
    # a line that goes before cannot take the page with it
    assert cleaned([*PAGE, line.removesuffix(".")])[1] == ""


def test_citations_are_cut_out() -> None:
    text, _, _ = cleaned(
        [*PAGE, "It was built in 1066.[12] [edit] Nobody knows why.[citation needed]"]
    )
    assert text.split("\n")[-1] == "It was built in 1066.  Nobody knows why."


@pytest.mark.parametrize(
    "lines, sentences",
    [
        (["Mr. Brown and Dr. Green met J. Smith in St. Ives."], 1),
        (["It rained all day long. It rained all night. Then it stopped."], 3),
        (["He paid 3.50 for it, e.g. Not so much."], 1),
        (["Es regnete den ganzen Tag. Über Nacht hörte es auf."], 2),
    ],
)
def test_sentences_are_counted(lines: list[str], sentences: int) -> None:
    for least, kept in ((sentences, True), (sentences + 1, False)):
        reason = clean("\n".join(lines), (5, least), None)[1]
        assert reason == ("" if kept else "too_few_sentences")


def test_the_article_asks_for_other_numbers() -> None:
    short = ["Three words here."] * 5
    assert cleaned(short, "article") == ("\n".join(short), "", {})
    assert cleaned(short[:4], "article")[1] == "too_few_sentences"
    assert cleaned(short)[1:] == ("too_few_sentences", {"few_words": 5})


@pytest.mark.parametrize("end", ["\r\n", "\x85", "\u2028", "\n"])
def test_every_kind_of_line_end_ends_a_line(end: str) -> None:
    assert clean(end.join(PAGE), PRESETS["reference"], None)[0] == "\n".join(PAGE)


def test_bad_words_stand_alone_or_in_a_script_without_spaces(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("darn\nvery bad\n変な\n\n")
    bad = bad_word_pattern(str(words))
    assert cleaned([*PAGE, "Oh darn, it is broken now."], bad=bad)[1] == "bad_words"
    assert cleaned([*PAGE, "Something very bad has come to pass."], bad=bad)[1] == "bad_words"
    assert cleaned([*PAGE, "These are words of 大変な日 in a line."], bad=bad)[1] == "bad_words"
    assert cleaned([*PAGE, "They darned their socks every night."], bad=bad)[1] == ""
    for path, what in (
        (tmp_path / "none.txt", "cannot be read"),
        (tmp_path / "empty.txt", "no word"),
    ):
        (tmp_path / "empty.txt").write_text("\n")
        with pytest.raises(UserError, match=what):
            bad_word_pattern(str(path))


def run(tmp_path: Path, inputs: list[Path], **options) -> tuple[list[dict], engine.Summary]:
    chosen = c4.Options(source="c4", **options)
    output = tmp_path / "out"
    summary = pipeline(c4.plan(chosen, inputs), c4.steps(chosen), output, Executor(1), 0.5)
    return [d for path in sorted(output.glob("0*.zst")) for d in read_documents(path)], summary


def test_lines_in_documents_out(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = [
        orjson.dumps({"text": "\r\n".join(PAGE), "url": "http://a", "timestamp": "t", "more": 1}),
        orjson.dumps({"text": "Click here"}),
        b'{"text": "a torn li',
    ]
    with gzip.open(raw / "c4-train.00000.json.gz", "wb") as file:
        file.write(b"\n".join(lines))
    (raw / "notes.txt").write_text("no data")
    documents, summary = run(tmp_path, [raw], rules="reference")
    assert [(d["id"], d["text"], d["meta"]) for d in documents] == [
        ("c4-train.00000.json.gz:1", "\n".join(PAGE), {"url": "http://a", "timestamp": "t"})
    ]
    assert summary.total["dropped"] == {"too_few_sentences": 1}
    assert summary.total["noted"] == {"line no_end_mark": 1}
    assert summary.total["quarantined"] == {"json": 1}
    assert [left.name for left in summary.left_out] == ["notes.txt"]


def test_one_page_of_each_address_and_none_that_is_too_long(tmp_path: Path) -> None:
    page = "\n".join(PAGE)
    addresses = ["http://www.a.b/c/", "https://a.b/c?utm_source=x", "https://a.b/C", None, "", None]
    pages = [{"text": page, "url": url} for url in addresses]
    # as the recipe commoncrawl writes them
    pages.append({"id": "x", "text": page, "source": "y", "meta": {"url": "https://a.b/c"}})
    pages.append({"text": PAGE[0] * (c4.MAX_PAGE_CHARS // len(PAGE[0]) + 1), "url": "http://long"})
    raw = tmp_path / "raw.jsonl"
    raw.write_bytes(b"\n".join(map(orjson.dumps, pages)))
    documents, summary = run(tmp_path, [raw], rules="reference")
    assert [d["meta"].get("url") for d in documents] == [addresses[0], *addresses[2:]]
    assert summary.total["documents"] == {"in": 8, "out": 5}
    assert summary.total["dropped"] == {"url_duplicate": 2, "too_long": 1}
    everything, summary = run(tmp_path / "none", [raw])
    assert len(everything) == 8 and everything[6]["meta"] == {"url": "https://a.b/c", "id": "x"}


def test_bad_words_without_rules_are_refused() -> None:
    with pytest.raises(UserError, match="bad_words is 'list.txt', but rules is none"):
        c4.plan(c4.Options(bad_words="list.txt"), [Path()])


@pytest.mark.skipif("LLAMA_REAL_DATA" not in os.environ, reason="LLAMA_REAL_DATA is not set")
def test_real_c4_has_been_through_these_rules(tmp_path: Path) -> None:
    raw = Path(os.environ["LLAMA_REAL_DATA"]) / "raw" / "c4" / "c4-train.demo-00000.json.gz"
    plain, _ = run(tmp_path / "none", [raw])
    ruled, _ = run(tmp_path / "rules", [raw], rules="reference")
    assert len(plain) == 210
    # documents that C4 has kept are kept, as they are
    same = {d["text"].strip() for d in plain} & {d["text"] for d in ruled}
    assert len(ruled) >= 0.99 * len(plain) and len(same) >= 0.99 * len(plain)
