"""Token shards: Megatron's layout to the byte, reading, and every kind of damage."""

import os
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_data import (
    VOCABULARY,
    Documents,
    make_source,
    make_sources,
    make_tokenizer,
    random_documents,
    tree,
)

from llama.cli import UserError
from llama.data import shards
from llama.data.adopt import adopt
from llama.data.indexed import read_index
from llama.data.shards import Source, open_sources
from llama.data.writer import Vocabulary, id_hash, open_tokenizer


def megatron_layout(prefix: Path) -> list[list[np.ndarray]]:
    """Documents as lists of sequences, read by the published layout and by nothing of ours."""
    with open(f"{prefix}.idx", "rb") as file:
        assert file.read(9) == b"MMIDIDX\x00\x00"
        (version,) = struct.unpack("<Q", file.read(8))
        (code,) = struct.unpack("<B", file.read(1))
        sequences, documents = struct.unpack("<QQ", file.read(16))
        lengths = struct.unpack(f"<{sequences}i", file.read(4 * sequences))
        pointers = struct.unpack(f"<{sequences}q", file.read(8 * sequences))
        borders = struct.unpack(f"<{documents}q", file.read(8 * documents))
        assert version == 1 and file.read() == b""
    dtype = {8: np.uint16, 4: np.int32}[code]
    found = []
    data = Path(f"{prefix}.bin").read_bytes()
    for first, end in zip(borders, borders[1:], strict=False):
        found.append(
            [np.frombuffer(data, dtype, lengths[i], pointers[i]) for i in range(first, end)]
        )
    assert sum(lengths) * np.dtype(dtype).itemsize == len(data)
    return found


def in_order(documents: Documents) -> Documents:
    return sorted(documents, key=lambda document: id_hash(document[0]))


@pytest.mark.parametrize("pieces", [32_000, 65_536, 65_537])
@pytest.mark.parametrize("limit", [2**31 - 1, 7])
def test_layout_is_megatrons(rng: random.Random, tmp_path: Path, pieces: int, limit: int) -> None:
    documents = random_documents(rng, "web", 40, pieces=pieces)
    vocabulary = Vocabulary("0" * 64, pieces, 1, 2)
    make_source(tmp_path / "web", [documents], vocabulary, max_sequence=limit)
    found = megatron_layout(tmp_path / "web/train/00000")
    assert len(found) == len(documents)
    for sequences, (_, tokens) in zip(found, in_order(documents), strict=True):
        assert np.concatenate(sequences).tolist() == tokens
        assert [len(s) for s in sequences[:-1]] == [limit] * (len(sequences) - 1)
        assert 0 < len(sequences[-1]) <= limit
        assert sequences[0].dtype == (np.uint16 if pieces <= 65_536 else np.int32)


