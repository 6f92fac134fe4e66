"""Training the tokenizer: what it samples, what it makes, and what it refuses."""

import hashlib
import random
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import orjson
import pytest
import sentencepiece
import yaml

from llama import cli, files
from llama.cli import UserError
from tokenizer import train as module
from tokenizer.tokenizer import Tokenizer
from tokenizer.train import Sample, balance, main, sample, train, training_lines

ROOT = Path(__file__).parent.parent
STDLIB = Path(sysconfig.get_paths()["stdlib"])
PROSE = (STDLIB / "pydoc_data" / "topics.py").read_text(encoding="utf-8")[:200_000]
CODE = "".join((STDLIB / name).read_text() for name in ("ast.py", "cmd.py", "csv.py"))[:90_000]


def write(path: Path, documents: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.LineWriter(path) as writer:
        for document in documents:
            writer.write(orjson.dumps(document))


def parts(text: str, source: str, size: int, **meta: str) -> list[dict[str, Any]]:
    """A text as many documents."""
    starts = range(0, len(text), size)
    return [
        {"id": f"{source}-{i}", "text": text[i : i + size], "source": source, "meta": meta}
        for i in starts
    ]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    prose = parts(PROSE, "prose", 2000, lang="en")
    write(folder / "prose" / "0.jsonl.zst", prose[::2])
    write(folder / "prose" / "sub" / "1.jsonl.gz", prose[1::2])
    write(folder / "code" / "0.jsonl.zst", parts(CODE, "code", 3000, language="python"))
    return folder


def mixture(path: Path, weights: dict[str, float]) -> Path:
    path.write_text(yaml.safe_dump(weights))
    return path


def arguments(documents: Path, output: Path, **options: object) -> list[str]:
    given = {"input": documents, "output": output, "vocab_size": 600, **options}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def test_a_tokenizer_is_made_the_same_each_time(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = mixture(tmp_path / "mixture.yaml", {"prose": 0.25, "code": 0.75})
    out = tmp_path / "set" / "tokenizer"
    main(arguments(documents, out, mixture=weights))
    printed = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "tokenizer.model"]
    assert not [p for p in out.parent.iterdir() if p != out]

    tokenizer, manifest = Tokenizer(out / "tokenizer.model"), files.read_json(out / "manifest.json")
    assert tokenizer.vocab_size == manifest["vocab_size"] == 600
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert manifest["sha256"] == files.sha256(out / "tokenizer.model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    for name, text, language in (("prose", PROSE, "en"), ("code", CODE, "python")):
        source = manifest["sources"][name]
        tokens = sum(
            len(model.encode(d["text"])) for d in parts(text, name, 2000 + 1000 * (name == "code"))
        )
        value = len(text.encode()) / tokens
        assert source["bytes_per_token"] == {language: pytest.approx(value)}
        assert f"{name:<6}  {language:<8}  {value:11.2f}" in printed
        assert source["passes"] * source["bytes"] == pytest.approx(
            source["weight"] * (len(PROSE.encode()) + len(CODE.encode())), rel=1e-3
        )

    # another process has other hashes, addresses and thread timings
    again = tmp_path / "again"
    command = [sys.executable, "-m", "tokenizer.train"]
    subprocess.run(command + arguments(documents, again, mixture=weights), check=True, cwd=ROOT)
    for name in ("tokenizer.model", "manifest.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_the_same_command_again_finds_it_and_another_is_refused(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tokenizer"
    main(arguments(documents, out))
    first = capsys.readouterr().out
    before = (out / "tokenizer.model").stat()
    main(arguments(documents, out))
    second = capsys.readouterr().out
    assert (out / "tokenizer.model").stat().st_mtime_ns == before.st_mtime_ns
    assert "is there already" in second and second.split("\n", 1)[1] in first
    with pytest.raises(UserError, match="other options or documents"):
        main(arguments(documents, out, vocab_size=601))
    write(documents / "code" / "more.jsonl.zst", parts(PROSE, "more", 5000))
    with pytest.raises(UserError, match="other options or documents"):
        main(arguments(documents, out))


def test_pieces_are_the_paper_s(documents: Path, tmp_path: Path) -> None:
    main(arguments(documents, tmp_path / "out", vocab_size=2000))
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(2000) if not model.is_byte(i)]
    assert sum(model.is_byte(i) for i in range(2000)) == 256
    assert not [p for p in pieces if "\n" in p]
    assert not [p for p in pieces if len(p) > 1 and any(c.isdigit() for c in p)]
    assert any(p.count("\u2581") == len(p) > 1 for p in pieces), "runs of spaces"
    assert not [p for p in pieces if "\u2581" in p[1:] and set(p) != {"\u2581"}]
    ids = model.encode("x\n\n  12 é\u4e00ﬁ")
    assert model.decode(ids) == "x\n\n  12 é\u4e00ﬁ", "nothing is normalised"


def brute_force(
    documents: list[dict[str, Any]], source: str, budget: float, seed: int
) -> list[str]:
    taken, size = [], 0
    for document in sorted(documents, key=lambda d: module._hash(seed, source, d["id"])):
        if size >= budget:
            break
        taken.append(document["text"])
        size += len(document["text"].encode())
    return taken


def test_a_sample_depends_on_ids_alone(tmp_path: Path, rng: random.Random) -> None:
    documents = [
        {"id": f"d{i}", "text": rng.choice("aé") * rng.randrange(1, 200), "meta": {}}
        for i in range(300)
    ]
    total = sum(len(d["text"].encode()) for d in documents)
    for trial in range(12):
        rng.shuffle(documents)
        n_files, seed = rng.randrange(1, 6), rng.randrange(3)
        budget = rng.choice((1, total / 10, total / 3.5, total, 2 * total))
        paths = [tmp_path / str(trial) / f"{rng.random()}.jsonl.zst" for _ in range(n_files)]
        for i, path in enumerate(paths):
            write(path, documents[i::n_files])
        with cli.Progress("read") as progress:
            if n_files == 1 or budget >= total / 4:
                got = sample(paths, "s", budget, seed, progress)
                expected = brute_force(documents, "s", budget, seed)
                assert [text for text, _ in got.documents] == expected
                assert got.bytes == sum(len(text.encode()) for text in expected)


def test_a_source_far_larger_than_its_share_is_not_read_whole(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.jsonl.zst" for i in range(50)]
    for path in paths:
        write(
            path, [{"id": f"{path}-{i}", "text": f"{path.name} {i}".ljust(100)} for i in range(10)]
        )
    with cli.Progress("read") as progress:
        got = sample(paths, "s", 2000, 0, progress)
        again = sample([Path(str(p)) for p in reversed(paths)], "s", 2000, 0, progress)
    assert got.files_read == module.READ_TIMES * 2000 // 1000
    assert got.bytes == 2000 and got.documents == again.documents


def test_passes_give_each_source_its_share(rng: random.Random) -> None:
    sizes = {name: rng.randrange(10, 400) for name in "abc"}
    samples = {n: Sample([("x" * 100, "-")] * k, 100 * k) for n, k in sizes.items()}
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    for asked in (10**9, 5_000):
        total = min(asked, 100 * sum(sizes.values()))
        balance(samples, weights, asked)
        for name, s in samples.items():
            got = sum(len(text) for text in s.texts())
            assert 0 <= got - total * weights[name] < 100 + 1e-6


def test_long_lines_are_cut_and_nothing_is_lost(rng: random.Random) -> None:
    for _ in range(500):
        alphabet = rng.choice(("ab ", "é  ", "abé中👩 \n", "ab\u2585 \n", "中", "\n \t\r\0a"))
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(0, 400)))
        limit = rng.choice((16, 17, 50, 1000))
        lines, cut = training_lines(text, limit)
        assert all(line and "\n" not in line and "\u2585" not in line for line in lines)
        assert all(len(line.encode()) <= limit for line in lines)
        kept = text.replace("\u2585", "\n")
        assert "".join("".join(lines).split()) == "".join(kept.split())
        assert cut == text.count("\u2585") + sum(
            len(line.encode()) > limit for line in kept.split("\n")
        )
        if not cut:
            assert lines == [line for line in kept.split("\n") if line]
        elif all(len(word.encode()) < limit for word in kept.split(" ")) and "\n" not in kept:
            assert " ".join(lines).rstrip() == kept.rstrip(), (
                "cut at spaces, and those are left out"
            )


def test_the_trainer_skips_none_of_our_lines(tmp_path: Path) -> None:
    # each word is in the text only in a line the trainer by itself would leave out
    words = {"zyxwvu": "zyxwvu " * 400, "qponml": "a\u2585 qponml" * 300, "tsrqpo": "tsrqpo" * 300}
    lines = [line for text in words.values() for line in training_lines(text, 1000)[0]]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(lines, 300, 1.0, 1000))
    tokenizer = Tokenizer(path)
    assert all(len(tokenizer.encode(word)) <= 2 for word in words)


