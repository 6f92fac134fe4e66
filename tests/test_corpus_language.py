"""Languages: known sentences, what is no language, and what is said before a run starts."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest

from llama.cli import UserError
from llama.corpus.document import Document, Dropped
from llama.corpus.steps import language

TEXTS = {
    "en": "The committee has decided that the report should be published before the summer.",
    "de": "Der Ausschuss hat beschlossen, dass der Bericht vor dem Sommer erscheinen soll.",
    "fr": "Le comité a décidé que le rapport devait être publié avant la fin de l'été.",
    "ru": "Комитет решил, что доклад должен быть опубликован до наступления лета.",
    "ja": "委員会は、報告書を夏までに公表することを決定しました。",
}


def run(texts: list[str], languages=(), min_score=0.5, model="") -> list:
    given = [Document(str(i), text, "crawl", {"url": "u"}) for i, text in enumerate(texts)]
    return list(language.identify(iter(given), list(languages), min_score, model))


def test_languages_are_told_and_others_dropped() -> None:
    pytest.importorskip("py3langid", reason="the extra corpus is not installed")
    found = run(list(TEXTS.values()))
    assert [x.meta["language"] for x in found] == list(TEXTS)
    assert all(0.5 <= x.meta["language_score"] <= 1 and x.meta["url"] == "u" for x in found)
    kept, *others = run(list(TEXTS.values()), ["en"])
    assert kept.meta["language"] == "en" and {x.reason for x in others} == {"language"}
    # the beginning decides
    [found] = run([TEXTS["en"] * 40 + TEXTS["de"] * 900])
    assert found.meta["language"] == "en"


def test_what_is_no_language_is_unsure() -> None:
    pytest.importorskip("py3langid", reason="the extra corpus is not installed")
    odd = ["", " ", "x", "12345 67", "🙂" * 50, "\n", "{}();" * 99, "\ud800", TEXTS["en"] * 90_000]
    *found, long = run(odd, min_score=0.99)
    assert {x.reason for x in found} == {"language_unsure"} and long.meta["language"] == "en"
    assert not any(isinstance(x, Dropped) for x in run(odd, min_score=0.0))


def test_what_is_wrong_is_said_first(tmp_path, monkeypatch) -> None:
    pytest.importorskip("py3langid", reason="the extra corpus is not installed")
    language.check(["en", "de"], 0.5, "")
    with pytest.raises(UserError, match="languages names english"):
        language.check(["en", "english"], 0.5, "")
    with pytest.raises(UserError, match="min_language_score is 2"):
        language.check([], 2, "")
    for module in ("py3langid", "fasttext"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="needs py3langid"):
        language.check([], 0.5, "")
    with pytest.raises(UserError, match="needs fasttext, .* pip install fasttext-predict"):
        language.check([], 0.5, "lid.176.bin")


def test_a_model_that_is_none(tmp_path) -> None:
    pytest.importorskip("fasttext", reason="fasttext-predict is not installed")
    with pytest.raises(UserError, match="lid.bin is no file"):
        language.check([], 0.5, str(tmp_path / "lid.bin"))
    (tmp_path / "lid.bin").write_bytes(b"no model")
    with pytest.raises(UserError, match="lid.bin cannot be loaded"):
        language.check([], 0.5, str(tmp_path / "lid.bin"))


@pytest.mark.parametrize("how", ["crash", "exit"])
def test_a_model_that_ends_its_process_is_refused_in_one_sentence(
    tmp_path, monkeypatch, how
) -> None:
    """A native library that aborts on a damaged file takes a child process with it, not this."""

    def load(path: str) -> None:
        os._exit(3) if how == "exit" else signal.raise_signal(signal.SIGSEGV)

    monkeypatch.setitem(sys.modules, "fasttext", SimpleNamespace(load_model=load))
    (tmp_path / "lid.bin").write_bytes(b"damaged")
    told = {"crash": "SIGSEGV", "exit": "code 3"}[how]
    with pytest.raises(UserError, match=f"lid.bin cannot be loaded: the process .*{told}"):
        language.check(["en"], 0.5, str(tmp_path / "lid.bin"))


def test_fasttext_sees_one_line_and_its_labels_lose_their_prefix(tmp_path, monkeypatch) -> None:
    class Model:
        def predict(self, text: str, k: int = 1) -> tuple:
            assert "\n" not in text
            if k == -1:
                return ("__label__en", "__label__de"), (0.6, 0.4)
            return (("__label__de",), (1.00001,)) if text else ((), ())

    monkeypatch.setitem(sys.modules, "fasttext", SimpleNamespace(load_model=lambda path: Model()))
    path = tmp_path / "lid.bin"
    path.write_bytes(b"")
    language.check(["de"], 0.5, str(path))
    with pytest.raises(UserError, match="languages names ru, which fasttext does not know"):
        language.check(["ru"], 0.5, str(path))
    empty, found = run(["", "erste\nzweite"], model=str(path))
    assert empty.reason == "language_unsure"
    assert found.meta == {"url": "u", "language": "de", "language_score": 1.0}