def test_megatron_core_reads_ours(rng: random.Random, tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset",
        reason="megatron-core is not installed",
        exc_type=ImportError,
    )
    for pieces, limit in ((32_000, 2**31 - 1), (32_000, 7), (100_000, 7)):
        documents = random_documents(rng, "web", 40, pieces=pieces)
        folder = tmp_path / f"{pieces}-{limit}"
        make_source(folder, [documents], Vocabulary("0" * 64, pieces, 1, 2), max_sequence=limit)
        for mmap in (True, False):
            theirs = reader.IndexedDataset(str(folder / "train/00000"), mmap=mmap)
            borders = theirs.document_indices
            assert len(borders) == len(documents) + 1
            for i, (_, tokens) in enumerate(in_order(documents)):
                sequences = [theirs[j] for j in range(borders[i], borders[i + 1])]
                assert np.concatenate(sequences).tolist() == tokens
                assert len(sequences) == -(-len(tokens) // limit)


def test_reads_any_stretch_of_the_concatenation(rng: random.Random, tmp_path: Path) -> None:
    parts = [random_documents(rng, f"web/{k}", rng.choice([1, 2, 30])) for k in range(5)]
    make_source(tmp_path / "web", parts)
    source = Source("web", "train", tmp_path / "web/train")
    whole = [t for part in parts for _, tokens in in_order(part) for t in tokens]
    assert source.n_tokens == len(whole)
    for _ in range(300):
        first = rng.randrange(len(whole) + 1)
        count = rng.randrange(len(whole) - first + 1)
        assert source.read(first, count).tolist() == whole[first : first + count]


def test_windows_share_their_last_token(tmp_path: Path) -> None:
    for tokens, windows in ((2, 0), (8, 0), (9, 1), (16, 1), (17, 2)):
        make_source(tmp_path / f"{tokens}", [[("a", [1] * (tokens - 1) + [2])]])
        source = Source("web", "train", tmp_path / f"{tokens}/train")
        assert source.n_windows(8) == windows
        assert not windows or len(source.read((windows - 1) * 8, 9)) == 9


def test_split_and_place_follow_from_the_id(rng: random.Random, tmp_path: Path) -> None:
    documents = random_documents(rng, "web", 400)
    make_source(tmp_path / "one", [documents], valid_per_10k=2000)
    make_source(tmp_path / "two", [documents[:100], documents[100:]], valid_per_10k=2000)
    held_out = {key for key, _ in documents if id_hash(key) % 10_000 < 2000}
    assert 20 < len(held_out) < 160
    for folder in ("one", "two"):
        for split, keys in (("valid", held_out), ("train", {k for k, _ in documents} - held_out)):
            source = Source("web", split, tmp_path / folder / split)
            found = []
            for k, shard in enumerate(source.shards):
                hashes = np.fromfile(source.path(k, ".hash"), "<u8").tolist()
                assert hashes == sorted(hashes) and len(hashes) == shard.documents
                found += hashes
            assert sorted(found) == sorted(map(id_hash, keys))


def test_one_tokenizer_for_all_sources(rng: random.Random, tmp_path: Path) -> None:
    make_source(tmp_path / "a", [random_documents(rng, "a", 9)])
    make_source(tmp_path / "b", [random_documents(rng, "b", 9)], Vocabulary("1" * 64, 32_000, 1, 2))
    assert set(open_sources(tmp_path, ["a"])) == {"a"}
    with pytest.raises(UserError, match="tokenizer_sha256"):
        open_sources(tmp_path, ["a", "b"])
    with pytest.raises(UserError, match="c/train holds no finished source.*a, b"):
        open_sources(tmp_path, ["a", "c"])
    with pytest.raises(UserError, match="nowhere"):
        open_sources(tmp_path / "nowhere", ["a"])


def test_tokenizer_beside_the_shards_must_be_theirs(rng: random.Random, tmp_path: Path) -> None:
    _, _, vocabulary = open_tokenizer(make_tokenizer(tmp_path))
    make_source(tmp_path / "web", [random_documents(rng, "web", 9, pieces=99)], vocabulary)
    open_sources(tmp_path, ["web"])
    make_tokenizer(tmp_path, pieces=390)
    with pytest.raises(UserError, match="tokenizer.model.* is not the tokenizer"):
        open_sources(tmp_path, ["web"])


def refused(folder: Path, *words: str) -> None:
    """Opening fails with one sentence that holds these words."""
    with pytest.raises(UserError) as caught:
        open_sources(folder, ["web"])
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


@pytest.fixture
def web(rng: random.Random, tmp_path: Path) -> Path:
    make_sources(rng, tmp_path, {"web": 60})
    return tmp_path / "web/train"


def test_wrong_sizes_are_refused_with_name_and_offset(web: Path) -> None:
    path = web / "00001.bin"
    good = path.read_bytes()
    for bad in (good[:-2], good[:-1], good + b"\0", good + b"\0\0", b""):
        path.write_bytes(bad)
        refused(web.parent.parent, str(path), f"byte {len(bad)}", str(len(good)))
    path.unlink()
    refused(web.parent.parent, str(path))


def test_broken_indices_are_refused(web: Path) -> None:
    path = web / "00000.idx"
    good = path.read_bytes()
    cases = {
        good[:20]: "byte 20",
        good[:-8]: f"{len(good) - 8} bytes",
        b"X" + good[1:]: "byte 0",
        good[:17] + b"\x04" + good[18:]: "int32",
        good[:17] + b"\x06" + good[18:]: "dtype code 6",
        b"": "byte 0",
    }
    for bad, word in cases.items():
        path.write_bytes(bad)
        refused(web.parent.parent, str(path), word)
    path.write_bytes((web / "00001.idx").read_bytes())
    refused(web.parent.parent, str(path))


def test_broken_manifests_are_refused(web: Path) -> None:
    path = web / "manifest.json"
    good = path.read_text()
    for bad in (
        good[:-30],
        "[]",
        good.replace('"vocab_size"', '"size"'),
        good.replace('"uint16"', '"float16"'),
        good.replace('"uint16"', '"quux"'),
        good.replace('"tokens":', '"tokens":-', 2),
    ):
        path.write_text(bad)
        refused(web.parent.parent, str(path))


@pytest.mark.parametrize("pieces", [32_000, 100_000])
def test_ids_outside_the_vocabulary_are_refused(
    rng: random.Random, tmp_path: Path, pieces: int
) -> None:
    vocabulary = Vocabulary("0" * 64, pieces, 1, 2)
    make_source(tmp_path / "web", [random_documents(rng, "web", 50)], vocabulary)
    path = tmp_path / "web/train/00000.bin"
    good = np.fromfile(path, vocabulary.dtype)
    for wrong in (pieces, -1) if pieces > 65_536 else (pieces,):
        bad, at = good.copy(), rng.randrange(len(good))
        bad[at] = wrong
        bad.tofile(path)
        byte = at * vocabulary.dtype.itemsize
        refused(tmp_path, str(path), f"token id {wrong}", f"byte {byte} ")


def test_file_that_shrinks_under_a_run_is_an_error_not_a_signal(web: Path) -> None:
    source = Source("web", "train", web)
    path = source.path(2)
    end = source.shards[2].start + source.shards[2].tokens
    assert len(source.read(end - 10, 10)) == 10
    size = path.stat().st_size
    os.truncate(path, size - 6)
    with pytest.raises(UserError, match=f"{path} ends at byte {size - 6}, .* byte {size} "):
        source.read(end - 10, 10)
    assert len(source.read(end - 10, 7)) == 7


def test_check_finds_every_flipped_bit(rng: random.Random, tmp_path: Path) -> None:
    make_sources(rng, tmp_path, {"web": 40, "code": 40}, valid_per_10k=2000)
    n, wrong = shards.check(tmp_path)
    assert n == sum(
        path.suffix in (".bin", ".idx", ".zst", ".hash") for path in tmp_path.rglob("*")
    )
    assert wrong == []
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    for path in [p for p in paths if p.name != "manifest.json"] * 2:
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        _, wrong = shards.check(tmp_path)
        assert len(wrong) == 1 and str(path) in wrong[0], (path, wrong)
        path.write_bytes(good)
    (tmp_path / "web/train/00000.ids.zst").unlink()
    assert any("00000.ids.zst is missing" in line for line in shards.check(tmp_path)[1])


def test_check_finds_shards_made_wrong(rng: random.Random, tmp_path: Path) -> None:
    make_source(tmp_path / "web", [[("a", [1, 5, 2]), ("b", [5, 6, 2])]])
    _, wrong = shards.check(tmp_path)
    assert len(wrong) == 1 and "not between BOS and EOS" in wrong[0]


def test_check_command(rng: random.Random, web: Path) -> None:
    command = [sys.executable, "-m", "llama.data.shards", "check", str(web)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "12 files" in done.stdout
    with open(web / "00001.bin", "r+b") as file:
        file.write(b"\xff")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "00001.bin" in done.stdout
    assert done.stderr.count("\n") == 1 or "check:" in done.stderr


def test_more_shards_than_files_may_be_open(rng: random.Random, tmp_path: Path) -> None:
    """The soft limit is raised; under a hard limit the error names a file."""
    make_source(tmp_path / "web", [random_documents(rng, f"{k}", 2) for k in range(80)])
    code = f"""
import resource
from llama.cli import UserError
from llama.data.shards import open_sources
resource.setrlimit(resource.RLIMIT_NOFILE, (64, HARD))
source = open_sources({str(tmp_path)!r}, ["web"])["web"]
try:
    print(len(source.read(0, source.n_tokens)) == source.n_tokens)
except UserError as error:
    print(error)
"""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit, expected in ((hard, "True"), (64, ".bin")):
        run = [sys.executable, "-c", code.replace("HARD", str(limit))]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        assert expected in done.stdout


# -- adoption --------------------------------------------------------------------------------------


def write_foreign(prefix: Path, documents: list[list[int]], dtype: str, code: int) -> None:
    """A pair of files as Megatron-LM's preprocessing writes it, one sequence per document."""
    lengths = [len(tokens) for tokens in documents]
    tokens = np.array([t for document in documents for t in document], dtype)
    tokens.tofile(f"{prefix}.bin")
    pointers = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, code))
        file.write(struct.pack("<QQ", len(lengths), len(lengths) + 1))
        file.write(np.array(lengths, np.int32).tobytes() + pointers.astype(np.int64).tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4), ("<i8", 5)])