def test_a_vocabulary_that_does_not_fit_names_the_one_that_does(rng: random.Random) -> None:
    lines = ["".join(rng.choice("abcd é") for _ in range(rng.randrange(1, 30))) for _ in range(40)]
    with pytest.raises(UserError, match="100000 is too large for this text: (\\d+) is") as error:
        train(lines, 100_000, 1.0, 4192)
    largest = int(str(error.value).split("text: ")[1].split()[0])
    assert train(lines, largest, 1.0, 4192)
    with pytest.raises(UserError, match=f"{largest + 1} is too large for this text: {largest} is"):
        train(lines, largest + 1, 1.0, 4192)
    least = 259 + len(set("".join(lines)) | {" "})
    with pytest.raises(UserError, match=f"{least - 1} is too small .* takes {least}"):
        train(lines, least - 1, 1.0, 4192)
    assert train(lines, least, 1.0, 4192)


def test_what_lies_beside_the_documents_is_not_read(documents: Path, tmp_path: Path) -> None:
    (documents / "code" / "journal.jsonl").write_text("{}\n")
    (documents / "code" / "stats.json").write_text("{}")
    write(documents / "code" / "quarantine.jsonl.zst", [{"error": "bad"}])
    (documents / "notes.txt").write_text("not a source")
    main(arguments(documents, tmp_path / "out"))
    manifest = files.read_json(tmp_path / "out" / "manifest.json")
    assert {name: s["files"] for name, s in manifest["sources"].items()} == {"code": 1, "prose": 2}


