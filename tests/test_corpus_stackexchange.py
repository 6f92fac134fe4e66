"""Recipe `stackexchange`: threads joined from rows in any order, HTML gone, code kept."""

import base64
import gzip
import html
import os
import random
import time
from pathlib import Path

import pytest

from llama.cli import UserError
from llama.corpus import engine
from llama.corpus.document import Document
from llama.corpus.sources import stackexchange
from llama.corpus.sources.stackexchange import Rows, strip_tags
from llama.files import read_documents


def row(id: int, kind: int = 1, **more: object) -> str:
    values = {"Id": id, "PostTypeId": kind, "Body": f"<p>post {id}</p>\n"} | more
    return "  <row {} />".format(
        " ".join(f'{key}="{html.escape(str(value))}"' for key, value in values.items())
    ).replace("\n", "&#xA;")


def run(tmp_path: Path, rows: list[str], **options) -> tuple[dict[str, dict], dict]:
    site = tmp_path / "raw" / "beer.stackexchange.com"
    site.mkdir(parents=True)
    text = '\ufeff<?xml version="1.0" encoding="utf-8"?>\n<posts>\n{}\n</posts>'
    (site / "Posts.xml").write_text(text.format("\n".join(rows)), encoding="utf-8")
    return made(tmp_path, tmp_path / "raw", **options)


def made(tmp_path: Path, raw: Path, **options) -> tuple[dict[str, dict], dict]:
    chosen = stackexchange.Options(source="stackexchange", **options)
    plan = stackexchange.plan(chosen, [raw])
    summary = engine.run(plan, stackexchange.steps(chosen), tmp_path / "out", 1, 1.0)
    shards = sorted((tmp_path / "out").glob("0*.zst"))
    return {d["id"]: d for path in shards for d in read_documents(path)}, dict(summary.total)


def test_answers_follow_their_question_by_score_as_a_number(tmp_path: Path) -> None:
    rows = [
        row(4, 2, ParentId=1, Score=9),
        row(7, 2, ParentId=1, Score=120),
        row(1, Title="Which beer &amp; why?", Score=3, Tags="<ale><lager>", ContentLicense="CC"),
        row(5, 2, ParentId=1, Score=85),
        row(6, 2, ParentId=1, Score=-2),
        row(3, 2, ParentId=1, Score=9),
        row(8, 2, ParentId=1),
        row(2),
    ]
    documents, total = run(tmp_path, rows)
    assert list(documents) == ["beer.stackexchange.com:1", "beer.stackexchange.com:2"]
    first, second = documents.values()
    answers = "\n\n".join(f"A: post {id}" for id in (7, 5, 3, 4, 8, 6))
    assert first["text"] == f"Q: Which beer & why?\n\npost 1\n\n{answers}"
    assert second["text"] == "Q: post 2"
    assert first["meta"] == {
        "url": "https://beer.stackexchange.com/questions/1",
        "score": 3,
        "answers": 6,
        "tags": ["ale", "lager"],
        "date": "",
        "license": "CC",
    }
    assert not {"dropped", "quarantined"} & {name for name, value in total.items() if value}


def test_each_drop_reason(tmp_path: Path) -> None:
    rows = [
        row(1),
        row(2, 2, ParentId=99),
        row(3, 4),
        row(4, Body=" <img src='x'> "),
        '  <row Id="10" PostTypeId="1" Title="without a body" />',
        row(1, Body="again"),
        "  <row Id='5' PostTypeId='1' Body='single quotes &gt; and\n a line end > within' />",
        row(6).replace('Id="6"', 'Id="six"'),
        '  <row Id="7" PostTypeId="1" Body="cut o',
        row(8, Body="x" * 3000),
        row(9),
    ]
    documents, total = run(tmp_path, rows, max_post_bytes=2000)
    name = "beer.stackexchange.com:"
    assert [id.removeprefix(name) for id in documents] == ["1", "5", "9"]
    assert documents[name + "1"]["text"] == "Q: post 1"
    assert documents[name + "5"]["text"] == "Q: single quotes > and\n a line end > within"
    assert total["dropped"] == {
        "answer_without_question": 1,
        "post_type": 1,
        "no_body": 2,
        "duplicate": 1,
    }
    assert total["quarantined"] == {"xml": 2, "too_large": 1}


