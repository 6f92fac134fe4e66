"""Recipe `plain`: every format, drop reason and id, hostile input, the command, real dumps."""

import gzip
import io
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import orjson
import pytest
import zstandard

from llama.cli import UserError
from llama.corpus import raw
from llama.corpus.document import Document, Dropped, Noted, apply
from llama.corpus.plan import Piece
from llama.corpus.sources import plain
from llama.files import read_documents, read_json, read_lines

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/corpus/plain.yaml"
REAL = os.environ.get("LLAMA_REAL_DATA")


def items(path: Path, **options):
    """What recipe plain makes of one file, after its steps."""
    chosen = plain.Options(source="mine", **options)
    found = list(plain.read(chosen, piece(path)))
    documents = [item for item in found if isinstance(item, Document)]
    rest = [item for item in found if not isinstance(item, Document)]
    return apply(plain.steps(chosen), documents) + rest


def piece(path: Path) -> Piece:
    return Piece(path.name, str(path), plain.format_of(path.name) or "", path.stat().st_size)


def reasons(found) -> Counter:
    return Counter(item.reason for item in found if isinstance(item, Dropped))


def texts(found) -> dict[str, str]:
    return {item.id: item.text for item in found if isinstance(item, Document)}


def command(*arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "llama.corpus", "run", "--config", str(CONFIG)]
    line += map(str, arguments)
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.txt", "txt"),
        ("a.TXT.gz", "txt.gz"),
        ("b.md", "md"),
        ("a/b.rst", "rst"),
        ("c.jsonl.zst", "jsonl.zst"),
        ("c4.json.gz", "json.gz"),
        ("x.parquet", "parquet"),
        ("x.zip", "zip"),
        ("site/Posts.xml", "posts"),
        ("Makefile", "code"),
        ("x.tar.gz", None),
        ("x.zip.gz", None),
        ("pom.xml", None),
        ("x.7z", None),
        ("noname", None),
        ("a.gz", None),
    ],
)
def test_format_by_name(name, format):
    assert plain.format_of(name) == format


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_a_text_file_is_a_document(tmp_path, packing):
    path = tmp_path / f"a.txt{packing}"
    data = "one\r\ntwo\rthree\nGrüße".encode()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    path.write_bytes(pack(data))
    assert items(path) == [Document(path.name, "one\ntwo\nthree\nGrüße", "mine", {})]


def test_what_a_text_file_is_dropped_for(tmp_path):
    cases = {
        "binary": b"\x7fELF\0\0\0",
        "empty": b" \n\t\r\n",
        "short": b"  abcd  ",
        "too_large": b"x" * 101,
    }
    for reason, data in cases.items():
        path = tmp_path / f"{reason}.txt"
        path.write_bytes(data)
        found = items(path, min_chars=5, max_document_bytes=100)
        assert [(item.id, item.reason, item.error) for item in found] == [(path.name, reason, "")]
    path.write_bytes(b"caf\xe9 au lait")
    assert items(path)[1] == Noted("decoded as windows-1252")
    (bad,) = items(path, encoding="utf-8")
    assert bad.reason == "encoding" and "0xe9" in bad.error


def test_json_lines_count_every_bad_line_by_its_number(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"text": "with a mark"}',
        b'{"text": "good", "url": "u", "n": [1, null]}',
        b"",
        b"not json",
        b'["a list"]',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"body": "other key"}',
        b'{"text": NaN}',
        b'{"text": "\\ud800"}',
        b'{"text": "caf\xe9"}',
        b'{"text": "' + b"x" * 500 + b'"}',
        b'{"text": "cut off',
    ]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = items(path, max_document_bytes=400)
    assert texts(found) == {"x.jsonl:1": "with a mark", "x.jsonl:2": "good", "x.jsonl:11": "café"}
    assert found[1].meta == {"url": "u", "n": [1, None]}
    dropped = {item.id: item.reason for item in found if isinstance(item, Dropped)}
    expected = ["empty", "json", "json", "no_text", "no_text", "no_text", "json", "json"]
    expected = dict(zip((f"x.jsonl:{i}" for i in range(3, 11)), expected, strict=True))
    assert dropped == {**expected, "x.jsonl:12": "too_large", "x.jsonl:13": "json"}
    errors = {item.id for item in found if isinstance(item, Dropped) and item.error}
    assert errors == dropped.keys() - {"x.jsonl:3", "x.jsonl:12"}


def test_deeply_nested_json_costs_its_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"[" * 200_000 + b'\n{"text": "next"}\n')
    found = items(path)
    assert texts(found) == {"x.jsonl:2": "next"} and reasons(found) == {"json": 1}


