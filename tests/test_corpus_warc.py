"""Reader of web archives: healthy ones as others read them, damaged ones but for the damage."""

import gzip
import os
import random
import re
import time
import zlib
from pathlib import Path

import pytest

from llama.corpus import warc
from llama.corpus.warc import Record, records

CAP = 1 << 22


def record(i: int, body: bytes, kind: str = "response", length: object = None, extra=()) -> bytes:
    fields = [
        f"WARC-Type: {kind}",
        f"WARC-Target-URI: http://example.org/{i}",
        f"Content-Length: {len(body) if length is None else length}",
        *extra,
    ]
    head = "\r\n".join(["WARC/1.0", *(field for field in fields if field)])
    return head.encode() + b"\r\n\r\n" + body + b"\r\n\r\n"


def bodies(rng: random.Random, n: int, most: int = 40_000) -> list[bytes]:
    words = [rng.randbytes(rng.randrange(1, 9)).hex().encode() for _ in range(500)]
    return [b" ".join(rng.choices(words, k=rng.randrange(most // 9))) for _ in range(n)]


def members(found: list[bytes]) -> list[bytes]:
    return [gzip.compress(each, 6, mtime=0) for each in found]


def read(tmp_path: Path, data: bytes, name: str = "x.warc.gz", cap: int = CAP) -> list[Record]:
    (tmp_path / name).write_bytes(data)
    return list(records(tmp_path / name, cap))


def test_the_same_records_however_they_are_packed(tmp_path, rng) -> None:
    given = bodies(rng, 60)
    # text that looks like records, empty bodies, newlines at the edges
    given[3:7] = [b"a\r\n\r\nWARC/1.0\r\nWARC-Type: response\r\n\r\n", b"", b"\r\n\r\n", b"x\n"]
    parts = [record(i, body) for i, body in enumerate(given)]
    whole = b"".join(parts)
    cut = sorted(rng.randrange(len(whole)) for _ in range(9))
    pieces = [whole[a:b] for a, b in zip([0, *cut], [*cut, len(whole)], strict=True)]
    packings = {
        "plain.warc": whole,
        "gzip named plain.warc": b"".join(members(parts)),
        "plain named.warc.gz": whole,
        "one member.warc.gz": gzip.compress(whole),
        "members at odd places.warc.gz": b"".join(members(pieces)),
        "padded.warc.gz": b"".join(m + bytes(rng.randrange(40)) for m in members(parts)),
    }
    for name, data in packings.items():
        found = read(tmp_path, data, name)
        assert [r.body for r in found] == given, name
        assert not any(r.problem for r in found), name
        assert [r.headers["warc-target-uri"][-2:] for r in found][:2] == ["/0", "/1"]
        assert len({r.place for r in found}) == len(found)
    offsets = [r.place for r in read(tmp_path, packings["gzip named plain.warc"])]
    sizes = list(map(len, members(parts)))
    assert offsets == [str(sum(sizes[:i])) for i in range(len(sizes))]


def test_damaged_members_cost_themselves(tmp_path, rng) -> None:
    given = bodies(rng, 400, 6000)
    packed = members([record(i, body) for i, body in enumerate(given)])
    starts = [sum(map(len, packed[:i])) for i in range(len(packed))]
    for hits in (1, 4):
        data = bytearray(b"".join(packed))
        hurt = set()
        for _ in range(hits):
            at = rng.randrange(len(data))
            data[at] ^= 1 << rng.randrange(8)
            hurt.add(max(i for i, start in enumerate(starts) if start <= at))
        found = read(tmp_path, bytes(data))
        good = {r.headers["warc-target-uri"].rpartition("/")[2]: r.body for r in found if r.body}
        for i, body in enumerate(given):
            # a flipped bit in a header's date costs nothing
            assert i in hurt or good.get(str(i), b"") == body
            assert good.get(str(i), body) == body
        assert sum(r.problem == "damaged" for r in found) <= hits
        assert len(found) >= len(given) - hits


@pytest.mark.parametrize("packed", [True, False])
def test_a_cut_file_loses_its_last_record(tmp_path, rng, packed) -> None:
    given = bodies(rng, 30)
    parts = [record(i, body) for i, body in enumerate(given)]
    parts = members(parts) if packed else parts
    for _ in range(20):
        whole = rng.randrange(len(parts))
        # from the second byte on something of it is there
        part = parts[whole][: rng.randrange(4, max(5, len(parts[whole]) - 8))]
        found = read(tmp_path, b"".join(parts[:whole]) + part)
        assert [r.body for r in found[:whole]] == given[:whole]
        assert [r.problem for r in found[whole:]] in ([], ["damaged"])
        assert not any(r.problem for r in found[:whole])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("lie", [0, 5, 10**6, 10**17, "", "abc", "-3", None])
def test_a_wrong_length_costs_no_other_record(tmp_path, rng, packed, lie) -> None:
    given = [b"first", b"body with\r\n\r\nblank lines" * 300, b"third", b"fourth"]
    parts = [record(i, body, length=lie if i == 1 else None) for i, body in enumerate(given)]
    if lie is None:
        parts[1] = re.sub(rb"Content-Length: \d+\r\n", b"", parts[1])
    data = b"".join(members(parts)) if packed else b"".join(parts)
    found = read(tmp_path, data)
    if lie == 10**17:
        assert [r.problem for r in found] == ["", "too_large", "", ""]
    else:
        assert [r.body for r in found] == given
        assert [r.problem for r in found] == ["", "length", "", ""]


def test_headers_by_name(tmp_path) -> None:
    head = (
        "WARC/1.1\r\nX-New: 1\r\ncontent-length:  4 \r\nno colon\r\n"
        "WARC-TYPE: conversion\r\nWARC-Type: response\r\nWARC-Target-URI: http://ü.org/a b\r\n\r\n"
    )
    [found] = read(tmp_path, head.encode() + b"text\r\n\r\n", "x.wet")
    assert (found.kind, found.body) == ("conversion", b"text")
    assert found.headers["warc-target-uri"] == "http://ü.org/a b" and found.headers["x-new"] == "1"
    # line ends of other systems, and those of one that has made them twice
    for end in ("\n", "\r\r\n"):
        [found] = read(tmp_path, head.replace("\r\n", end).encode() + b"text\n\n", "y.wet")
        assert (found.kind, found.body) == ("conversion", b"text")


def test_arc(tmp_path, rng) -> None:
    def line(address: str, mime: str, body: bytes) -> bytes:
        return f"{address} 192.0.2.1 20080430204825 {mime} {len(body)}\n".encode() + body + b"\n"

    version = b"1 1 InternetArchive\nURL IP-address Archive-date Content-type Archive-length\n\n"
    given = bodies(rng, 20)
    parts = [line("filedesc://x.arc", "text/plain", version)]
    parts += [line(f"http://a.org/{i}?q=a b", "text/html", body) for i, body in enumerate(given)]
    for data in (b"".join(parts), b"".join(members(parts)), gzip.compress(b"".join(parts))):
        first, *found = read(tmp_path, data, "x.arc.gz")
        assert first.kind == "arc"
        assert [r.body for r in found] == given and {r.kind for r in found} == {"response"}
        assert found[5].headers["warc-target-uri"] == "http://a.org/5?q=a b"
        assert found[5].headers["warc-date"] == "2008-04-30T20:48:25Z"


@pytest.mark.parametrize("packed", [True, False])
def test_one_giant_record_is_passed_over(tmp_path, packed) -> None:
    giant = record(1, b"0123456789\r\n" * (1 << 21))
    parts = [record(0, b"before"), giant, record(2, b"behind")]
    found = read(tmp_path, b"".join(members(parts) if packed else parts), cap=1 << 20)
    assert [(r.body, r.problem) for r in found] == [
        (b"before", ""),
        (b"", "too_large"),
        (b"behind", ""),
    ]


def test_a_plain_file_may_hold_gzip_and_begin_oddly(tmp_path) -> None:
    given = [b"one", gzip.compress(b"two"), b"three"]
    whole = b"".join(record(i, body) for i, body in enumerate(given))
    for begin, lost in ((b"", 0), (b"\r\n\n", 0), (b"\xef\xbb\xbfjunk\n", 1)):
        found = read(tmp_path, begin + whole, "x.warc")
        assert [r.problem for r in found] == ["damaged"] * lost + [""] * 3
        assert [r.body for r in found][lost:] == given


def test_no_archive_at_all(tmp_path, rng) -> None:
    assert read(tmp_path, b"") == []
    magic, noise = b"\x1f\x8b\x08", rng.randbytes(300_000)
    for data in (magic + bytes(5), b"hello\n" * 9, b"\n" * 99, noise, noise[:999] + magic + noise):
        # what stands before the first magic bytes, and what follows them
        assert [r.problem for r in read(tmp_path, data)] in ([], ["damaged"], ["damaged"] * 2)


@pytest.mark.slow
def test_hostile_members_take_linear_time(tmp_path) -> None:
    """Members within members, all damaged: each would be unpacked to the end of the file."""

    def seconds(n: int) -> float:
        head = b"\x1f\x8b\x08\x00" + bytes(6)
        block = b"\x00" + (16).to_bytes(2, "little") + (0xFFEF).to_bytes(2, "little")
        data = (head + block + b"WARC/1.0\r\n......") * n
        start = time.process_time()
        read(tmp_path, data)
        return time.process_time() - start

    seconds(1000)
    assert seconds(16_000) < 8 * seconds(4000)


def test_real_archives_have_the_records_that_others_find() -> None:
    folder = Path(os.environ.get("LLAMA_REAL_DATA", "")) / "raw/commoncrawl"
    if not folder.is_dir():
        pytest.skip("LLAMA_REAL_DATA names no folder with raw/commoncrawl")
    warcio = pytest.importorskip("warcio.archiveiterator")
    for path in sorted(folder.rglob("*.gz")):
        found = [(r.kind, zlib.crc32(r.body)) for r in records(path, 1 << 26)]
        if ".arc" in path.name or "bad" in path.name:
            assert found and not any(kind == "" for kind, _ in found)
            continue
        with open(path, "rb") as file:
            expected = [
                (r.rec_type, zlib.crc32(r.raw_stream.read()))
                for r in warcio.WARCIterator(file, no_record_parse=True)
            ]
        assert found == expected, path


def test_headers_survive_anything(rng) -> None:
    for _ in range(200):
        found = warc.headers(rng.randbytes(rng.randrange(300)))
        assert all(name == name.lower() for name in found)