@pytest.mark.parametrize("seed", range(3))
def test_rows_do_not_depend_on_how_the_bytes_arrive(seed: int, rng: random.Random) -> None:
    rows = [row(i, Body="é<b>ü</b>" * rng.randrange(9)) for i in range(40)]
    data = ("<rows>\n" + rng.choice(["\n", "", "\r\n"]).join(rows) + "</rows>").encode()
    whole = Rows("x", 10**6)
    expected = [*whole.feed(data), *whole.end()]
    assert [int(found["Id"]) for found in expected] == list(range(40))
    parts, at = Rows("x", 10**6), 0
    found = []
    while at < len(data):
        size = rng.choice([1, 7, 100, 1000])
        found += parts.feed(data[at : at + size])
        at += size
    assert found + [*parts.end()] == expected


def test_a_site_is_the_same_from_one_spool_file_or_many(tmp_path: Path, monkeypatch) -> None:
    rows = [row(i) for i in range(1, 60)] + [
        row(100 + i, 2, ParentId=i % 60, Score=i % 7) for i in range(300)
    ]
    one, _ = run(tmp_path / "one", rows)
    monkeypatch.setattr(stackexchange, "SPOOL_BYTES", 1000)
    many, _ = run(tmp_path / "many", rows)
    assert one == many and len(one) == 59


@pytest.mark.parametrize(
    "markup, text",
    [
        ("<p>a</p>\n\n<p>b</p>", "a\n\nb"),
        ("<p>a<br>b<br/>c</p>", "a\nb\nc\n"),
        (
            "<pre><code>if a &lt; b:\n    x  = '&amp;amp;'\n</code></pre>",
            "if a < b:\n    x  = '&amp;'\n",
        ),
        ("<ul>\n<li>one</li>\n<li><p>two</p></li>\n</ul>", "\n* one\n\n* two\n"),
        ("a <i>b</i><b>c</b> <a href='x'>d</a>", "a bc d"),
        ("1 < 2 && 3 > 2 <3 a<b", "1 < 2 && 3 > 2 <3 a<b"),
        ("a<!-- no <b>text</b> --> b", "a b"),
        ("a <unclosed", "a <unclosed"),
        ("", ""),
        ("<h1>Title</h1>text", "Title\ntext"),
        ("<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>", "a\tb\n1\t2"),
        ('<img alt="a > b" src="c>d">e<a title="f">g</a>', "eg"),
    ],
)
def test_tags_go_and_white_space_stays(markup: str, text: str) -> None:
    stripped = strip_tags(markup)
    assert [line for line in stripped.split("\n") if line] == [
        line for line in text.split("\n") if line
    ]
    assert "pre" not in markup or stripped.strip("\n") == text.strip("\n")


def test_stripped_text_is_what_was_between_tags(rng: random.Random) -> None:
    for _ in range(300):
        words = ["".join(rng.choices("ab <&>é", k=rng.randrange(8))) for _ in range(10)]
        markup = "".join(
            html.escape(word, quote=False)
            + rng.choice(["<b>", "</i>", "<!-- a > b -->", '<a href="x">'])
            for word in words
        )
        assert strip_tags(markup) == "".join(words)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["<", "<b", "<!--", "<!-- --", "<li>", "&lt;", "<a ", "</"])
def test_hostile_markup_takes_linear_time(unit: str) -> None:
    def seconds(n: int) -> float:
        start = time.process_time()
        strip_tags(unit * n)
        return time.process_time() - start

    small = min(seconds(50_000) for _ in range(3))
    assert min(seconds(200_000) for _ in range(3)) < 8 * small + 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit", [b"<row ", b'<row a="', b"<row a=' ", b'<row "" ', b"<row 'a\"' <", b"a"]
)
def test_hostile_rows_take_linear_time(unit: bytes) -> None:
    def seconds(n: int) -> float:
        start = time.process_time()
        rows = Rows("x", 10**8)
        [*rows.feed(b"<row " + unit * n + b"/>"), *rows.end()]
        return time.process_time() - start

    small = min(seconds(20_000) for _ in range(3))
    assert min(seconds(80_000) for _ in range(3)) < 8 * small + 0.05


def test_a_row_of_millions_of_bytes_in_small_chunks_takes_linear_time(
    tmp_path: Path, rng: random.Random
) -> None:
    def seconds(n: int) -> float:
        folder = tmp_path / str(n) / "a.stackexchange.com"
        folder.mkdir(parents=True, exist_ok=True)
        body = base64.b64encode(rng.randbytes(n))
        row = b'<row Id="1" PostTypeId="1" Body="' + body + b'" />'
        (folder / "Posts.xml.gz").write_bytes(gzip.compress(row, 1))
        plan = stackexchange.plan(stackexchange.Options(), [folder.parent])
        start = time.process_time()
        [found] = plan.read(plan.units[0].pieces[0])
        assert isinstance(found, Document) and body.decode() in found.text
        return time.process_time() - start

    small = min(seconds(1_000_000) for _ in range(3))
    assert min(seconds(4_000_000) for _ in range(3)) < 8 * small


