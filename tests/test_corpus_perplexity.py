"""Pieces and step `grade`: rules of CCNet, buckets, bad input, and what is said before a run."""

import math
import random
import sys
import time
from pathlib import Path

import pytest

from llama import files
from llama.cli import UserError
from llama.corpus.document import Document, Dropped
from llama.corpus.models import pieces
from llama.corpus.models.kneser_ney import KneserNey
from llama.corpus.models.pieces import Pieces, normalise
from llama.corpus.steps import perplexity

WORDS = "the a of river stone house walks sees green old under and mill bridge to says".split()


def text(random_: random.Random, sentences: int = 30) -> str:
    """Words that follow one another in some ways only."""
    found = []
    for _ in range(sentences):
        at = random_.randrange(len(WORDS))
        for _ in range(random_.randrange(4, 12)):
            found.append(WORDS[at])
            at = (at * 3 + random_.randrange(3)) % len(WORDS)
        found[-1] += ".\n"
    return " ".join(found)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    seed = random.randrange(2**32)
    print("seed", seed)
    random_ = random.Random(seed)
    texts = [text(random_) for _ in range(200)]
    figures = pieces.train(texts, folder / "lm/en.model")
    assert figures["documents"] == 200
    cut = Pieces(folder / "lm/en.model")
    KneserNey.fit(map(cut.encode, texts), len(cut)).save(folder / "lm/en.npy")
    score = perplexity.scorer(str(folder), "en")
    assert score
    files.write_json(folder / "cutoffs.json", {"en": perplexity.cutoffs([*map(score, texts)])})
    return folder


def documents(*texts: str, language: str = "en") -> list[Document]:
    return [Document(str(i), t, "web", {"language": language}) for i, t in enumerate(texts)]


@pytest.mark.parametrize(
    "raw, expected",
    [
        ("  Hello World ", "hello world"),
        ("one\ntwo\r\nthree\tfour\u2028five\x85six", "one two  three four five six"),
        ("Ünïcode Čeština Ёлка İstanbul", "unicode cestina елка istanbul"),
        ("2026-11-22 ٣٤ ４ １", "0000-00-00 00 0 0"),
        ("„so“ «da» 「x」 ‐ … — – ’", '"so" "da" "x" ‐ ...  -  - \''),
        ("全。部，都！好？（是）％", "全.部,都!好?(是)%"),
        ("a\x00b\x07c\x7fd\x9fe", "abcde"),
        ("bad \ud800 surrogate", "bad   surrogate"),
        ("", ""),
        ("\n\t ", ""),
    ],
)
def test_normalise(raw: str, expected: str) -> None:
    assert normalise(raw) == expected


def test_normalise_is_done_once_for_all() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    random_ = random.Random(seed)
    for _ in range(200):
        raw = "".join(chr(random_.randrange(0x30000)) for _ in range(50))
        assert normalise(normalise(raw)) == normalise(raw)


def test_pieces_are_the_same_bytes_and_fewer_for_a_short_text(tmp_path: Path) -> None:
    random_ = random.Random(5)
    texts = [text(random_) for _ in range(50)]
    for name in ("a.model", "b.model"):
        figures = pieces.train(texts, tmp_path / name)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert figures["pieces"] <= figures["characters"] // pieces.CHARS_PER_PIECE
    endless = iter(texts)
    assert pieces.train(endless, tmp_path / "c.model", max_chars=3000)["characters"] < 7000
    assert list(endless)


