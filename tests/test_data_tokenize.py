"""Documents to shards: exact, the same bytes however it was run or killed, and bad input told."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import orjson
import pytest
from made_data import document, make_documents, make_tokenizer, text, tree, write_documents
from made_kills import kill_again_and_again

from llama import files
from llama.cli import UserError
from llama.corpus import pool
from llama.corpus.journal import only_one
from llama.data import shards
from llama.data.indexed import read_index
from llama.data.shards import Source
from llama.data.tokenize import main
from llama.data.writer import id_hash
from tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("made") / "tokenizer")


@pytest.fixture
def run(tmp_path: Path, tokenizer: Path) -> Callable[..., Path]:
    """Tokenise tmp_path/documents with options; returns the output folder."""

    def call(output: str = "tokens", **options: object) -> Path:
        given = {"workers": 1, "valid_per_10k": 1000, "shard_tokens": 500, **options}
        main(arguments(tmp_path, tokenizer, output, given))
        return tmp_path / output

    return call


def arguments(
    folder: Path, tokenizer: Path, output: str, options: Mapping[str, object]
) -> list[str]:
    args = ["--input", str(folder / "documents"), "--tokenizer", str(tokenizer)]
    args += ["--output", str(folder / output)]
    for key, value in options.items():
        args += [f"--{key}", str(value)]
    return args


def read_back(folder: Path, split: str) -> dict[str, list[int]]:
    """Tokens of every document of a split, by id, in the order of the shards."""
    source, found = Source(folder.name, split, folder / split), {}
    for k, shard in enumerate(source.shards):
        starts = read_index(source.path(k, ".idx")).starts.tolist()
        ids = [orjson.loads(line) for line in files.read_lines(source.path(k, ".ids.zst"))]
        assert len(ids) == len(starts) - 1 == shard.documents
        assert [id_hash(key) for key in ids] == sorted(map(id_hash, ids))
        for key, a, b in zip(ids, starts, starts[1:], strict=False):
            assert key not in found
            found[key] = source.read(shard.start + a, b - a).tolist()
    return found


def test_every_document_comes_back(
    rng: random.Random,
    tmp_path: Path,
    tokenizer: Path,
    run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_documents(rng, tmp_path / "documents", "web", 4, 60)
    make_documents(rng, tmp_path / "documents", "books", 2, 30)
    write_documents(
        tmp_path / "documents/books/odd.jsonl",
        [
            document("line\nbreak \U0001f600", "</s><s> \t\r\n\0 é 中 " + "x" * 5000),
            document("▁", "a▁b"),
        ],
    )
    output = run()
    model = Tokenizer(tokenizer / "tokenizer.model")
    table = capsys.readouterr().out
    for name in ("web", "books"):
        given = {}
        for path in (tmp_path / "documents" / name).iterdir():
            for line in files.read_lines(path):
                given[json.loads(line)["id"]] = json.loads(line)["text"]
        train, valid = read_back(output / name, "train"), read_back(output / name, "valid")
        assert {**train, **valid}.keys() == given.keys() and not train.keys() & valid.keys()
        for key, tokens in {**train, **valid}.items():
            assert tokens == [1, *model.encode(given[key]), 2]
            assert model.decode(tokens[1:-1]) == given[key].replace("▁", " ")
            assert (key in valid) == (id_hash(key) % 10_000 < 1000)
        row = next(line.split() for line in table.splitlines() if line.startswith(name))
        every = [*train.values(), *valid.values()]
        size = sum(len(t.encode()) for t in given.values()) / sum(len(t) - 2 for t in every)
        count = sum(map(len, train.values()))
        assert row == [name, f"{len(train):,}", f"{count:,}", f"{size:.2f}", f"{len(valid):,}"]
    assert len(Source("web", "train", output / "web/train").shards) > 1
    assert shards.check(output)[1] == []
    assert files.sha256(output / "tokenizer.model") == model.sha256


def test_any_number_of_workers_gives_the_same_bytes(
    rng: random.Random, tmp_path: Path, run: Callable[..., Path]
) -> None:
    make_documents(rng, tmp_path / "documents", "web", 7, 20)
    make_documents(rng, tmp_path / "documents", "code", 3, 20)
    one = tree(run("one"))
    assert tree(run("three", workers=3)) == one
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*.bin")}
    assert tree(run("one", workers=2)) == one
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert not any("journal" in name or ".part" in name for name in one)
    if find_spec("datatrove"):
        assert tree(run("cluster", workers=2, executor="datatrove")) == one


def duplicated(rng: random.Random, folder: Path) -> None:
    """Three units whose later ones repeat ids of the first."""
    for k in range(3):
        documents = [document(f"{k}/{i}", text(rng, 20)) for i in range(30)]
        documents += [document("0/3", "another text"), document("0/7", "and another")][:k]
        write_documents(folder / f"documents/web/{k}.jsonl", documents)


def in_this_process(work, jobs, workers):  # type: ignore[no-untyped-def]
    """In place of the pool, whose workers would not die at the points that are counted here."""
    while jobs:
        job = jobs.popleft()
        yield job, work(job, lambda place: None)


def killed_at(point: int, args: list[str]) -> bool:
    """Run in a child that dies without a word at its n-th fsync or rename; False if it ended."""
    child = os.fork()
    if child == 0:
        left = point
        os.close(1)
        os.close(2)

        def dying(call: Callable[..., None]) -> Callable[..., None]:
            def wrapped(*args: object) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(137)
                call(*args)

            return wrapped

        os.rename, os.fsync = dying(os.rename), dying(os.fsync)  # type: ignore[assignment]
        try:
            main(args)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_rename_and_fsync(
    rng: random.Random,
    tmp_path: Path,
    tokenizer: Path,
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    stride: int,
) -> None:
    """Dies at a point, goes on, and has the bytes of a run that was left alone."""
    monkeypatch.setattr(pool, "answers", in_this_process)
    duplicated(rng, tmp_path)
    expected = tree(run("whole", shard_tokens=100, skip_limit=0.5))
    options = {"workers": 1, "valid_per_10k": 1000, "shard_tokens": 100, "skip_limit": 0.5}
    args, points = arguments(tmp_path, tokenizer, "tokens", options), rng.randrange(stride)
    while killed_at(points, args):
        manifests = {p for p in (tmp_path / "tokens").rglob("manifest.json")}
        assert len(manifests) <= 2 and all(orjson.loads(p.read_bytes()) for p in manifests)
        if points % 3 == 0:  # a second death on the way, then to the end
            killed_at(rng.randrange(60), args)
        main(args)
        assert tree(tmp_path / "tokens") == expected, points
        shutil.rmtree(tmp_path / "tokens")
        points += stride
    assert tree(tmp_path / "tokens") == expected
    print(f"{points} points")
    assert points > 60


@pytest.mark.slow
def test_kill_9_at_random_moments(rng: random.Random, tmp_path: Path, tokenizer: Path) -> None:
    make_documents(rng, tmp_path / "documents", "web", 24, 150)
    options: dict[str, object] = {"workers": 2, "shard_tokens": 1000}

    def start(output: str) -> subprocess.Popen[bytes]:
        args = arguments(tmp_path, tokenizer, output, options)
        command = [sys.executable, "-m", "llama.data.tokenize", *args]
        return subprocess.Popen(command, stdout=-3, stderr=-3, start_new_session=True)

    assert start("whole").wait() == 0
    tokens, whole = tmp_path / "tokens", tmp_path / "whole"
    kill_again_and_again(lambda: start("tokens"), tokens, whole, rng, 6)
    assert start("tokens").wait() == 0
    assert tree(tokens) == tree(whole)


BAD_LINES: list[tuple[bytes, str]] = [
    (b"{not json", "not JSON"),
    (b"", "not JSON"),
    (b'{"id": "a", "text": "\\ud800"}', "not JSON"),
    (b"[1, 2]", "not an object"),
    (b'{"text": "no id"}', "no id"),
    (b'{"id": 7, "text": "number as id"}', "no id"),
    (b'{"id": "b"}', "no text"),
    (b'{"id": "c", "text": ""}', "no text"),
    (b'{"id": "d", "text": null}', "no text"),
    (b'{"id": "good/0", "text": "the same id"}', "duplicate id"),
]


def test_bad_documents_are_counted_listed_and_limited(
    rng: random.Random,
    tmp_path: Path,
    run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = [document(f"good/{i}", text(rng, 10)) for i in range(190)]
    lines: list[object] = [*good, *(line for line, _ in BAD_LINES)]
    write_documents(tmp_path / "documents/web/0.jsonl", lines)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"web: 10 of 200 documents skipped.*0.jsonl:191.*0.01"):
        run()
    assert not list((tmp_path / "tokens").rglob("manifest.json"))
    output = run(skip_limit=0.05)
    kept = {**read_back(output / "web", "train"), **read_back(output / "web", "valid")}
    assert kept.keys() == {each["id"] for each in good}
    listed = [orjson.loads(line) for line in (output / "web/skipped.jsonl").open("rb")]
    assert [(x["line"], x["reason"]) for x in listed] == [
        (191 + i, reason) for i, (_, reason) in enumerate(BAD_LINES)
    ]
    manifest = files.read_json(output / "web/train/manifest.json")
    assert manifest["read"] == 200
    assert manifest["skipped"] == {
        reason: sum(r == reason for _, r in BAD_LINES) for _, reason in BAD_LINES
    }
    assert "10 of 200" in capsys.readouterr().err


def test_ids_repeated_across_units_keep_the_first(
    rng: random.Random, tmp_path: Path, tokenizer: Path, run: Callable[..., Path]
) -> None:
    duplicated(rng, tmp_path)
    output = run(shard_tokens=100, skip_limit=0.5, workers=2)
    kept = {**read_back(output / "web", "train"), **read_back(output / "web", "valid")}
    assert len(kept) == 90
    model = Tokenizer(tokenizer / "tokenizer.model")
    assert "another" not in model.decode(kept["0/3"]) + model.decode(kept["0/7"])
    listed = [orjson.loads(line) for line in (output / "web/skipped.jsonl").open("rb")]
    assert [(x["file"], x["line"]) for x in listed] == [
        ("1.jsonl", 31),
        ("2.jsonl", 31),
        ("2.jsonl", 32),
    ]
    assert shards.check(output)[1] == []


def test_changed_options_tokenizer_or_input_are_refused(
    rng: random.Random, tmp_path: Path, tokenizer: Path, run: Callable[..., Path]
) -> None:
    make_documents(rng, tmp_path / "documents", "web", 3, 30)
    before = tree(run())
    for options, word in (({"valid_per_10k": 7}, "valid_per_10k 1000, not 7"),):
        with pytest.raises(UserError, match=word):
            run(**options)
    with pytest.raises(UserError, match="shard_tokens 500, not 4000"):
        run(shard_tokens="4K")
    with pytest.raises(UserError, match="another tokenizer"):
        run(tokenizer=make_tokenizer(tmp_path / "other", pieces=390))
    # the same size and other bytes; then the old ones again, as if the folder had been copied
    path = sorted((tmp_path / "documents/web").iterdir())[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    with pytest.raises(UserError, match=f"begun with other bytes in {path} .1 such"):
        run()
    path.write_bytes(content)
    assert tree(run()) == before
    make_documents(rng, tmp_path / "documents", "books", 2, 30)
    output = run()
    assert {n: b for n, b in tree(output).items() if not n.startswith("books")} == before
    write_documents(tmp_path / "documents/web/more.jsonl", [document("x", "y")])
    with pytest.raises(UserError, match="web was begun with other input files"):
        run()
    assert {n: b for n, b in tree(output).items() if not n.startswith("books")} == before


def test_truncated_input_is_refused_by_name(
    rng: random.Random, tmp_path: Path, run: Callable[..., Path]
) -> None:
    path = tmp_path / "documents/web/0.jsonl.zst"
    write_documents(path, [document(f"{i}", text(rng, 50)) for i in range(200)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="0.jsonl.zst"):
        run()
    assert not list((tmp_path / "tokens").rglob("*.bin"))
    with pytest.raises(UserError, match="0.jsonl.zst"):
        run(workers=2)
    assert not list((tmp_path / "tokens").rglob("*.part*"))


def test_missing_or_empty_input(tmp_path: Path, tokenizer: Path, run: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="documents is no folder"):
        run()
    (tmp_path / "documents").mkdir()
    with pytest.raises(UserError, match="no folder of documents"):
        run()
    (tmp_path / "documents/web").mkdir()
    with pytest.raises(UserError, match="documents/web holds no"):
        run()
    write_documents(tmp_path / "documents/web/0.jsonl", [])
    with pytest.raises(UserError, match="web: its 0 documents leave none"):
        run()
    with pytest.raises(UserError, match="nowhere/tokenizer.model is missing"):
        run(tokenizer="nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="tokenizer.model"):
        run("other", tokenizer=tmp_path)
    assert not (tmp_path / "other").exists()
    for key, value in (
        ("workers", 0),
        ("valid_per_10k", 10_000),
        ("skip_limit", 1.5),
        ("shard_tokens", 0),
    ):
        with pytest.raises(UserError, match=f"{key} is {value}"):
            run("other", **{key: value})


def test_two_at_once_are_refused(
    rng: random.Random, tmp_path: Path, run: Callable[..., Path]
) -> None:
    make_documents(rng, tmp_path / "documents", "web", 1, 10)
    with only_one(tmp_path / "tokens"):
        with pytest.raises(UserError, match="another run"):
            run()
    run()


def test_full_disk_is_told_and_leaves_no_part(
    rng: random.Random, tmp_path: Path, tokenizer: Path
) -> None:
    """Stood in for by a limit on the size of a file."""
    make_documents(rng, tmp_path / "documents", "web", 2, 200)
    for workers in (1, 2):
        args = arguments(tmp_path, tokenizer, "tokens", {"workers": workers, "shard_tokens": 100})
        command = [sys.executable, "-m", "llama.data.tokenize", *args]
        limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (9000, -1)); "
        run = f"import os; os.execv({sys.executable!r}, {command!r})"
        done = subprocess.run([sys.executable, "-c", limit + run], capture_output=True, text=True)
        assert done.returncode == 2 and "File too large" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert not list((tmp_path / "tokens").rglob("*.part-*"))
        assert not list((tmp_path / "tokens").rglob("manifest.json"))
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert shards.check(tmp_path / "tokens")[1] == []


def test_a_worker_that_dies_is_told(
    rng: random.Random, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its death ends the command with one sentence; the next run goes on from there."""
    make_documents(rng, tmp_path / "documents", "web", 4, 10)
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing, os, sys\n"
        "if '--multiprocessing-fork' in sys.argv:\n"
        "    os._exit(9)\n"
    )
    args = arguments(tmp_path, tokenizer, "tokens", {"workers": 2, "shard_tokens": 100})
    command = [sys.executable, "-m", "llama.data.tokenize", *args]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "a worker ended with code 9" in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.delenv("PYTHONPATH")
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert shards.check(tmp_path / "tokens")[1] == []
