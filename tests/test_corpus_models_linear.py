"""The linear classifier: what it learns, what it must not learn, odd texts, damaged files."""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llama.cli import UserError
from llama.corpus.models import linear
from llama.corpus.models.linear import Linear

ALPHABETS = {"aa": "abcdefghij", "bb": "fghijklmno", "cc": "абвгдежзик"}
ODD = {
    "empty": "",
    "space": " \n\t",
    "one character": "x",
    "digits": "12345 678 90",
    "emoji": "🙂🙃" * 50,
    "code": "{}();[]" * 99,
    "surrogate": "\ud800 abc \udfff",
    "NUL": "a\0b",
    "growing in lower case": "İ" * 3000,
    "one letter a word": "a " * 40_000,
    "mixed scripts": "abc где 漢字 ไทย हिन्दी",
    "line of 10 MB": "abcdefghij" * 1_000_000,
}


def words(rng: random.Random, alphabet: str, n: int) -> str:
    return " ".join("".join(rng.choices(alphabet, k=rng.randrange(2, 9))) for _ in range(n))


def planted(rng: random.Random, n: int) -> tuple[list[str], list[str]]:
    labels = [rng.choice(list(ALPHABETS)) for _ in range(n)]
    return [words(rng, ALPHABETS[label], rng.randrange(1, 30)) for label in labels], labels


def share_right(model: Linear, texts: list[str], labels: list[str]) -> float:
    return sum(model.predict(t)[0] == x for t, x in zip(texts, labels, strict=True)) / len(texts)


@pytest.mark.parametrize("kind", ["characters", "words"])
def test_it_learns_and_its_file_says_the_same(kind, rng, tmp_path) -> None:
    model = linear.fit(*planted(rng, 400), kind)
    texts, labels = planted(rng, 200)
    if kind == "words":
        # words are seen again only if there are few of them
        lexicon = [words(rng, ALPHABETS[x], 50).split() for x in ALPHABETS]
        sample = [rng.randrange(3) for _ in range(300)]
        texts = [" ".join(rng.choices(lexicon[i], k=12)) for i in sample]
        labels = [list(ALPHABETS)[i] for i in sample]
        model = linear.fit(texts[:200], labels[:200], kind)
        texts, labels = texts[200:], labels[200:]
    assert share_right(model, texts, labels) > 0.95
    model.save(tmp_path / "a.npz")
    again = Linear.load(tmp_path / "a.npz")
    assert [again.predict(text) for text in texts] == [model.predict(text) for text in texts]
    assert (again.weights == np.rint(again.weights)).all()
    assert abs(again.weights).max() <= linear.MAX_WEIGHT
    label, score = model.predict(texts[0])
    if kind == "words":
        assert model.probability(texts[0], label) == score


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("kind", ["characters", "words"])
def test_odd_texts_have_a_score(kind, name, rng) -> None:
    model = linear.fit(*planted(rng, 60), kind)
    label, score = model.predict(ODD[name])
    each = [model.probability(ODD[name], x) for x in model.labels]
    assert label in ALPHABETS and math.isfinite(score) and 0 <= score <= 1
    assert sum(each) == pytest.approx(1)
    if name in ("empty", "space", "emoji", "code"):
        assert each == pytest.approx([1 / 3] * 3)
        # no language at all, but nothing known against a page
        assert score == (0 if kind == "characters" else pytest.approx(1 / 3))


def test_a_script_that_was_never_seen_is_no_language(rng) -> None:
    model = linear.fit(*planted(rng, 200), "characters")
    assert model.predict("สวัสดีครับ ประเทศไทย วันนี้อากาศดี")[1] == 0
    alone, mixed = (model.predict(text)[1] for text in ("abc def abc", "abc def abc สวัสดีครับดี"))
    assert mixed == pytest.approx(alone / 2, abs=0.2) and mixed < alone