def test_runs_hold_everything_and_end_at_spaces(models: Path) -> None:
    line = normalise(text(random.Random(6), 300))
    assert "".join(pieces._runs(line, 100)) == line
    assert all(run.startswith(" ") for run in list(pieces._runs(line, 100))[1:])
    assert list(pieces._runs("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]
    assert list(pieces._runs(" " * 25, 10))[0] == " " * 9
    cut = Pieces(models / "lm/en.model")
    assert cut.encode(line) == cut._processor.encode(line)
    assert "".join(cut.encode(line, str)).replace("▁", " ").split() == line.split()


def test_fluent_text_is_head_and_shuffled_words_are_tail(models: Path) -> None:
    random_ = random.Random(random.randrange(2**32))
    fluent = text(random_)
    words = fluent.split()
    random_.shuffle(words)
    found = list(perplexity.grade(iter(documents(fluent, " ".join(words))), str(models), []))
    assert [d.meta["bucket"] for d in found][1] == "tail"
    assert found[0].meta["perplexity"] < found[1].meta["perplexity"] / 2
    assert found[0].meta["perplexity"] == round(found[0].meta["perplexity"], 1)
    [dropped] = perplexity.grade(iter(documents(" ".join(words))), str(models), ["head", "middle"])
    assert isinstance(dropped, Dropped) and dropped.reason == "tail"
    # as the report reads it
    assert dropped.detail == f"perplexity {found[1].meta['perplexity']} in en"


def test_perplexity_is_that_of_the_model(models: Path) -> None:
    cut, model = Pieces(models / "lm/en.model"), KneserNey.load(models / "lm/en.npy")
    sample = text(random.Random(8))
    ids = cut.encode(sample)
    [found] = perplexity.grade(iter(documents(sample)), str(models), [])
    assert found.meta["perplexity"] == round(10 ** (-model.score(ids) / (len(ids) + 1)), 1)


def test_a_document_without_a_model_is_kept_as_all(models: Path) -> None:
    for language in ("xx", "", "../lm/en", "en/../en", "*"):
        [found] = perplexity.grade(
            iter(documents("some text", language=language)), str(models), ["head", "all"]
        )
        assert found.meta == {"language": language, "bucket": "all"}
    [dropped] = perplexity.grade(iter(documents("t", language="xx")), str(models), ["head"])
    assert dropped.reason == "all"
    [found] = perplexity.grade(iter([Document("0", "text", "web", {})]), str(models), [])
    assert found.meta == {"bucket": "all"}


@pytest.mark.parametrize(
    "raw",
    [
        *("", "a", " \n", "7", "\ud800", "\x00", "عربي"),
        *("1234567890 " * 50, "😀" * 300, "for (;;) {x[i]+=1;}\n" * 40, "漢字" * 200),
        *("x" * 300_000, "the " * 100_000),
    ],
)
def test_every_text_has_a_perplexity(models: Path, raw: str) -> None:
    [found] = perplexity.grade(iter(documents(raw)), str(models), [])
    assert 1 <= found.meta["perplexity"] < math.inf


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["x", "the river ", "漢", "7 "])
def test_a_line_of_10_mb_takes_linear_time(models: Path, unit: str) -> None:
    score = perplexity.scorer(str(models), "en")
    assert score
    times = []
    for size in (2_500_000, 10_000_000):
        line = unit * (size // len(unit))
        begin = time.process_time()
        assert 1 <= score(line) < math.inf
        times.append(time.process_time() - begin)
    assert times[1] / times[0] < 8, times


def test_cutoffs_are_percentiles() -> None:
    assert perplexity.cutoffs([float(i) for i in range(101)]) == {"head": 30.0, "middle": 60.0}
    limits = {"head": 30.0, "middle": 60.0}
    buckets = [perplexity.bucket(x, limits) for x in (29.9, 30.0, 59.9, 60.0)]
    assert buckets == ["head", "middle", "middle", "tail"]
    assert perplexity.bucket(5, None) == "all"


def test_what_is_missing_is_said_before_the_run(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perplexity.check(str(models), ["head", "all"], ["en", "xx"])
    with pytest.raises(UserError, match="'heads'"):
        perplexity.check(str(models), ["heads"])
    with pytest.raises(UserError, match="nowhere"):
        perplexity.check(str(tmp_path / "nowhere"), [])

    def folder(name: str) -> Path:
        (tmp_path / name / "lm").mkdir(parents=True)
        return tmp_path / name

    with pytest.raises(UserError, match="no language model"):
        perplexity.check(str(folder("a")), [])
    b = folder("b")
    (b / "lm/en.model").write_bytes((models / "lm/en.model").read_bytes())
    with pytest.raises(UserError, match="cutoffs.json"):
        perplexity.check(str(b), [])
    for content in ('{"en": {"head": 3}}', "[]", '{"en": 4}', "{"):
        c = folder(f"c{hash(content)}")
        (c / "lm/en.model").touch()
        (c / "cutoffs.json").write_text(content)
        with pytest.raises(UserError, match="cutoffs.json"):
            perplexity.check(str(c), [])
    d = folder("d")
    (d / "cutoffs.json").write_text("{}")
    (d / "lm/en.npy").write_bytes((models / "lm/en.npy").read_bytes())
    with pytest.raises(UserError, match="en.model"):
        perplexity.check(str(d), [])
    (d / "lm/en.model").write_bytes(b"\x00not a model")
    with pytest.raises(UserError, match="en.model"):
        perplexity.check(str(d), [])
    e = folder("e")
    (e / "cutoffs.json").write_text("{}")
    (e / "en.arpa.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(UserError, match="pip install kenlm"):
        perplexity.check(str(e), [])


def test_other_pieces_than_the_model_was_made_of(models: Path, tmp_path: Path) -> None:
    pieces.train(["quite another text with other words " * 30], tmp_path / "lm/en.model")
    (tmp_path / "lm/en.npy").write_bytes((models / "lm/en.npy").read_bytes())
    with pytest.raises(UserError, match="en.npy is of"):
        perplexity.scorer(str(tmp_path), "en")


def test_models_of_ccnet_are_read_through_kenlm(models: Path, tmp_path: Path) -> None:
    """Pieces as words; the score of what kenlm says of them, OOV and all."""
    kenlm = pytest.importorskip("kenlm")
    (tmp_path / "en.sp.model").write_bytes((models / "lm/en.model").read_bytes())
    (tmp_path / "en.arpa.bin").write_text(
        "\\data\\\nngram 1=5\nngram 2=1\n\n\\1-grams:\n-2\t<unk>\t0\n0\t<s>\t-0.3\n-1\t</s>\t0\n"
        "-0.5\t▁the\t-0.2\n-0.9\t▁river\t0\n\n\\2-grams:\n-0.1\t▁the ▁river\n\n\\end\\\n"
    )
    files.write_json(tmp_path / "cutoffs.json", {"en": {"head": 2, "middle": 50}})
    perplexity.check(str(tmp_path), [])
    cut = Pieces(tmp_path / "en.sp.model")
    model = kenlm.Model(str(tmp_path / "en.arpa.bin"))
    for raw in ("The river", "the old 漢 river", ""):
        words = cut.encode(raw, str)
        [found] = perplexity.grade(iter(documents(raw)), str(tmp_path), [])
        expected = 10 ** (-model.score(" ".join(words)) / (len(words) + 1))
        assert found.meta["perplexity"] == round(expected, 1)
    # what kenlm quotes of a damaged file need not be UTF-8
    (tmp_path / "fr.arpa.bin").write_bytes(b"\\data\\\nngram 1=\xff\xfe\n\n\\1-grams:\n\xff\n")
    (tmp_path / "fr.sp.model").write_bytes((models / "lm/en.model").read_bytes())
    with pytest.raises(UserError, match="fr.arpa.bin"):
        perplexity.check(str(tmp_path), [], ["fr"])
    (tmp_path / "de.arpa.bin").write_bytes(b"\x00\x01")
    (tmp_path / "de.sp.model").write_bytes((models / "lm/en.model").read_bytes())
    with pytest.raises(UserError, match="de.arpa.bin"):
        perplexity.check(str(tmp_path), [])