def test_the_shipped_configuration_is_the_paper_s(documents: Path, tmp_path: Path) -> None:
    shipped = ROOT / "configs" / "tokenizer.yaml"
    places = ["--input", str(documents), "--output", str(tmp_path)]
    args, plain = module.parse(["--config", str(shipped), *places]), module.parse(places)
    for name in files.read_yaml(shipped):
        assert getattr(args, name) == getattr(plain, name), name
    assert args.vocab_size == 32_000 and args.character_coverage == 0.9999


def break_truncate(folder: Path) -> None:
    path = folder / "code" / "0.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-20])


def break_line(folder: Path) -> None:
    write(folder / "code" / "1.jsonl", [{"id": "a", "text": "b"}, {"id": "a"}])


def break_empty_source(folder: Path) -> None:
    (folder / "empty").mkdir()


def break_no_text(folder: Path) -> None:
    write(folder / "blank" / "0.jsonl.zst", [{"id": "a", "text": ""}])


BROKEN = {
    "truncated": (break_truncate, {}, "code/0.jsonl.zst"),
    "no text": (break_line, {}, "code/1.jsonl:2"),
    "empty source": (break_empty_source, {}, "source empty has no documents"),
    "blank source": (break_no_text, {}, "source blank holds no text"),
    "sum": (None, {"mixture": {"code": 0.5, "prose": 0.4}}, "sum to 0.9"),
    "source": (None, {"mixture": {"code": 0.5, "wiki": 0.5}}, "source wiki has no documents"),
    "no mixture": (None, {"mixture": "none.yaml"}, "none.yaml"),
    "no input": (None, {"input": "nowhere"}, "nowhere"),
    "vocabulary": (None, {"vocab_size": "200"}, "vocab_size is 200"),
    "negative": (None, {"vocab_size": "-5"}, "vocab_size is -5"),
    "word": (None, {"vocab_size": "many"}, "many"),
    "too large": (None, {"vocab_size": "2M"}, "the largest that fits"),
    "coverage": (None, {"character_coverage": "99.99"}, "character_coverage is 99.99"),
    "nothing": (None, {"sample_bytes": "0"}, "sample_bytes is 0"),
    "line": (None, {"max_line_bytes": "1"}, "max_line_bytes is 1"),
    "unknown": (None, {"vocabsize": "600"}, "did you mean vocab_size"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    name: str, documents: Path, tmp_path: Path
) -> None:
    spoil, options, sentence = BROKEN[name]
    if spoil:
        spoil(documents)
    if isinstance(options.get("mixture"), dict):
        options = {"mixture": mixture(tmp_path / "mixture.yaml", options["mixture"])}
    out = tmp_path / "made" / "tokenizer"
    with pytest.raises(UserError) as error:
        main(arguments(documents, out, **options))
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_an_empty_input_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no folder of documents"):
        main(arguments(tmp_path, tmp_path / "out"))


def test_exit_code_2_and_a_readable_help(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tokenizer.train"]
    bad = subprocess.run(
        command + arguments(tmp_path / "none", tmp_path / "out"),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert bad.returncode == 2 and bad.stderr.startswith("error: --input")
    assert bad.stderr.count("\n") == 1
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0
    for option in ("--config", "--input", "--mixture", "--output", "--vocab_size"):
        assert option in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())


def test_sources_are_told_apart_by_name(rng: random.Random) -> None:
    ids = [hashlib.sha256(bytes([rng.randrange(256)])).hexdigest() for _ in range(50)]
    orders = {
        tuple(sorted(ids, key=lambda i: module._hash(seed, source, i)))  # noqa: B023
        for seed in (0, 1)
        for source in ("a", "b")
    }
    assert len(orders) == 4