def test_settings_in_json_are_no_data(tmp_path):
    path = tmp_path / "package.json"
    path.write_text('{\n  "name": "x",\n  "text": "y"\n}\n')
    assert items(path) == [Dropped("package.json", "not_json_lines", path.stat().st_size)]
    path.write_text('{"text": "a"}\n{"name": "x"}\n')
    assert texts(items(path)) == {"package.json:1": "a"} and reasons(items(path)) == {"no_text": 1}


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    values = [b"one", None, "Grüße".encode(), b"caf\xe9", b""] + [b"many"] * 600
    table = pyarrow.table({"text": pyarrow.array(values, pyarrow.binary()), "n": range(605)})
    parquet.write_table(table, path)
    found = items(path)
    expected = {"x.parquet:1": "one", "x.parquet:3": "Grüße", "x.parquet:4": "café"}
    expected |= {f"x.parquet:{i}": "many" for i in range(6, 606)}
    assert texts(found) == expected and reasons(found) == {"no_text": 1, "empty": 1}
    with pytest.raises(ValueError, match="no column 'body' among text, n"):
        items(path, text_key="body")


def test_a_damaged_parquet_file_never_loses_rows_silently(tmp_path, rng):
    """Pages have sums, the footer has none: there a stretch of zeros ends a list of row groups."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"text {i} " * 9 for i in range(200)]
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, path, write_page_checksum=True, row_group_size=50)
    good = path.read_bytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    piece = plain.plan(plain.Options(source="s"), [path]).units[0].pieces[0]
    silent = 0
    for begin in range(footer, len(good) - 8 - 2):
        bad = bytearray(good)
        n = rng.choice((1, 2))
        bad[begin : begin + n] = bytes(n)
        path.write_bytes(bad)
        try:
            found = list(plain.read(plain.Options(source="s"), piece))
        except Exception:
            continue
        kept = [item.text for item in found if isinstance(item, Document)]
        silent += kept != texts and len(kept) == len(found)
    assert silent == 0


def test_parquet_without_pyarrow_is_said_before_the_run(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="needs pyarrow"):
        plain.plan(plain.Options(), [tmp_path])


def zip_of(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def test_zip_members(tmp_path):
    members = {
        "book.txt": b"a book",
        "folder/": b"",
        "folder/old.txt": b"caf\xe9",
        "../../escape.txt": b"stays inside",
        "image.png": b"\0",
        "__MACOSX/._book.txt": b"\0",
        "big.txt": b"x" * 2000,
        "empty.txt": b"",
    }
    path = tmp_path / "x.zip"
    path.write_bytes(zip_of(**members))
    found = items(path, max_document_bytes=1000)
    assert texts(found) == {
        "x.zip/book.txt": "a book",
        "x.zip/folder/old.txt": "café",
        "x.zip/../../escape.txt": "stays inside",
    }
    assert reasons(found) == {"suffix": 1, "hidden": 1, "too_large": 1, "empty": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.zip"]


def test_a_damaged_member_costs_itself_and_a_bomb_the_archive(tmp_path, monkeypatch, rng):
    good, bad = rng.randbytes(300).hex().encode(), rng.randbytes(3000).hex().encode()
    data = bytearray(zip_of(**{"a.txt": good, "b.txt": bad, "c.txt": good}))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        middle = archive.getinfo("b.txt")
    data[middle.header_offset + 500] ^= 0xFF
    path = tmp_path / "x.zip"
    path.write_bytes(data)
    found = items(path)
    assert list(texts(found)) == ["x.zip/a.txt", "x.zip/c.txt"]
    assert reasons(found) == {"member": 1}
    monkeypatch.setattr(raw, "RATIO_FLOOR_BYTES", 1 << 20)
    path.write_bytes(zip_of(**{"a.txt": b"a", "bomb.txt": bytes(20 << 20)}))
    with pytest.raises(ValueError, match="bomb"):
        items(path)
    path.write_bytes(b"PK no archive")
    with pytest.raises(zipfile.BadZipFile):
        items(path)


def test_posts(tmp_path):
    path = tmp_path / "Posts.xml"
    path.write_bytes(
        b'\xef\xbb\xbf<?xml version="1.0" encoding="utf-8"?>\n<posts>\n'
        b'  <row Id="1" PostTypeId="1" Body="&lt;p&gt;a &amp;lt;b&amp;gt; &amp;amp; c&lt;/p&gt;'
        b'&#xA;&#xA;&lt;pre&gt;&lt;code&gt;x  = 1&#xA;&lt;/code&gt;&lt;/pre&gt;" Title="t" />\n'
        b'  <row Id="2" PostTypeId="5" Title="no body" />\n'
        b'  <row Id="3" Body="\xff" />\n'
        b'  <row Id="4" Body="&lt;br&gt;one&lt;br/&gt;two 1 &lt; 2" /><row Id="5" Body="x" />\n'
        b'  <row Id="6" Body="cut o'
    )
    found = items(path)
    assert texts(found) == {
        "Posts.xml:3": "a <b> & c\n\nx  = 1",
        "Posts.xml:5": "\ufffd",
        "Posts.xml:6": "one\ntwo 1 < 2",
        "Posts.xml:6.1": "x",
    }
    assert found[0].meta == {"Id": "1", "PostTypeId": "1"}
    assert reasons(found) == {"empty": 1, "xml": 1}


def test_the_command_end_to_end_with_any_number_of_workers(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"document {i} " * 400)
    (folder / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    (folder / "photo.jpg").write_bytes(b"\0")
    outputs = []
    for workers in (1, 3):
        output = tmp_path / str(workers) / "mine"
        more = ("--workers", workers, "--unit_bytes", "20k", "--max_quarantined", 0.1)
        done = command("--input", folder, "--output", output, *more)
        assert done.returncode == 0, done.stderr
        assert "quarantined: json 1" in done.stdout and "suffix 1" in done.stdout
        names = sorted(p.name for p in output.iterdir())
        outputs.append(
            {n: (output / n).read_bytes() for n in names if n.endswith((".zst", ".json"))}
        )
    assert outputs[0] == outputs[1]
    assert len([name for name in names if name[:5].isdigit()]) > 3
    stats = read_json(output / "stats.json")
    assert stats["total"]["documents"] == {"in": 32, "out": 31}
    assert stats["total"]["quarantined"] == {"json": 1}
    assert stats["formats"]["txt"]["documents"]["out"] == 30
    assert stats["left_out"]["suffix"] == {"files": 1, "bytes": 1, "examples": ["photo.jpg"]}
    (listed,) = map(orjson.loads, read_lines(output / "quarantine.jsonl.zst"))
    assert listed["id"] == "bad.jsonl:2" and listed["reason"] == "json"
    shards = sorted(output.glob("0*.jsonl.zst"))
    documents = [document for path in shards for document in read_documents(path)]
    assert [d["id"] for d in documents] == [f"{i:02}.txt" for i in range(30)] + ["bad.jsonl:1"]
    assert {d["source"] for d in documents} == {"mine"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--input nowhere --output out", "nowhere does not exist"),
        ("--output out", "--input, which is not given"),
        ("--input . --output out", "lies inside"),
        ("--input a.bin --output out", "nothing to read in a.bin (suffix 1)"),
        ("--input a.txt --output out --min_char 3", "did you mean min_chars?"),
        ("--input a.txt --output out --encoding klingon", "no known codec"),
        ("--input a.txt --output out --source a/b", "source is 'a/b'"),
        ("--input a.txt --output out --unit_bytes 0", "unit_bytes is 0"),
        ("--input a.txt --output out --workers 0", "workers is 0"),
        ("--input a.txt --output out --max_quarantined 2", "max_quarantined is 2"),
        ("--input a.txt --output out --recipe cooking", "recipe is 'cooking'"),
        ("--input a.txt --output out --config no.yaml", "no.yaml cannot be read"),
    ],
)
def test_a_users_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, told):
    from llama.corpus.__main__ import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.bin").write_text("text")
    with pytest.raises(UserError) as error:
        main(["run", "--config", str(CONFIG), *arguments.split()])
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not REAL, reason="LLAMA_REAL_DATA does not name the folder of real dumps")
@pytest.mark.parametrize(
    ("source", "documents", "dropped"),
    [("books", 86, {}), ("c4", 1266, {}), ("stackexchange", 2311, {"empty": 19})],
)
def test_real_dumps(tmp_path, source, documents, dropped):
    done = command("--input", f"{REAL}/raw/{source}", "--output", tmp_path / source)
    assert done.returncode == 0, done.stderr
    total = read_json(tmp_path / source / "stats.json")["total"]
    assert total["documents"] == {"in": documents, "out": documents - sum(dropped.values())}
    assert total.get("dropped", {}) == dropped and "quarantined" not in total
    shards = sorted((tmp_path / source).glob("0*.jsonl.zst"))
    ids = [document["id"] for path in shards for document in read_documents(path)]
    assert len(ids) == len(set(ids)) == total["documents"]["out"]


def test_any_bytes_give_documents_or_reasons(tmp_path, rng):
    scraps = [
        b'{"text": "',
        b'"}',
        b'<row Id="1" Body="',
        b'" />',
        b"\n",
        b"\r\n",
        b"\xff\xfe",
        b"\0",
    ]
    scraps += [
        b"&lt;p&gt;",
        b"&#55296;",
        b"\\ud800",
        b"\xc3\xa9",
        b"\xe9",
        b"word ",
        b"<",
        b'"',
        b"{",
    ]
    for i in range(400):
        name = rng.choice(["a.txt", "a.jsonl", "a.json", "Posts.xml", "a.py"])
        path = tmp_path / name
        path.write_bytes(b"".join(rng.choices(scraps, k=rng.randrange(30))) + rng.randbytes(i % 4))
        found = items(path, max_document_bytes=60)
        outcomes = [item for item in found if not isinstance(item, Noted)]
        assert len({item.id for item in outcomes}) == len(outcomes)
        for item in outcomes:
            if isinstance(item, Document):
                orjson.dumps(item._asdict())
                assert item.text.strip()
            else:
                assert item.reason and item.reason != "exception"
