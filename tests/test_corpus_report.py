"""The page about clean documents, its bill of materials, and what became of one document."""

import gzip
import hashlib
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import orjson
import pytest
from made_data import make_tokenizer

from llama.cli import UserError
from llama.corpus import explain, graph, lineage, recipes, report
from llama.files import read_documents, read_json
from tokenizer.tokenizer import Tokenizer

COPIES = 30
needs_matplotlib = pytest.mark.skipif(not find_spec("matplotlib"), reason="no matplotlib")


def text(rng, words=40) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=5)) for _ in range(words))


@pytest.fixture
def raw(tmp_path, rng):
    """Books with one empty, one broken line and one with old line ends; c4 with copies of books."""
    rows = []
    for i in range(200):
        language, end = rng.choice(["en", "fr"]), ["head", "middle", "tail"][i % 3]
        known = {"language": language, "perplexity": 10.0 + i, "bucket": end}
        rows.append({"text": text(rng), "licence": rng.choice(["MIT", ""]), **known})
    rows[0]["text"] = "<script>" + "\r\n".join(text(rng, 9) for _ in range(5))
    rows[1]["text"] = ""
    lines = [orjson.dumps(row) for row in rows]
    lines[2] = b"{broken"
    web = [{"text": row["text"]} for row in rows[50 : 50 + COPIES]]
    web += [{"text": text(rng)} for _ in range(70)]
    for name, made in (("books", lines), ("c4", [orjson.dumps(row) for row in web])):
        (tmp_path / "raw" / name).mkdir(parents=True)
        (tmp_path / f"raw/{name}/a.jsonl").write_bytes(b"\n".join(made))
        (tmp_path / f"{name}.yaml").write_text("recipe: plain\nunit_bytes: 20k\n")
    (tmp_path / "all.yaml").write_text("across:\n  - step: exact\n")
    (tmp_path / "raw/books/b.pdf").write_text("left out")
    return rows


@pytest.fixture
def clean(tmp_path, raw):
    line = ["--config", str(tmp_path / "all.yaml"), "--input", str(tmp_path / "raw")]
    graph.main([*line, "--workers", "1", "--output", str(tmp_path / "clean")])
    return tmp_path / "clean"


def page(clean: Path, *more: str) -> tuple[str, dict]:
    report.main([str(clean), "-o", str(clean.parent / "page.html"), *more])
    return (clean.parent / "page.html").read_text(), read_json(clean / report.BILL)


def cells(html: str, first: str) -> list[str]:
    """The cells of the rows that begin with `first`."""
    rows = re.findall(rf"<tr><td>{re.escape(first)}</td>(.*?)</tr>", html, re.S)
    return [re.sub(r"<[^>]*>", "", cell) for row in rows for cell in row.split("</td>")[:-1]]


@needs_matplotlib
def test_counts_of_the_page_are_those_of_the_documents(clean, raw):
    html, bill = page(clean)
    books, web = bill["sources"]["books"], bill["sources"]["c4"]
    assert books["documents"] == {"in": 200, "out": 198} and web["documents"]["out"] == 70
    assert cells(html, "exact: 1 exact")[::3] == ["198", "70"]
    assert cells(html, "plain: reading")[::3] == ["200", "100"]
    assert cells(html, "exact: 1 exact")[2::3] == ["", f"exact_duplicate {COPIES}"]
    assert cells(html, "plain: reading")[2::3] == ["json 1", ""]
    assert cells(html, "plain: 2 at_least")[2::3] == ["empty 1", ""]
    left = [row for i, row in enumerate(raw) if i not in (1, 2)]
    assert books["languages"] == Counter(row["language"] for row in left)
    assert books["licences"] == Counter(row["licence"] or "not said" for row in left)
    n_bytes = sum(len(row["text"].replace("\r\n", "\n").encode()) for row in left)
    assert books["read"]["bytes"] == n_bytes and books["tokens"] == round(n_bytes / 4)
    assert "an estimate, 4 bytes each" in html and "Files left out: suffix 1" in html
    assert books["quarantined"] == {"json": 1} and "not a JSON object" in html
    assert "<script>" not in html and "<img" in html and "Perplexity" in html
    assert (clean.parent / "page-shares.png").read_bytes()[:4] == b"\x89PNG"


