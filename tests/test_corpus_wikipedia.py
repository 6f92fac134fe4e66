"""Recipe `wikipedia`: wikitext by its rules and on hostile input, dumps whole, cut and damaged."""

import base64
import bz2
import gzip
import html
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llama.corpus import explain, lineage
from llama.corpus.engine import Summary
from llama.corpus.executors import Executor
from llama.corpus.shuffle import pipeline
from llama.corpus.sources import wikipedia
from llama.corpus.steps.wikitext import plain_text, references
from llama.files import read_documents


@pytest.mark.parametrize(
    "source, text",
    [
        ("'''Bold''' and ''italic'' and '''''both'''''.", "Bold and italic and both."),
        ("l'''Alba'' e ''''x''''", "l'Alba e 'x'"),
        ("[[Berlin]], [[Berlin|capital]] and [[:Category:X]]s", "Berlin, capital and Category:Xs"),
        ("a[[File:x.jpg|thumb|a [[link]] and [[File:y.png]]]]b [[Category:C]]", "ab"),
        ("a [[Bild:x.jpg|mini]] [[Kategorie:K]] [[de:Berlin]] b", "a b"),
        ("{{Infobox|a={{b|c}}\n|d=e}}text{{cite}}", "text"),
        ("{{{1|}}} x {{a{{{2}}}}} y", "x y"),
        ("a<ref>b</ref>c<ref name=x />d<ref name='y'>e<ref>f</ref>g", "acdeg"),
        ("a<!-- <ref> --> b <!-- never closed", "a b"),
        ("{| class=x\n|-\n| a || {{b}}\n{|\n| nested\n|}\n|}\nafter", "after"),
        ("{{t|\n|}}after", "after"),
        ("a<table><tr><td>x<table>y</table></td></tr></table>b <table>c", "ab c"),
        ("[http://a.b label] [https://c.d] [//e.f g h] http://i.j/", "label g h http://i.j/"),
        ("[not a link] and [http://broken\nlabel]", "[not a link] and [http://broken\nlabel]"),
        ("<math>a_{i}^{[[2]]}</math> <nowiki>[[x]]</nowiki>", "a_{i}^{[[2]]} [[x]]"),
        ("a<gallery>\nFile:x.jpg|y\n</gallery>b<sub>2</sub><br/>c", "ab2\nc"),
        ("== A ==\n\n=== B ===\ntext\n== Empty ==\n{{reflist}}", "A\n\nB\n\ntext"),
        ("* one\n** two\n# three\n:indented\n; term", "* one\n* two\n* three\nindented\nterm"),
        ("-{zh-hans:x;zh-hant:y}- -{A|sr-ec:ц; sr-el:c}- -{plain}- -{H|a:b}-.", "x ц plain ."),
        ("-{sr-ec|текст}- -{zh-hans;zh-hant|X}- -{-|x}- -{D|y}-", "текст X"),
        ("a -{{template}}- b", "a -- b"),
        ("__KEIN_INHALTSVERZEICHNIS__ __БЕЗ_ОГЛ__a __init__ __main__", "a __init__ __main__"),
        ("a\n----\nb<noinclude>c</noinclude><includeonly>d</includeonly>", "a\n\nbc"),
        ("M ({{lang|ru|М}}; {{IPA|m}}, 1147) ({{a}}) f() (x{{b}})", "M (1147) f() (x)"),
        (
            "x<source lang=py>\nif a:\n    # b  c\n    == d\n</source>y<pre>z</pre>",
            "x\nif a:\n    # b  c\n    == d\ny\nz",
        ),
        ("the ''Titanic'''s crew, '''cat'''s", "the Titanic's crew, cats"),
        ("a ''b'' and '''s'''", "a b and s"),
        ("<code>x<nowiki>{{y}}</nowiki></code><indicator>[[File:z]]</indicator>", "x{{y}}"),
        ("[[文件:a|x]][[ファイル:b]][[تصنيف:c]]d", "d"),
        ("__NOTOC__a&nbsp;&amp;amp; &lt;b&gt;", "a &amp; <b>"),
        ("unclosed {{template and [[link", "unclosed {{template and [[link"),
        ("[[a {{b]] c}} d", "[[a d"),
        ("\u200fשלום\u200e", "\u200fשלום\u200e"),
        ("", ""),
    ],
)
def test_wikitext(source: str, text: str) -> None:
    assert plain_text(source) == text


def test_names_of_namespaces_are_those_of_the_wiki() -> None:
    source = "a [[Dosya:x.jpg|b]] [[Kategori:K]] c"
    assert plain_text(source, ["dosya"], ["kategori"]) == "a c"
    assert plain_text(source) == "a b c"