def test_words_are_not_glued_and_case_does_not_matter() -> None:
    def found(text: str) -> list[int]:
        return sorted(linear.FEATURES["words"](linear.codes(text, "words")).tolist())

    assert found("one two three") == found("One\ntwo\tTHREE.") == found("«one» … two --- three")
    assert found("one\ntwo") != found("onetwo") and len(found("one two three")) == 5
    assert found("one two") != found("two one")
    # a word is the same wherever it stands, far behind as well
    far = found("x " * 4000 + "needle")
    assert set(found("needle")) <= set(far)
    assert found("") == found("...") == []
    letters = linear.codes("Don't 3x", "characters").tolist()
    assert "".join(map(chr, letters)) == " don t x "


def test_every_n_gram_of_characters_counts() -> None:
    """Against a plain loop over all runs of up to four characters."""
    text = " das haus "
    hashes = []
    for order in range(1, linear.ORDER + 1):
        for i in range(len(text) - order + 1):
            h = 0
            for c in text[i : i + order]:
                h = ((h ^ ord(c)) * int(linear._STEP)) % 2**32
            hashes.append(((h * int(linear._SPREAD)) % 2**32) >> (32 - linear.BUCKET_BITS))
    found = linear.FEATURES["characters"](linear.codes("Das, Haus!", "characters"))
    assert sorted(found.tolist()) == sorted(hashes)


def test_the_gradient_is_that_of_logistic_regression(rng) -> None:
    """One step of plain descent, squares too large to change, against finite differences."""
    texts, labels = planted(rng, 5)
    truth = np.array([sorted(ALPHABETS).index(label) for label in labels])
    found = [linear.FEATURES["characters"](linear.codes(text, "characters")) for text in texts]
    weights = np.random.default_rng(rng.randrange(2**32)).normal(size=(1 << 18, 3))
    weights = weights.astype(np.float32)

    def loss(weights) -> float:
        total = 0.0
        for buckets, label in zip(found, truth, strict=True):
            logits = weights[buckets].astype(np.float64).sum(0) / np.sqrt(len(buckets))
            total += np.log(np.exp(logits).sum()) - logits[label]
        return total

    before = weights.copy()
    linear._learn(weights, np.full_like(weights, 1e12), found, truth, 1e6)
    bucket, label = int(found[0][0]), int(truth[0])
    up, down = before.astype(np.float64), before.astype(np.float64)
    up[bucket, label] += 1e-4
    down[bucket, label] -= 1e-4
    slope = (loss(up) - loss(down)) / 2e-4
    assert before[bucket, label] - weights[bucket, label] == pytest.approx(slope, rel=1e-2)
    untouched = np.setdiff1d(np.arange(1 << 18), np.concatenate(found))
    assert (weights[untouched] == before[untouched]).all()


def test_the_same_texts_make_the_same_bytes_with_any_number_of_threads(rng, tmp_path) -> None:
    seed = rng.randrange(2**32)
    code = (
        "import sys, random; sys.path.insert(0, 'tests')\n"
        "from test_corpus_models_linear import planted; from llama.corpus.models import linear\n"
        f"linear.fit(*planted(random.Random({seed}), 100), 'characters').save(sys.argv[1])"
    )
    for threads in ("1", "4"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", code, str(tmp_path / threads)]
        subprocess.run(
            command, check=True, cwd=Path(__file__).parent.parent, env=environment | PATHS
        )
    assert (tmp_path / "1").read_bytes() == (tmp_path / "4").read_bytes()


PATHS = {"PYTHONPATH": str(Path(__file__).parent.parent)}


def test_what_is_no_classifier_is_named(tmp_path, rng) -> None:
    path = tmp_path / "model.npz"
    linear.fit(*planted(rng, 30), "words").save(path)
    whole = path.read_bytes()
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", weights=np.array([{}], dtype=object))
    found = dict(np.load(path))
    np.savez(tmp_path / "narrow.npz", **{**found, "weights": found["weights"][:9]})
    np.savez(tmp_path / "infinite.npz", **{**found, "unit": np.array(np.nan)})
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_bytes(b"no archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    middle = len(whole) // 2
    (tmp_path / "flipped.npz").write_bytes(
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    )
    for bad in tmp_path.glob("*.npz"):
        if bad != path:
            with pytest.raises(UserError, match=f"{bad.name} is no classifier"):
                Linear.load(bad)
    with pytest.raises(UserError, match="missing.npz is no classifier"):
        Linear.load(tmp_path / "missing.npz")