@needs_matplotlib
def test_inputs_are_hashed_as_they_were_read(clean):
    _, bill = page(clean)
    file = clean.parent / "raw/books/a.jsonl"
    known = bill["sources"]["books"]["inputs"]
    assert known.keys() == {"a.jsonl"} and known["a.jsonl"]["bytes"] == file.stat().st_size
    assert known["a.jsonl"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


@needs_matplotlib
def test_clusters_of_duplicates_are_counted(clean, raw):
    html, bill = page(clean)
    assert bill["sources"]["c4"]["clusters"] == {
        "exact_duplicate": {"clusters": COPIES, "largest": 2}
    }
    assert cells(html, "c4").count("exact_duplicate") == 1


@needs_matplotlib
def test_cut_offs_are_where_the_buckets_end(clean, raw, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **style: drawn.append(x))
    page(clean)
    left = [row for i, row in enumerate(raw) if i not in (1, 2)]
    ends = {
        max(r["perplexity"] for r in left if (r["language"], r["bucket"]) == (language, bucket))
        for language in ("en", "fr")
        for bucket in ("head", "middle")
    }
    assert set(drawn) == ends and len(drawn) == 4


@needs_matplotlib
def test_tokens_are_counted_with_a_tokenizer(clean, tmp_path):
    folder = make_tokenizer(tmp_path / "tokenizer")
    html, bill = page(clean, "--tokenizer", str(folder))
    paths = [path for path in lineage.sources(clean)["c4"][-1].shards]
    texts = [found["text"] for path in paths for found in read_documents(path)]
    encode = Tokenizer(folder / "tokenizer.model").encode
    assert bill["sources"]["c4"]["tokens"] == sum(len(encode(text)) + 2 for text in texts)
    assert "Tokens are counted" in html
    # of a part as large as the whole is supposed to be
    _, part = page(clean, "--tokenizer", str(folder), "--read", "2k")
    assert part["sources"]["c4"]["read"]["documents"] < len(texts) / 2
    assert part["sources"]["c4"]["tokens"] == pytest.approx(
        bill["sources"]["c4"]["tokens"], rel=0.1
    )


@needs_matplotlib
def test_one_recipe_alone_has_its_stages_and_no_perplexity(tmp_path, rng, capsys):
    whole = text(rng, 6000)
    for name, book in (("a", whole), ("b", whole[: len(whole) // 2]), ("c", text(rng, 6000))):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{name}.txt").write_text(book)
    out = tmp_path / "novels"
    recipes.main(["--recipe", "books", "--input", str(tmp_path / "in"), "--output", str(out)])
    html, bill = page(out)
    assert cells(html, "containment: 1 containment")[::2] == ["2", "contained 1"]
    assert cells(html, "novels")[0] == "3" and "Perplexity" not in html
    capsys.readouterr()
    explain.main([str(out), "b.txt", "--input", str(tmp_path / "in")])
    told = capsys.readouterr().out
    size = f"{len(whole) // 2:,}"
    assert re.search(rf"books: reading +{size} +read\n", told)
    assert re.search(r"containment: 1 containment +dropped: contained\n", told)


def told(capsys, *line: str) -> str:
    capsys.readouterr()
    explain.main(line)
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    return out


def test_a_document_is_followed_from_step_to_step(clean, raw, capsys):
    before = len(raw[0]["text"])
    after = len(raw[0]["text"].replace("\r\n", "\n"))
    again = told(capsys, str(clean), "a.jsonl:1", "--input", str(clean.parent / "raw"))
    assert f"a.jsonl:1 of books: {after} bytes, kept" in again and "<script>" in again
    assert re.search(rf"plain: reading +{before} +read", again)
    assert re.search(rf"plain: 1 unix_line_ends +{after} +changed, -4 bytes", again)
    assert re.search(rf"exact: 1 exact +{after} +unchanged", again)
    # the same id in another source is another document
    assert "a.jsonl:1 of c4:" in again
    plain = told(capsys, str(clean), "a.jsonl:1")
    assert re.search(r"plain: 1 unix_line_ends +passed on", plain)


@pytest.mark.parametrize(
    "id, source, verdict",
    [
        ("a.jsonl:2", "books", "0 bytes, dropped: empty"),
        ("a.jsonl:3", "books", "7 bytes, quarantined: json, not a JSON object on one line"),
        (f"a.jsonl:{COPIES}", "c4", "239 bytes, dropped: exact_duplicate ("),
    ],
)
def test_the_end_of_a_document_is_told_with_its_step(clean, capsys, id, source, verdict):
    [found] = [
        part for part in told(capsys, str(clean), id).split("\n\n") if f"of {source}:" in part
    ]
    assert f"{id} of {source}: {verdict}" in " ".join(found.split())


def test_what_a_reader_could_not_read_is_told_beside_the_input(tmp_path, rng, capsys):
    given, out = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    for name in ("a.txt", "c.txt"):
        (given / name).write_text(text(rng))
    (given / "b.txt.gz").write_bytes(gzip.compress(text(rng, 4000).encode())[:-99])
    line = ["--recipe", "plain", "--input", str(given), "--output", str(out), "--workers", "1"]
    recipes.main([*line, "--max_quarantined", "1"])
    for more in ((), ("--input", str(given))):
        found = " ".join(told(capsys, str(out), "b.txt.gz", *more).split())
        assert "b.txt.gz of out: 0 bytes, quarantined: damaged, not read to its end" in found
        assert "bytes, kept" in told(capsys, str(out), "c.txt", *more)


def test_an_unknown_id_is_a_sentence_with_the_nearest(clean, tmp_path):
    with pytest.raises(UserError, match=r"no document a.jsonl:1999; near it are a.jsonl:199"):
        explain.main([str(clean), "a.jsonl:1999"])
    with pytest.raises(UserError, match="does not hold the files"):
        explain.main([str(clean), "a.jsonl:1", "--input", str(tmp_path / "clean/books")])
    for command in (explain, report):
        with pytest.raises(UserError, match="holds no finished run"):
            command.main([str(tmp_path / "raw"), *(["x"] if command is explain else [])])


@needs_matplotlib
def test_what_is_not_finished_is_named_and_not_counted(clean):
    (clean / "c4/stats.json").unlink()
    html, bill = page(clean)
    assert "Not finished, and not counted here: c4." in html
    assert [line["step"] for line in bill["sources"]["c4"]["steps"]][-1] == "plain: 2 at_least"


def test_a_page_is_html_and_a_tokenizer_is_there(clean):
    with pytest.raises(UserError, match=r"--output is page.pdf"):
        report.main([str(clean), "-o", "page.pdf"])
    with pytest.raises(UserError, match="--tokenizer: tokenizer nowhere cannot be read"):
        report.main([str(clean), "--tokenizer", "nowhere"])
