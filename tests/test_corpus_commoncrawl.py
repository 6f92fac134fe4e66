"""Recipe `commoncrawl`: both presets from archive to documents, each drop reason, damaged files."""

import gzip
import os
from pathlib import Path

import pytest
from test_corpus_html import PAGE
from test_corpus_warc import record
from test_corpus_web import HTML, response

from llama.cli import UserError
from llama.corpus import engine, shuffle
from llama.corpus.executors import Executor
from llama.corpus.sources import commoncrawl
from llama.files import read_documents, read_json

pytest.importorskip("py3langid", reason="the extra corpus is not installed")

SENTENCE = "Story number {} tells how the old village by the river came to have its own bridge. "


def story(i: int) -> str:
    return "".join(SENTENCE.format(chr(97 + i) * (k + 2)) for k in range(9))


def run(tmp_path: Path, files: dict[str, bytes], **options) -> tuple[dict[str, dict], dict, dict]:
    """(documents by id, counts up to the lines, counts from the lines on)."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, data in files.items():
        (raw / name).write_bytes(data)
    chosen = commoncrawl.Options(source="commoncrawl", **options)
    plan, steps = commoncrawl.plan(chosen, [raw]), commoncrawl.steps(chosen)
    out = tmp_path / "out"
    shuffle.pipeline(plan, steps, out, Executor(1), 1.0)
    found = {d["id"]: d for p in sorted(out.glob("0*.zst")) for d in read_documents(p)}
    stages = [read_json(p / engine.STATS)["total"] for p in (out / shuffle.STAGES / "0", out)]
    return found, *stages


def test_warc_to_documents(tmp_path, rng) -> None:
    pages = [response(PAGE.format(story(i) + "</p><p>Read more").encode()) for i in range(3)]
    parts = [record(0, b"software: x", "warcinfo")]
    parts += [
        record(i, page, extra=["WARC-Date: 2024-01-01T00:00:00Z"]) for i, page in enumerate(pages)
    ]
    parts += [record(9, b"GET /", "request"), record(3, response(PAGE.format("short").encode()))]
    packed = [gzip.compress(part, mtime=0) for part in parts]
    found, first, _ = run(tmp_path, {"a.warc.gz": b"".join(packed)})
    places = [sum(map(len, packed[:i])) for i in (1, 2, 3)]
    assert list(found) == [f"a.warc.gz:{place}" for place in places]
    texts = [d["text"] for d in found.values()]
    assert all(story(i).strip() in text for i, text in enumerate(texts))
    assert ["Read more" in text for text in texts] == [True, False, False]
    meta = found[f"a.warc.gz:{places[1]}"]["meta"]
    assert meta.pop("language_score") > 0.9
    assert meta == {
        "url": "http://example.org/1",
        "date": "2024-01-01T00:00:00Z",
        "title": "A & B",
        "language": "en",
    }
    assert first["noted"] == {"record warcinfo": 1, "record request": 1, "charset utf-8": 4}
    assert first["dropped"] == {"short": 1}


def test_wet_by_the_first_preset(tmp_path) -> None:
    bodies = [f"Title {i}\n{story(i)}\nRead more\n\0end {i * 'x'}" for i in range(3)]
    parts = [record(i, body.encode(), "conversion") for i, body in enumerate(bodies)]
    parts.append(record(3, story(5).encode().replace(b"\n", b""), "conversion"))
    parts.append(record(4, b"t\n" + story(6).encode() + b"\xff", "conversion"))
    found, first, last = run(
        tmp_path, {"a.warc.wet.gz": gzip.compress(b"".join(parts)), "b.warc": b""}, preset="llama1"
    )
    texts = [d["text"].split("\n") for d in found.values()]
    assert [t[:1] for t in texts[:3]] == [[story(i)] for i in range(3)]
    assert not any("Read more" in t for t in texts) and texts[1][1] == "end x"
    assert [d["meta"]["title"] for d in found.values()] == ["Title 0", "Title 1", "Title 2", "t"]
    assert texts[3][0].endswith("\ufffd") and first["noted"] == {"text with damaged bytes": 1}
    # a page of one line is all title
    assert first["dropped"] == {"empty": 1}


def test_each_drop_reason(tmp_path) -> None:
    german = "Der Ausschuss hat heute beschlossen, dass der Bericht im Sommer erscheinen soll. " * 9
    given = {
        "http": b"not http",
        "http_status": response(HTML, status="HTTP/1.1 301 Moved"),
        "not_html": response(HTML, "Content-Type: image/png"),
        "content_encoding": response(b"\x28\xb5\x2f\xfd" * 99, "Content-Encoding: zstd"),
        "binary": response(bytes(range(256)) * 20),
        "too_large": response(b"x" * 200_000),
        "empty": response(b"<html></html>"),
        "short": response(b"<html><p>short</html>"),
        "html_timeout": response(b"<div>" * 20_000),
    }
    kept = response(PAGE.format(story(1)).encode())
    late = {"language": german, "kept": story(2), "duplicate_lines": story(2)}
    pages = [kept, *given.values(), *(response(PAGE.format(x).encode()) for x in late.values())]
    pages = [
        p.replace(b"<li>one</li><li>two</li>", b"").replace(b"<h1>A heading", b"") for p in pages
    ]
    parts = [gzip.compress(record(i, page)) for i, page in enumerate(pages)]
    parts[3:3] = [parts[0][:60]]
    found, first, last = run(
        tmp_path,
        {"a.warc.gz": b"".join(parts), "empty.warc.gz": b"", "junk.warc.gz": os.urandom(99)},
        max_page_bytes=150_000,
        html_deadline_s=0.3,
    )
    assert len(found) == 2
    assert first["dropped"] == dict.fromkeys(given, 1)
    assert first["quarantined"] == {"damaged": 3}
    assert last["dropped"] == {"language": 1, "duplicate_lines": 1}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"group_shards": 0}, "group_shards is 0"),
        ({"html_deadline_s": 0}, "html_deadline_s is 0"),
        ({"min_language_score": -1}, "min_language_score is -1"),
        ({"languages": ["xx"]}, "languages names xx"),
        ({"language_model": "lid.176.bin"}, "lid.176.bin|fasttext-predict"),
    ],
)
def test_what_is_wrong_is_said_first(tmp_path, options, told) -> None:
    with pytest.raises(UserError, match=told):
        commoncrawl.plan(commoncrawl.Options(source="x", **options), [tmp_path])


def test_each_preset_reads_its_own(tmp_path) -> None:
    for name in ("a.warc.gz", "b.arc", "c.warc.wet.gz", "d.warc.wat.gz", "e.txt"):
        (tmp_path / name).write_bytes(b"")
    for preset, read in (("llama1", ["c.warc.wet.gz"]), ("improved", ["a.warc.gz", "b.arc"])):
        plan = commoncrawl.plan(commoncrawl.Options("x", preset=preset), [tmp_path])
        assert [piece.name for unit in plan.units for piece in unit.pieces] == read
        assert sorted(x.name for x in plan.left_out)[-2:] == ["d.warc.wat.gz", "e.txt"]
        assert len(plan.left_out) == 5 - len(read)


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_REAL_DATA" not in os.environ, reason="LLAMA_REAL_DATA is not set")
@pytest.mark.parametrize(("preset", "least"), [("improved", 900), ("llama1", 800)])
def test_real_archives(tmp_path, preset, least) -> None:
    raw = Path(os.environ["LLAMA_REAL_DATA"]) / "raw" / "commoncrawl"
    chosen = commoncrawl.Options(source="commoncrawl", preset=preset, languages=[])
    plan, steps = commoncrawl.plan(chosen, [raw]), commoncrawl.steps(chosen)
    summary = shuffle.pipeline(plan, steps, tmp_path, Executor(2))
    assert summary.total["documents"]["out"] >= least
    for path in tmp_path.glob("0*.zst"):
        for each in read_documents(path):
            assert each["text"] and each["meta"]["url"].startswith("http")