def test_adopted_documents_are_the_same(
    rng: random.Random, tmp_path: Path, dtype: str, code: int
) -> None:
    folder = make_tokenizer(tmp_path / "set/tokenizer")
    pieces = open_tokenizer(folder)[2].vocab_size
    bodies = [[rng.randrange(3, pieces) for _ in range(rng.randrange(1, 40))] for _ in range(200)]
    foreign, added = [], {"bos_added": 0, "eos_added": 0, "empty": 0}
    for body in bodies:
        bos, eos = rng.random() < 0.5, rng.random() < 0.5
        foreign.append([1] * bos + body + [2] * eos)
        added["bos_added"] += not bos
        added["eos_added"] += not eos
    foreign.insert(50, [])
    write_foreign(tmp_path / "old", foreign, dtype, code)
    output = tmp_path / "set/tokens/old"
    counts = adopt(tmp_path / "old", str(folder), output, 1000, shard_tokens=1000)
    assert {key: counts[key] for key in added} == {**added, "empty": 1}
    assert shards.check(output)[1] == []
    assert (output.parent / "tokenizer.model").read_bytes() == (
        folder / "tokenizer.model"
    ).read_bytes()
    found = []
    for split in ("train", "valid"):
        source = Source("old", split, output / split)
        assert source.n_tokens > 0 and source.dtype == np.uint16
        for k in range(len(source.shards)):
            starts = read_index(source.path(k, ".idx")).starts + source.shards[k].start
            for a, b in zip(starts, starts[1:], strict=False):
                found.append(source.read(a, b - a).tolist())
    assert sorted(found) == sorted([1, *body, 2] for body in bodies)
    assert len(Source("old", "train", output / "train").shards) > 2
    with pytest.raises(UserError, match="finished source"):
        adopt(tmp_path / "old", str(folder), output, 10, 1000)


