"""Bounded reading: lines, whole files, compressed files that are cut or explode, and text."""

import gzip
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import zstandard

from llama.corpus import raw


def compress(suffix: str, data: bytes) -> bytes:
    return gzip.compress(data) if suffix == ".gz" else zstandard.compress(data)


def test_lines_equal_split_at_any_chunking(rng):
    for _ in range(300):
        data = bytes(rng.choices(b"ab\n\r\xff", k=rng.randrange(60)))
        cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(6)))
        chunks = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        limit = rng.randrange(12)
        expected = data.split(b"\n")
        expected = expected if expected[-1] else expected[:-1]
        found = list(raw.lines(chunks, limit))
        assert found == [(e if len(e) <= limit else None, len(e)) for e in expected]


def test_whole_is_capped():
    assert raw.whole([b"abc", b"de"], 5) == b"abcde"
    assert raw.whole([b"abc", b"de"], 4) is None


@pytest.mark.parametrize("suffix", [".gz", ".zst", ""])
def test_chunks_read_every_member_and_range(tmp_path, suffix, rng):
    parts = [rng.randbytes(rng.randrange(5000)) * rng.randrange(1, 4) for _ in range(5)]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"".join(compress(suffix, p) if suffix else p for p in parts))
    assert b"".join(raw.chunks(path)) == b"".join(parts)
    if not suffix:
        data = b"".join(parts)
        begin, size = rng.randrange(len(data)), rng.randrange(len(data))
        assert b"".join(raw.chunks(path, begin, size)) == data[begin : begin + size]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncation_and_garbage_are_errors(tmp_path, suffix, rng):
    packed = compress(suffix, rng.randbytes(3000) + b"text " * 3000)
    path = tmp_path / f"x{suffix}"
    for _ in range(40):
        path.write_bytes(packed[: rng.randrange(len(packed))])
        with pytest.raises((EOFError, zlib.error, zstandard.ZstdError)):
            list(raw.chunks(path))
    path.write_bytes(b"this is no compressed file")
    with pytest.raises((zlib.error, zstandard.ZstdError)):
        list(raw.chunks(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_refused_in_little_memory(tmp_path, suffix):
    path = tmp_path / f"bomb{suffix}"
    if suffix == ".gz":
        packer = zlib.compressobj(9, wbits=31)
        with open(path, "wb") as file:
            for _ in range(600):
                file.write(packer.compress(bytes(1 << 20)))
            file.write(packer.flush())
    else:
        with open(path, "wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
            for _ in range(600):
                stream.write(bytes(1 << 20))
    code = (
        "import resource, sys; from llama.corpus import raw\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    [0 for _ in raw.lines(raw.chunks(sys.argv[1]), 1 << 20)]\n"
        "except ValueError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told, grown_mib = done.stdout.splitlines()
    assert "bomb" in told
    # macOS counts bytes, Linux kB
    assert int(grown_mib) < 256 * (1024 if sys.platform == "darwin" else 1)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("Grüße".encode(), ("Grüße", "utf-8")),
        ("Grüße".encode("utf-8-sig"), ("Grüße", "utf-8")),
        (b"\xff\xfe" + "Grüße".encode("utf-16-le"), ("Grüße", "utf-16")),
        (b"\xfe\xff" + "Grüße".encode("utf-16-be"), ("Grüße", "utf-16")),
        ("Grüße “so”".encode("windows-1252"), ("Grüße “so”", "windows-1252")),
        (b"caf\xe9 \x81", ("café \x81", "latin-1")),
        ("Привет, мир ".encode() * 5 + b"\xff", None),
        (b"", ("", "utf-8")),
    ],
)
def test_decode(data, expected):
    if expected is None:
        expected = ("Привет, мир " * 5 + "\ufffd", "utf-8 with damaged bytes")
    assert raw.decode(data) == expected


def test_decode_by_name_and_what_is_no_text(rng):
    assert raw.decode("日本".encode("shift_jis"), "shift_jis") == ("日本", "shift_jis")
    with pytest.raises(UnicodeDecodeError):
        raw.decode(b"\xff\xff\xff", "ascii")
    with pytest.raises(raw.Binary):
        raw.decode(b"PK\x03\x04\x00\x00")
    noise = bytes(rng.choices(range(1, 256), k=5000))
    with pytest.raises(raw.Binary):
        raw.decode(b"x" + noise)


def test_decode_never_fails_otherwise_and_gives_valid_unicode(rng):
    for _ in range(3000):
        pool = rng.choice([range(256), range(32, 256), b"abc \n\xc3\xa9\xe9\xff\xfe\xef\xbb\xbf"])
        data = bytes(rng.choices(pool, k=rng.randrange(40)))
        try:
            text, _ = raw.decode(data)
        except (raw.Binary, UnicodeDecodeError):
            assert (
                b"\0" in data
                or data[:2] in (b"\xff\xfe", b"\xfe\xff", b"\xef\xbb")
                or any(byte < 32 for byte in data)
            )
        else:
            text.encode()


def test_the_corpus_imports_no_torch():
    code = (
        "import pkgutil, importlib, sys, llama.corpus as c\n"
        "names = [m.name for m in pkgutil.walk_packages(c.__path__, 'llama.corpus.')]\n"
        "[importlib.import_module(n) for n in names]\n"
        "assert len(names) > 5 and 'torch' not in sys.modules, names"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