def test_references_are_each_named_once() -> None:
    source = "{{cite web|url=http://a.org/x|t}} [https://b.org c] <ref>http://a.org/x.</ref>"
    assert references(source) == ["http://a.org/x", "https://b.org"]


LOCALISED = """bg Картинка Категория|ca Fitxer Categoria|cs Soubor Kategorie|da Fil Kategori
de Datei Kategorie|es Archivo Categoría|fr Fichier Catégorie|hr Datoteka Kategorija
hu Fájl Kategória|it Immagine Categoria|nl Bestand Categorie|pl Plik Kategoria
pt Ficheiro Categoria|ro Fişier Categorie|ru Файл Категория|sl Slika Kategorija
sr Датотека Категорија|sv Bild Kategori|uk Зображення Категорія"""


@pytest.mark.parametrize("names", LOCALISED.replace("\n", "|").split("|"))
def test_files_and_categories_go_in_every_language(names: str) -> None:
    _, file, category = names.split()
    caption = f"thumb|A [[link]], {{{{t|[[x]]}}}} and [[{file}:b.png|20px]]"
    assert plain_text(f"a [[{file}:a.jpg|{caption}]] [[ {category} :c]] b") == "a b"


HOSTILE = [
    "{{",
    "}}",
    "[[",
    "]]",
    "[[a|",
    "<ref>",
    "</ref>",
    "<ref name=",
    "<!--",
    "<nowiki>",
    "{|\n",
]
HOSTILE += [
    "{{a|[[b|",
    "'''a",
    "''",
    "-{",
    "[http://",
    "[http://a ",
    "<a ",
    "\n==",
    "\n{|\n|-\n|",
    "{{{",
]
HOSTILE += [
    "<math>",
    "&lt;",
    "[[a]] ",
    "{{b}} ",
    "\n* ",
    "}}}}",
    "<gallery>",
    "<REF>",
    "<table>",
    "<pre>\n</pre>",
    "({{a}} ",
    "( ;",
    "-{a:",
    "__A",
]


@pytest.mark.slow
@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_wikitext_takes_linear_time(unit: str) -> None:
    def seconds(n: int) -> float:
        start = time.process_time()
        plain_text(unit * n)
        return time.process_time() - start

    small = min(seconds(10_000) for _ in range(3))
    assert min(seconds(40_000) for _ in range(3)) < 8 * small + 0.05
    # nested and then closed
    closing = {"{{": "}}", "[[a|": "]]", "<ref>": "</ref>", "-{": "}-"}.get(unit)
    if closing:
        start = time.process_time()
        plain_text(unit * 40_000 + closing * 40_000)
        assert time.process_time() - start < 8 * small + 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "made",
    [
        lambda n: "=" + " " * n + "x",
        lambda n: "-{" * n + "x" * 5 * n + "}-" * n,
        lambda n: "[//a " * n + "x" * 5 * n + "]" * n,
        lambda n: "".join(
            "<" + "".join(c.upper() if i >> k & 1 else c for k, c in enumerate("syntaxhighlight"))
            + ">" for i in range(n)
        ),
    ],
    ids=["heading", "variants", "addresses", "names"],
)  # fmt: skip
def test_other_hostile_wikitext_takes_linear_time(made: Callable[[int], str]) -> None:
    def seconds(n: int) -> float:
        start = time.process_time()
        plain_text(made(n))
        return time.process_time() - start

    small = min(seconds(5_000) for _ in range(3))
    large = min(seconds(20_000) for _ in range(3))
    assert large < 8 * small + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["open", "endless", "redirect", "namespaces"])
