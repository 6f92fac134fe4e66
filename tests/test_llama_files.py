"""Atomic files and folders, hashes, strict readers."""

import gzip
import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard

from llama import files
from llama.cli import UserError


def test_sha256_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1_000_000)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


def test_atomic_file_appears_only_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    with pytest.raises(RuntimeError), files.atomic_file(target) as file:
        file.write(b"half")
        assert not target.exists()
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with files.atomic_file(target) as file:
        file.write(b"whole")
    assert target.read_bytes() == b"whole"
    with pytest.raises(RuntimeError), files.atomic_file(target) as file:
        raise RuntimeError
    assert target.read_bytes() == b"whole"


def test_two_threads_may_write_one_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with files.atomic_file(target) as file:
        file.write(b"first")
        other = threading.Thread(target=files.write_atomic, args=(target, b"second"))
        other.start()
        other.join()
        assert target.read_bytes() == b"second"
    assert target.read_bytes() == b"first"


def test_atomic_folder_appears_only_when_whole_and_is_never_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(RuntimeError), files.atomic_folder(target) as part:
        (part / "a").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with files.atomic_folder(target) as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_text("x")
    assert (target / "sub" / "a").read_text() == "x"
    with pytest.raises(UserError, match="exists already"), files.atomic_folder(target):
        pass


def test_killed_writer_leaves_the_old_file(tmp_path: Path, rng) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    code = (
        "import sys\nfrom llama import files\nwhile True:\n"
        "    files.write_atomic(sys.argv[1], b'new' * 500_000)\n"
    )
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code, str(target)])
        time.sleep(0.3 + rng.random())
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert target.read_bytes() in (b"old", b"new" * 500_000)


def _compressed(kind: str, lines: list[bytes]) -> bytes:
    raw = b"".join(line + b"\n" for line in lines)
    half = len(raw) // 2
    if kind == "gz":
        return gzip.compress(raw[:half]) + gzip.compress(raw[half:])
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    return compressor.compress(raw[:half]) + compressor.compress(raw[half:])


@pytest.mark.parametrize("kind", ["zst", "gz"])
def test_truncation_and_flips_never_pass(tmp_path: Path, rng, kind: str) -> None:
    lines = [rng.randbytes(rng.randrange(200)).replace(b"\n", b"") + b"." for _ in range(500)]
    data = _compressed(kind, lines)
    path = tmp_path / f"x.jsonl.{kind}"
    path.write_bytes(data)
    assert list(files.read_lines(path)) == lines
    # a cut at the border of two frames leaves a shorter, valid file: no reader can know
    border = len(_compressed(kind, lines)) - len(_second_frame(kind, lines))
    for _ in range(100):
        cut = rng.randrange(len(data))
        if cut == border:
            continue
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=path.name):
            list(files.read_lines(path))
    silent = 0
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            # some header bits (time, operating system, name) carry no content
            assert list(files.read_lines(path)) == lines
            silent += 1
        except UserError as error:
            assert path.name in str(error)
    assert silent < 20


def _second_frame(kind: str, lines: list[bytes]) -> bytes:
    raw = b"".join(line + b"\n" for line in lines)
    half = raw[len(raw) // 2 :]
    if kind == "gz":
        return gzip.compress(half)
    return zstandard.ZstdCompressor(write_checksum=True).compress(half)


def test_gzip_padding_is_no_member(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"a\nb\n") + bytes(1000))
    assert list(files.read_lines(path)) == [b"a", b"b"]


@pytest.mark.parametrize("name", ["x.jsonl.zst", "x.jsonl.gz", "x.jsonl"])
def test_lines_come_back_and_bytes_are_repeatable(tmp_path: Path, rng, name: str) -> None:
    lines = [rng.randbytes(rng.randrange(3000)).replace(b"\n", b"") for _ in range(300)] + [b"x"]
    written = []
    for attempt in range(2):
        path = tmp_path / str(attempt) / name
        with files.LineWriter(path) as writer:
            for line in lines:
                writer.write(line)
            assert not path.exists()
        written.append(path.read_bytes())
        assert list(files.read_lines(path)) == lines
    assert written[0] == written[1]


def test_last_line_may_lack_its_newline(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a\n\nb")
    assert list(files.read_lines(tmp_path / "x")) == [b"a", b"", b"b"]
    (tmp_path / "x").write_bytes(b"")
    assert list(files.read_lines(tmp_path / "x")) == []


def test_an_empty_compressed_file_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "x.zst").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        list(files.read_lines(tmp_path / "x.zst"))


def test_failed_line_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.LineWriter(tmp_path / "x.zst") as writer:
        writer.write(b"a")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"id": "a"}', "'text'"),
        (b'{"id": 3, "text": "x"}', "'id'"),
        (b'{"id": "a", "text": null}', "'text'"),
    ],
)
def test_bad_documents_are_named_by_file_and_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": "a", "text": "b"}\n' + line + b"\n")
    with pytest.raises(UserError, match=reason) as caught:
        list(files.read_documents(path))
    assert f"{path}:2" in str(caught.value)


def test_yaml_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: 1\nb: {c: 1, c: 2}\n")
    with pytest.raises(UserError, match=r"x.yaml:2 gives the key 'c' twice"):
        files.read_yaml(path)
    path.write_text("- a\n")
    with pytest.raises(UserError, match="holds no keys"):
        files.read_yaml(path)


NESTED = "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghijkl"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"a: &a [x]\n{NESTED}", "x.yaml:6 repeats values without end by its anchors"),
        ("&a\nb: *a\n", "x.yaml:1 repeats values without end"),
        ("a: &a [[*a]]\n", "x.yaml:1 repeats values without end"),
        ("a: " + "[" * 20_000, "x.yaml is nested too deeply"),
        ("[1, 2]: 3\n", "unhashable"),
        ("a: 2020-13-45\n", "x.yaml is not readable YAML: month must be"),
        (f"a: 1{'0' * 5000}\n", "x.yaml is not readable YAML: Exceeds the limit"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
    ids=range(8),
)
def test_yaml_made_to_harm_is_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    """At once: what a few hundred bytes stand for would not fit into any memory."""
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        files.read_yaml(path)
    assert "\n" not in str(caught.value)


def test_anchors_that_people_write_stand_for_their_values(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {é: [1, 2]}\nb: [*a, *a]\nc: &c 1e-4\nd: *c\n", "utf-8")
    read = files.read_yaml(tmp_path / "x.yaml")
    assert read["a"] == {"é": [1, 2]} and read["b"] == [read["a"]] * 2 and read["d"] == read["c"]


def test_json_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing.json cannot be read"):
        files.read_json(tmp_path / "nothing.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="x.json is not valid JSON"):
        files.read_json(tmp_path / "x.json")


def test_a_zstd_window_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    stream = io.BytesIO()
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    with compressor.stream_writer(stream, closefd=False) as writer:
        writer.write(os.urandom(1 << 20))
    (tmp_path / "x.zst").write_bytes(stream.getvalue())
    with pytest.raises(UserError, match="x.zst is damaged"):
        list(files.read_lines(tmp_path / "x.zst"))