def test_what_cannot_be_adopted_leaves_nothing(rng: random.Random, tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer")
    pieces = open_tokenizer(folder)[2].vocab_size
    prefix, output = tmp_path / "old", tmp_path / "tokens/old"
    good = [[5, 6, 7]] * 100
    cases = []
    bad = [*good, [5, pieces, 7]]
    cases.append((bad, "<i4", 4, f"token id {pieces} at byte {(300 + 1) * 4}"))
    cases.append(([*good, [-1]], "<i4", 4, "token id -1 at byte 1200"))
    cases.append((good, "<f4", 7, "dtype code 7"))
    for documents, dtype, code, word in cases:
        write_foreign(prefix, documents, dtype, code)
        with pytest.raises(UserError, match=word):
            adopt(prefix, str(folder), output, 10, 1000)
    write_foreign(prefix, good, "<u2", 8)
    os.truncate(f"{prefix}.bin", 500)
    with pytest.raises(UserError, match="old.bin has 500 bytes.*600"):
        adopt(prefix, str(folder), output, 10, 1000)
    with pytest.raises(UserError, match="missing.idx"):
        adopt(tmp_path / "missing", str(folder), output, 10, 1000)
    with pytest.raises(UserError, match="tokenizer.model"):
        adopt(prefix, str(tmp_path / "none"), output, 10, 1000)
    assert not (tmp_path / "tokens").exists()


def test_writing_twice_gives_the_same_bytes(rng: random.Random, tmp_path: Path) -> None:
    documents = random_documents(rng, "web", 100)
    make_source(tmp_path / "a/web", [documents], valid_per_10k=1000)
    make_source(tmp_path / "b/web", [documents[::-1]], VOCABULARY, valid_per_10k=1000)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