def test_hostile_dumps_take_linear_time(tmp_path: Path, rng: random.Random, how: str) -> None:
    begun = b"<page><title>a</title><id>1</id><revision><text>"

    def seconds(n: int) -> float:
        data = {
            "open": begun + base64.b64encode(rng.randbytes(n * 3)),
            "endless": b"<page>" * (n // 10),
            "redirect": begun + b"#a" + b" " * (n // 10) + b"x</text></page>",
            "namespaces": b'<namespace key="1" ' * (n // 20),
        }[how]
        raw = tmp_path / str(n)
        raw.mkdir(exist_ok=True)
        (raw / "enwiki-pages-articles.xml.gz").write_bytes(gzip.compress(data, 1))
        start = time.process_time()
        plan = wikipedia.plan(wikipedia.Options(), [raw])
        assert [list(plan.read(unit.pieces[0])) for unit in plan.units]
        return time.process_time() - start

    small = seconds(500_000)
    large = seconds(2_000_000)
    assert large < 8 * small + 0.2


def test_a_number_without_end_costs_no_other_page(tmp_path: Path) -> None:
    """Python raises on numbers of more than 4,300 digits, also within html.unescape."""
    endless = "&#" + "9" * 5_000 + ";"
    pages = page(1, f"before {endless} behind"), page(2, "the next one")
    named = pages[0].replace("Title 1", f"Title {endless}")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/enwiki-pages-articles.xml").write_text(
        HEAD.format("enwiki") + named + pages[1]
    )
    found, summary = made(tmp_path, tmp_path / "raw")
    assert len(found) == 2 and not summary.total["quarantined"]
    assert "before \ufffd behind" in found["enwiki:1"]["text"]


def test_blocks_close_in_any_case() -> None:
    assert plain_text("<Math>a [[b]]</MATH> [[c]]") == "a [[b]] c"


def test_random_markup_never_raises(rng: random.Random) -> None:
    for _ in range(300):
        parts = [
            rng.choice([*HOSTILE, "a", " ", "|", "\n", "é", "]", "}"])
            for _ in range(rng.randrange(60))
        ]
        assert isinstance(plain_text("".join(parts)), str)


HEAD = """<mediawiki xml:lang="de"><siteinfo><dbname>{}</dbname><namespaces>
<namespace key="0" /><namespace key="6" case="x">Datei</namespace>
<namespace key="14">Kategorie</namespace></namespaces></siteinfo>
"""


def page(id: int, text: str, ns: int = 0, more: str = "", title: str = "") -> str:
    title = title or f"Title {id} & more"
    return (
        f"<page><title>{html.escape(title)}</title><ns>{ns}</ns><id>{id}</id>{more}"
        f"<revision><id>9{id}</id><text xml:space='preserve'>{html.escape(text)}</text>"
        "</revision></page>\n"
    )


def made(tmp_path: Path, raw: Path, **options) -> tuple[dict[str, dict], Summary]:
    chosen = wikipedia.Options(source="wikipedia", **{"min_chars": 1} | options)
    plan = wikipedia.plan(chosen, [raw])
    summary = pipeline(plan, wikipedia.steps(chosen), tmp_path / "out", Executor(1), 1.0)
    shards = sorted((tmp_path / "out").glob("0*.zst"))
    return {d["id"]: d for path in shards for d in read_documents(path)}, summary


def test_pages_become_documents_and_the_others_are_counted(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    content = HEAD.format("dewiki") + "".join(
        [
            page(1, "Ein [[Link]]. [[Datei:x.jpg|mini]]<ref>http://a.org</ref>"),
            page(2, "Diskussion", ns=1),
            page(3, "#WEITERLEITUNG [[Ziel]]"),
            page(4, "x", more="<redirect title='Ziel' />"),
            page(5, "{{nur|Vorlage}}"),
            "<page><title>cut off</title><ns>0</ns><id>6</id>",
            page(7, "Sieben"),
            page(8, "").replace("<title>Title 8 &amp; more</title>", ""),
        ]
    )
    (raw / "dewiki-latest-pages-articles1.xml-p1p8.bz2").write_bytes(bz2.compress(content.encode()))
    (raw / "fiwiki-latest-pages-articles.xml").write_text(HEAD.format("dewiki") + page(1, "x"))
    (raw / "dewiki-latest-stub.sql").write_text("x")
    documents, summary = made(tmp_path, raw)
    assert {id: d["text"] for id, d in documents.items()} == {
        "dewiki:1": "Title 1 & more\n\nEin Link.",
        "dewiki:7": "Title 7 & more\n\nSieben",
    }
    assert documents["dewiki:1"]["meta"] == {
        "title": "Title 1 & more",
        "language": "de",
        "url": "https://de.wikipedia.org/wiki/Title_1_&_more",
        "references": ["http://a.org"],
    }
    assert summary.total["dropped"] == {"namespace": 1, "redirect": 2, "empty": 1}
    assert summary.total["quarantined"] == {"xml": 2}
    assert sorted((left.name, left.reason) for left in summary.left_out) == [
        ("dewiki-latest-stub.sql", "suffix"),
        ("fiwiki-latest-pages-articles.xml", "language fi"),
    ]


def test_a_multistream_dump_is_the_same_whole_and_cut(tmp_path: Path, rng: random.Random) -> None:
    streams = [HEAD.format("enwiki")]
    for i in range(12):
        words = rng.choices("the quick brown fox".split(), k=rng.randrange(1, 900))
        streams.append(page(2 * i, " ".join(words)) + page(2 * i + 1, " ".join(words[::-1])))
    data = b"".join(bz2.compress(part.encode()) for part in [*streams, "</mediawiki>"])
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for folder, name in (
        (cut, "enwiki-1-pages-articles-multistream.xml.bz2"),
        (whole, "enwiki.xml.bz2"),
    ):
        folder.mkdir()
        (folder / name).write_bytes(data)
    expected, summary = made(whole, whole)
    assert len(expected) == 24 and len(summary.units) == 1
    documents, summary = made(cut, cut, unit_bytes=len(data) // rng.randrange(2, 9))
    assert documents == expected and len(summary.units) > 1
    # beside the plain dump of the same wiki, as they are served
    os.link(whole / "enwiki.xml.bz2", cut / "enwiki-1-pages-articles.xml.bz2")
    documents, summary = made(tmp_path, cut)
    assert documents == expected and summary.total["dropped"] == {"id_duplicate": 24}
    [stages] = lineage.sources(tmp_path / "out").values()
    told = explain.tell("wikipedia", stages, "enwiki:0")
    assert "bytes, kept" in told and "exact by id: 1 exact" in told


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no bzip2"])
def test_a_damaged_dump_keeps_what_came_before(tmp_path: Path, damage: str) -> None:
    pages = [page(i, f"text {i} " * 5000) for i in range(8)]
    first = bz2.compress((HEAD.format("dewiki") + "".join(pages[:4])).encode())
    second = bz2.compress("".join(pages[4:]).encode())
    data = {
        "truncated": first + second[: len(second) // 2],
        "flipped": first + second[:60] + bytes([second[60] ^ 255]) + second[61:],
        "empty": b"",
        "no bzip2": b"<html>404</html>",
    }[damage]
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "dewiki-pages-articles.xml.bz2").write_bytes(data)
    documents, summary = made(tmp_path, raw)
    kept = 4 if damage in ("truncated", "flipped") else 0
    assert len(documents) == kept
    assert summary.total.get("quarantined", {}).get("damaged", 0) == (1 if kept else 0)


def test_pages_of_every_schema(tmp_path: Path) -> None:
    """An older and a newer one, a text that is gone, and a history, of which the last is read."""
    raw = tmp_path / "raw"
    raw.mkdir()
    text = "<text bytes='1' sha1='x' xml:space='preserve'>{}</text>"
    revision = "<revision><id>1</id><origin>1</origin><model>wikitext</model>{}</revision>"
    pages = [
        "<page><title>A</title><id>1</id><revision><text>Old dump</text></revision></page>",
        "<page><title>Datei:B</title><id>2</id><revision><text>x</text></revision></page>",
        "<page><title>C</title><ns>0</ns><id>3</id>{}</page>".format(
            "".join(revision.format(text.format(each)) for each in ("first", "second"))
        ),
        "<page><title>D</title><ns>0</ns><id>4</id>{}</page>".format(
            revision.format('<text bytes="0" deleted="deleted" />')
        ),
    ]
    (raw / "dewiki-pages.xml.gz").write_bytes(
        gzip.compress((HEAD.format("dewiki") + "\n".join(pages)).encode())
    )
    documents, summary = made(tmp_path, raw)
    assert {id: d["text"] for id, d in documents.items()} == {
        "dewiki:1": "A\n\nOld dump",
        "dewiki:3": "C\n\nsecond",
    }
    assert summary.total["dropped"] == {"namespace": 1, "empty": 1}


@pytest.mark.slow
def test_a_list_of_4_megabytes() -> None:
    line = "* [[Place {0}|The place {0}]], {{{{coord|{0}|1}}}} in ''{0}''<ref>{0}</ref>\n"
    source = "".join(line.format(i) for i in range(60_000))
    assert len(source) > 4_000_000
    lines = plain_text(source).split("\n")
    assert len(lines) == 60_000 and lines[7] == "* The place 7, in 7"


def test_bytes_that_are_not_utf8_cost_no_page(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    content = (HEAD.format("frwiki") + page(1, "caf\u00e9 noir")).encode("latin-1")
    (raw / "frwiki.xml").write_bytes(content)
    documents, summary = made(tmp_path, raw)
    assert documents["frwiki:1"]["text"].endswith("caf\ufffd noir")
    assert summary.total["noted"] == {"bytes that are not UTF-8": 1}


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_REAL_DATA" not in os.environ, reason="LLAMA_REAL_DATA is not set")
def test_real_dumps(tmp_path: Path) -> None:
    raw = Path(os.environ["LLAMA_REAL_DATA"]) / "raw" / "wikipedia"
    documents, summary = made(tmp_path, raw, min_chars=200)
    languages = {d["meta"]["language"] for d in documents.values()}
    assert languages == set(wikipedia.LANGUAGES)
    assert {left.reason for left in summary.left_out} == {
        f"language {x}" for x in ("fi", "ja", "ltg", "vi")
    }
    text = "\n".join(d["text"] for d in documents.values())
    # what is left of markup is what pages leave open themselves
    for mark in ("{{", "[[", "<ref", "'''", "{|"):
        assert text.count(mark) < 3e-5 * len(text), mark