@pytest.mark.parametrize(
    "row",
    [
        f'Id="{"9" * 20}" PostTypeId="1" Body="x"',
        f'Id="1" PostTypeId="1" Score="-{"9" * 20}" Body="x"',
        f'Id="{"9" * 5_000}" PostTypeId="1" Body="x"',
        f'Id="1" PostTypeId="1" Body="x &#{"9" * 5_000};"',
        f'Id="1" PostTypeId="1" Body="x &amp;#{"9" * 5_000};"',
        f'Id="1" PostTypeId="1" Title="&amp;#{"9" * 5_000};" Body="x"',
    ],
)
def test_a_number_without_end_costs_no_other_post(tmp_path: Path, row: str) -> None:
    folder = tmp_path / "a.stackexchange.com"
    folder.mkdir()
    other = '<row Id="7" PostTypeId="1" Body="other words" />'
    (folder / "Posts.xml").write_text(f"<posts><row {row} />{other}</posts>")
    plan = stackexchange.plan(stackexchange.Options(), [tmp_path])
    first, second = plan.read(plan.units[0].pieces[0])
    assert isinstance(second, Document) and "other words" in second.text
    assert isinstance(first, Document) or first.reason == "xml" and len(first.id) < 100


def test_the_largest_sites_are_taken(tmp_path: Path) -> None:
    for name, n in (("a.com", 3), ("b.com", 1), ("c.com", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "Posts.xml").write_text("\n".join(row(i) for i in range(n)))
    plan = stackexchange.plan(stackexchange.Options(sites=2), [tmp_path])
    assert [unit.pieces[0].name for unit in plan.units] == ["a.com/Posts.xml", "c.com/Posts.xml"]
    assert [(left.name, left.reason) for left in plan.left_out] == [
        ("b.com/Posts.xml", "smaller site")
    ]
    assert len(stackexchange.plan(stackexchange.Options(sites=0), [tmp_path]).units) == 3
    with pytest.raises(UserError, match="sites is -1"):
        stackexchange.plan(stackexchange.Options(sites=-1), [tmp_path])


def test_a_cut_off_gzip_keeps_what_came_before(tmp_path: Path) -> None:
    site = tmp_path / "raw" / "stackoverflow.com-Posts"
    site.mkdir(parents=True)
    rows = [row(i, Body=random.randbytes(3000).hex()) for i in range(1, 99)]
    data = gzip.compress("\n".join(rows).encode())
    (site / "Posts.xml.gz").write_bytes(data[: len(data) // 2])
    documents, total = made(tmp_path, tmp_path / "raw")
    assert 9 < len(documents) < 98 and "stackoverflow.com:1" in documents
    assert total["quarantined"]["damaged"] == 1


def test_archives(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("beer.stackexchange.com.7z", "stackoverflow.com-Posts.7z"):
        with py7zr.SevenZipFile(raw / name, "w") as archive:
            archive.writestr(row(1) + row(2, 2, ParentId=1), "Posts.xml")
            archive.writestr(row(77), "Comments.xml")
    with py7zr.SevenZipFile(raw / "stackoverflow.com-Votes.7z", "w") as archive:
        archive.writestr(row(1), "Votes.xml")
    whole = (raw / "beer.stackexchange.com.7z").read_bytes()
    (raw / "torn.com.7z").write_bytes(whole[: len(whole) // 2])
    with py7zr.SevenZipFile(raw / "other.com.7z", "w") as archive:
        archive.writestr("x", "Users.xml")
    documents, total = made(tmp_path, raw)
    assert {id: d["text"] for id, d in documents.items()} == {
        "beer.stackexchange.com:1": "Q: post 1\n\nA: post 2",
        "stackoverflow.com:1": "Q: post 1\n\nA: post 2",
    }
    assert total["quarantined"] == {"damaged": 2}


@pytest.mark.skipif("LLAMA_REAL_DATA" not in os.environ, reason="LLAMA_REAL_DATA is not set")
def test_real_sites(tmp_path: Path) -> None:
    raw = Path(os.environ["LLAMA_REAL_DATA"]) / "raw" / "stackexchange"
    coffee = raw / "coffee.stackexchange.com"
    documents, total = made(tmp_path, coffee)
    # 225 questions and 327 answers: counted by its distributor
    assert len(documents) + total["dropped"].get("no_body", 0) == 225
    answers = sum(d["meta"]["answers"] for d in documents.values())
    assert answers + total["dropped"].get("answer_without_question", 0) == 327
    assert not any("<p>" in d["text"] or "&lt;" in d["text"] for d in documents.values())
