"""Archives and dumps made to harm, through every reader that takes such a file.

Each is refused, or costs itself with a reason: no reader hangs, dies, fills the memory or writes
beside its own output. Readers run in a child process with a deadline, which a hang would meet.
"""

import bz2
import gzip
import io
import random
import re
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from made_data import tree

from llama.corpus import guard, raw
from llama.corpus.document import Document, Dropped
from llama.corpus.plan import Plan
from llama.corpus.pool import Died, Failed
from llama.corpus.sources import arxiv, c4, commoncrawl, github, plain, stackexchange, wikipedia

DEADLINE_S = 60.0
# of a child beside what it has: one bomb would take a hundred times as much
MEMORY_BYTES = 1 << 30
# where anybody may write: an archive that escapes leaves a file there
ESCAPED = f"{tempfile.gettempdir()}/escaped-{random.SystemRandom().randrange(2**32)}"
TEX = b"\\documentclass{article}\\begin{document}\\section{A} words\\end{document}"


def tar(*members: tuple[tarfile.TarInfo | str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for info, data in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = info.size or len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def special(kind: bytes, name: str, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def with_size(size: int) -> bytes:
    """A member that claims this size, also a negative one (CVE-2025-8194)."""
    info = tarfile.TarInfo("a.tex")
    info.size = max(size, 0)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        header[124:136] = b"\xff" + size.to_bytes(11, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def tars() -> dict[str, bytes]:
    outside = "../" * 9 + ESCAPED.lstrip("/") + ".tex"
    many = [(f"{i}.tex", b"x") for i in range(20_000)]
    names = {
        "up": tar((outside, TEX)),
        "absolute": tar((f"{ESCAPED}.tex", TEX)),
        "links": tar(
            special(tarfile.SYMTYPE, "away", "/tmp"),
            ("away/escaped.tex", TEX),
            special(tarfile.LNKTYPE, "passwd.tex", "/etc/passwd"),
            special(tarfile.SYMTYPE, "loop.tex", "loop.tex"),
        ),
        "special": tar(
            special(tarfile.FIFOTYPE, "pipe.tex"),
            special(tarfile.CHRTYPE, "zero.tex"),
            special(tarfile.BLKTYPE, "disk.tex"),
        ),
        "negative": with_size(-512),
        "far": with_size(8**11 - 1),
        "many": tar(*many),
        "nested": tar(("in.tar", tar(("in.tar", tar(("in.tar", tar(("a.tex", TEX)))))))),
        "odd names": tar(("a\nb.tex", TEX), ("c\udcff.tex", TEX), ("x" * 5000 + ".tex", TEX)),
        "cut": tar(("main.tex", TEX * 999))[:2000],
        "no member": bytes(10240),
    }
    names["many nested"] = tar(*((f"{i}.tar", tar((f"{i}.tex", b"x"))) for i in range(1000)))
    return names


def zips() -> dict[str, bytes]:
    def packed(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            for name, data in members:
                archive.writestr(name, data)
        return out.getvalue()

    good = packed(("a.txt", b"words " * 99), ("b.py", b"x = 1\n" * 99))
    lying = bytearray(packed(("a.txt", bytes(1 << 20))))
    # both headers say that the member has ten bytes
    for signature, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        place = lying.index(signature) + at
        lying[place : place + 4] = struct.pack("<I", 10)
    overlapping = bytearray(packed(("a.txt", b"words " * 99), ("b.txt", b"other " * 99)))
    second = overlapping.rindex(b"PK\1\2")
    overlapping[second + 42 : second + 46] = struct.pack("<I", 0)
    return {
        "up": packed((f"../../..{ESCAPED}.txt", b"words"), (f"{ESCAPED}.txt", b"words")),
        "bomb": packed(("a.txt", bytes(64 << 20))),
        "lying": bytes(lying),
        "overlapping": bytes(overlapping),
        "cut": good[:-30],
        "many": packed(*((f"{i}.txt", b"x") for i in range(5000))),
        "encodings": packed(("a\nb.txt", b"words"), ("\u202etxt.exe.txt", b"words")),
        "nested": packed(("in.zip", packed(("in.zip", good)))),
    }


def seven(*members: tuple[str, bytes], name: str = "", **options: str) -> bytes:
    """A .7z; its one member may get another name of the same length, which no packer takes."""
    py7zr = pytest.importorskip("py7zr")
    out = io.BytesIO()
    with py7zr.SevenZipFile(out, "w", **options) as archive:
        archive.set_encoded_header_mode(False)
        for member, data in members:
            archive.writef(io.BytesIO(data), member)
    packed = out.getvalue()
    if not name:
        return packed
    assert len(name) == len(members[0][0])
    renamed = packed.replace(members[0][0].encode("utf-16le"), name.encode("utf-16le"))
    return seven_head(renamed[32:], *struct.unpack("<QQ", packed[12:28]))


def seven_head(data: bytes, at: int = 0, size: int | None = None) -> bytes:
    """Packed bytes and the list of members in them, with sums that are right."""
    listed = data[at:] if size is None else data[at : at + size]
    start = struct.pack("<QQL", at, len(listed) if size is None else size, zlib.crc32(listed))
    return b"7z\xbc\xaf\x27\x1c\0\4" + struct.pack("<L", zlib.crc32(start)) + start + data


def sevens() -> dict[str, bytes]:
    posts = b'<posts><row Id="1" PostTypeId="1" Body="words" /></posts>'
    up, many = f"../../../..{ESCAPED}/Posts.xml", b"\xff" + struct.pack("<Q", 2**62)
    linked = io.BytesIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.importorskip("py7zr").SevenZipFile(linked, "w") as archive,
    ):
        link = Path(folder) / "link"
        link.symlink_to("/etc/passwd")
        archive.write(link, "Posts.xml")
    good = seven(("Posts.xml", posts), ("Users.xml", b"x" * 99))
    streams = b"\1\x04\x06\0\xff" + struct.pack("<Q", 10**9) + b"\x09" + bytes(50)
    return {
        "up": seven((up.replace("..", "aa"), posts), name=up),
        "link": linked.getvalue(),
        "bomb": seven(("Posts.xml", bytes(17 << 20))),
        "bomb before": seven(("Users.xml", bytes(17 << 20)), ("Posts.xml", posts)),
        "locked": seven(("Posts.xml", posts), password="x"),
        "cut": good[: len(good) // 2],
        "head only": good[:32],
        "far": seven_head(b"", 2**62, 2**62),
        "members": seven_head(b"\1\5" + many + b"\0\0"),
        "streams": seven_head(streams),
        "deep": seven_head(b"\x17" * 1000),
    }


def bombs() -> dict[str, bytes]:
    """Of one stream; four times what the test allows."""
    size = 64 << 20
    return {
        "gz": gzip.compress(bytes(size)),
        "zst": zstandard.ZstdCompressor().compress(bytes(size)),
        "bz2": bz2.compress(bytes(size)),
        # a window of 2 GiB is asked for in the frame's head
        "window.zst": b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(64),
    }


XML = {
    "laughs": b'<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">'
    + b"".join(b'<!ENTITY %c "%s">' % (c + 1, b"&%c;" % c * 10) for c in range(ord("b"), ord("l")))
    + b"]>",
    "outside": b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
}


def _items(name: str, plan: Callable[[], Plan]) -> tuple[list[str], list[str], str]:
    """(text of every document, reasons of what was dropped, how the reader failed)."""
    made = plan()
    texts, reasons = [], []
    try:
        for unit in made.units:
            for piece in unit.pieces:
                for item in made.read(piece):
                    if isinstance(item, Document):
                        texts.append(item.text)
                        item.text.encode()
                    elif isinstance(item, Dropped):
                        reasons.append(item.reason)
    except (ValueError, EOFError, OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        return texts, reasons, f"{type(error).__name__}: {error}"
    except Exception as error:
        # the engine quarantines the rest of any piece whose reader raises
        return texts, reasons, f"{type(error).__name__}: {error}"
    return texts, reasons, ""


def _cases(folder: Path) -> Iterator[tuple[str, Callable[[], Plan]]]:
    """Every hostile file in a folder of its own, and the readers that would take it."""

    def put(kind: str, name: str, data: bytes) -> Path:
        path = folder / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    for name, data in tars().items():
        for packing, packed in ((".tar", data), (".tar.gz", gzip.compress(data))):
            path = put(f"github {name}{packing}", f"r{packing}", packed)
            options = github.Options(source="s")
            yield f"github {name}{packing}", lambda o=options, p=path: github.plan(o, [p.parent])
        path = put(f"arxiv {name}", "2301.00001.gz", gzip.compress(data))
        yield f"arxiv {name}", lambda p=path: arxiv.plan(arxiv.Options(), [p.parent])
        path = put(f"bulk {name}", "arXiv_src_2301_001.tar", data)
        yield f"arxiv bulk {name}", lambda p=path: arxiv.plan(arxiv.Options(), [p.parent])
    for name, data in zips().items():
        path = put(f"plain {name}", "x.zip", data)
        yield f"plain {name}", lambda p=path: plain.plan(plain.Options(source="s"), [p.parent])
        path = put(f"github zip {name}", "r.zip", data)
        options = github.Options(source="s")
        yield f"github zip {name}", lambda o=options, p=path: github.plan(o, [p.parent])
    for name, data in sevens().items():
        path = put(f"seven {name}", "a.stackexchange.com.7z", data)
        yield (
            f"refused seven {name}",
            lambda p=path: stackexchange.plan(stackexchange.Options(), [p.parent]),
        )
    for name, data in bombs().items():
        suffix = name.rpartition(".")[2]
        if suffix != "bz2":
            path = put(f"plain bomb {name}", f"x.jsonl.{suffix}", data)
            yield (
                f"plain bomb {name}",
                lambda p=path: plain.plan(plain.Options(source="s"), [p.parent]),
            )
            path = put(f"posts bomb {name}", f"a.stackexchange.com/Posts.xml.{suffix}", data)
            yield (
                f"posts bomb {name}",
                lambda p=path: stackexchange.plan(stackexchange.Options(), [p.parent]),
            )
        if suffix == "gz":
            path = put(f"c4 bomb {name}", "c4-train.00000-of-01024.json.gz", data)
            yield f"c4 bomb {name}", lambda p=path: c4.plan(c4.Options(), [p.parent])
            path = put(f"arxiv bomb {name}", "2301.00001.gz", data)
            yield f"arxiv bomb {name}", lambda p=path: arxiv.plan(arxiv.Options(), [p.parent])
            path = put(f"warc bomb {name}", "x.warc.gz", data)
            yield (
                f"warc bomb {name}",
                lambda p=path: commoncrawl.plan(commoncrawl.Options(), [p.parent]),
            )
        if suffix in ("bz2", "gz"):
            path = put(f"wiki bomb {name}", f"enwiki-latest-pages-articles.xml.{suffix}", data)
            yield (
                f"wiki bomb {name}",
                lambda p=path: wikipedia.plan(wikipedia.Options(), [p.parent]),
            )
    for name, head in XML.items():
        body = "&l;" if name == "laughs" else "&x;"
        page = f"<page><title>a</title><ns>0</ns><id>1</id><text>w {body} w</text></page>"
        path = put(f"wiki {name}", "enwiki-latest-pages-articles.xml", head + page.encode())
        yield f"wiki {name}", lambda p=path: wikipedia.plan(wikipedia.Options(), [p.parent])
        row = f'<posts><row Id="1" PostTypeId="1" Body="w {body} w" /></posts>'
        path = put(f"posts {name}", "a.stackexchange.com/Posts.xml", head + row.encode())
        yield (
            f"posts {name}",
            lambda p=path: stackexchange.plan(stackexchange.Options(), [p.parent]),
        )


@pytest.mark.slow
@pytest.mark.faults
def test_hostile_archives_cost_themselves(
    tmp_path: Path, monkeypatch, rng: random.Random, scale, score
) -> None:
    # as small as the bombs: a file of real size has a limit in proportion
    monkeypatch.setattr(raw, "RATIO_FLOOR_BYTES", 1 << 24)
    every = list(_cases(tmp_path / "in"))
    # a part of them in `make test`, with what has once hung a reader
    hung = [case for case in every if re.search("absolute|negative|seven", case[0])]
    cases = scale(hung + rng.sample(every, 15), every)
    before = tree(tmp_path / "in")
    answers = guard.each(lambda case: _items(*case), cases, DEADLINE_S, memory_bytes=MEMORY_BYTES)
    wrong = []
    for (name, _), answer in zip(cases, answers, strict=True):
        if isinstance(answer, Died | Failed):
            wrong.append(f"{name}: {answer}")
            continue
        texts, reasons, failed = answer
        said = " ".join([*reasons, failed])
        if ("bomb" in name or "refused" in name) and not (failed or reasons):
            wrong.append(f"{name}: taken whole")
        if any("root:" in text or "ha" * 99 in text for text in texts):
            wrong.append(f"{name}: read what lies outside, or expanded: {said}")
    escaped = list(Path(ESCAPED).parent.glob(f"{Path(ESCAPED).name}*"))
    score("hostile", len(cases), ">= 80")
    score("hostile.harm", len(wrong) + len(escaped), "0")
    assert not wrong and not escaped
    assert tree(tmp_path / "in") == before
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.full
@pytest.mark.faults
def test_damaged_archives_never_crash_a_reader(
    tmp_path: Path, rng: random.Random, scale, score
) -> None:
    """Good archives with flipped bits, cut, or with a stretch from elsewhere."""
    good = [case for case in tars().items() if case[0] in ("up", "links", "nested", "odd names")]
    cases = []
    for number in range(scale(100, 1000)):
        _, data = rng.choice(good)
        bad = bytearray(data)
        for _ in range(rng.randrange(1, 9)):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.3:
            del bad[rng.randrange(len(bad)) :]
        path = tmp_path / str(number) / "r.tar"
        path.parent.mkdir()
        path.write_bytes(bad)
        options = github.Options(source="s")
        cases.append(("github", lambda o=options, p=path: github.plan(o, [p.parent])))
        path = tmp_path / f"{number} a" / "2301.00001.gz"
        path.parent.mkdir()
        path.write_bytes(gzip.compress(bad))
        cases.append(("arxiv", lambda p=path: arxiv.plan(arxiv.Options(), [p.parent])))
    answers = guard.each(lambda case: _items(*case), cases, DEADLINE_S, memory_bytes=MEMORY_BYTES)
    wrong = [answer for answer in answers if isinstance(answer, Died | Failed)]
    score("hostile", len(cases), ">= 80")
    score("hostile.harm", len(wrong), "0")
    assert not wrong
