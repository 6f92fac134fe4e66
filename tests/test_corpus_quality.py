"""Recipe `quality`: each drop reason, what is wrong said first, the same in one pass or two."""

import gzip
import math
import shutil
from pathlib import Path

import orjson
import pytest
from test_corpus_models_linear import ODD, words
from test_corpus_models_train import text
from test_corpus_warc import record

from llama.cli import UserError
from llama.corpus import engine, shuffle
from llama.corpus.document import Document, Dropped
from llama.corpus.executors import Executor
from llama.corpus.models import linear, pieces
from llama.corpus.models.kneser_ney import KneserNey
from llama.corpus.sources import commoncrawl, quality
from llama.corpus.steps import language, perplexity, references
from llama.files import LineWriter, read_documents, read_json, write_json


@pytest.fixture
def lexicons(rng) -> dict[str, list[str]]:
    letters = {"good": "abcdefghij", "dull": "abcdefghij", "ru": "абвгдежзик"}
    return {name: words(rng, alphabet, 200).split() for name, alphabet in letters.items()}


@pytest.fixture
def models(tmp_path, lexicons, rng) -> Path:
    """References and fluent text have the words `good`; what is in between is of both."""
    folder = tmp_path / "models"
    good, dull = ([text(rng, lexicons[name], 60) for _ in range(80)] for name in ("good", "dull"))
    labels = [references.LABEL] * 80 + ["others"] * 80
    linear.fit([*good, *dull], labels, "words").save(folder / references.FILE)
    russian = [text(rng, lexicons["ru"], 60) for _ in range(80)]
    linear.fit([*good, *russian], ["en"] * 80 + ["ru"] * 80, "characters").save(
        folder / "language.npz"
    )
    pieces.train(good, folder / "lm/en.model")
    cut = pieces.Pieces(folder / "lm/en.model")
    KneserNey.fit(map(cut.encode, good), len(cut)).save(folder / "lm/en.npy")
    score = perplexity.scorer(str(folder), "en")
    assert score
    some = sorted(score(text(rng, lexicons["good"], 60)) for _ in range(20))
    write_json(folder / "cutoffs.json", {"en": {"head": some[10], "middle": some[-1] * 1.05}})
    write_json(folder / "models.json", {"plan": "a"})
    yield folder
    for cached in (references.classifier, perplexity.scorer, language.identifier):
        getattr(cached, "cache_clear", lambda: None)()


def crawl(folder: Path, many: list[Document]) -> Path:
    with LineWriter(folder / "00000.jsonl.zst") as out:
        for each in many:
            out.write(orjson.dumps(each._asdict()))
    return folder


def run(chosen: quality.Options, given: Path, out: Path) -> tuple[dict[str, dict], dict]:
    summary = shuffle.pipeline(
        quality.plan(chosen, [given]), quality.steps(chosen), out, Executor(1)
    )
    found = {d["id"]: d for p in sorted(out.glob("0*.zst")) for d in read_documents(p)}
    return found, summary.total


def test_buckets_and_references(models, lexicons, rng, tmp_path) -> None:
    good = [text(rng, lexicons["good"], 60) for _ in range(20)]
    dull = [text(rng, lexicons["dull"], 60) for _ in range(20)]
    many = [Document(f"g{i}", t, "c", {"language": "en", "url": "u"}) for i, t in enumerate(good)]
    many += [Document(f"d{i}", t, "c", {"language": "en"}) for i, t in enumerate(dull)]
    many += [Document(f"g-ru{i}", t, "c", {"language": "ru"}) for i, t in enumerate(good)]
    many += [Document(f"d-ru{i}", t, "c", {"language": "ru"}) for i, t in enumerate(dull)]
    given = crawl(tmp_path / "crawl", many)
    # what else a run leaves there is no input
    (given / "journal.jsonl").write_text("{}\n")
    (given / "dropped").mkdir()
    shutil.copy(given / "00000.jsonl.zst", given / "dropped/00000.zst")
    shutil.copy(given / "00000.jsonl.zst", given / "quarantine.jsonl.zst")
    chosen = quality.Options("commoncrawl", str(models))
    found, total = run(chosen, given, tmp_path / "out")
    assert total["documents"]["in"] == 80
    assert all(id.startswith("g") for id in found) and len(found) > 30
    assert total["dropped"]["tail"] >= 18 and total["dropped"]["not_reference"] >= 18
    assert {d["meta"]["bucket"] for d in found.values() if "ru" in d["id"]} == {"all"}
    for each in found.values():
        assert each["meta"]["reference_score"] >= 0.25 and each["source"] == "commoncrawl"
        if each["meta"]["language"] == "en":
            assert each["meta"]["url"] == "u" and each["meta"]["perplexity"] > 1
            assert each["meta"]["bucket"] in ("head", "middle")
    # nothing is asked of the classifier, and all buckets stay
    chosen = quality.Options("c", str(models), buckets=[], min_reference_score=0)
    found, total = run(chosen, given, tmp_path / "all")
    assert len(found) == 80 and {d["meta"]["bucket"] for d in found.values()} >= {"tail", "all"}
    assert not any("reference_score" in d["meta"] for d in found.values())
    chosen = quality.Options("c", str(models), buckets=["tail"], min_reference_score=0)
    found, total = run(chosen, given, tmp_path / "tail")
    assert total["dropped"]["all"] == 40 and {"head", "middle"} & {*total["dropped"]}


def test_odd_pages_have_scores(models) -> None:
    many = [Document(str(i), t, "c", {"language": "en"}) for i, t in enumerate(ODD.values())]
    chosen = quality.Options("c", str(models), buckets=[], min_reference_score=0.001)
    grade, judge = quality.steps(chosen)
    graded = list(grade(iter(many)))
    assert len(graded) == len(many)
    for each in judge(iter(graded)):
        if not isinstance(each, Dropped):
            assert math.isfinite(each.meta["perplexity"]) and each.meta["perplexity"] > 0
            assert math.isfinite(each.meta["reference_score"])


def test_the_place_of_models_is_no_matter_but_other_models_are(models, lexicons, tmp_path) -> None:
    page = Document("1", " ".join(lexicons["good"]), "c", {"language": "ru"})
    given = crawl(tmp_path / "crawl", [page])
    run(quality.Options("c", str(models)), given, tmp_path / "out")
    before = read_json(tmp_path / "out" / engine.STATS)
    shutil.copytree(models, tmp_path / "elsewhere")
    run(quality.Options("c", str(tmp_path / "elsewhere")), given, tmp_path / "out")
    assert read_json(tmp_path / "out" / engine.STATS) == before
    write_json(tmp_path / "elsewhere/models.json", {"plan": "b"})
    with pytest.raises(UserError, match="another plan: options.models"):
        run(quality.Options("c", str(tmp_path / "elsewhere")), given, tmp_path / "out")


def test_what_is_wrong_is_said_first(models, tmp_path) -> None:
    def told(match: str, **options) -> None:
        with pytest.raises(UserError, match=match):
            quality.plan(quality.Options("c", **{"models": str(models), **options}), [tmp_path])

    told("models is empty", models="")
    told("nowhere (is no folder|holds no)", models=str(tmp_path / "nowhere"))
    told("min_reference_score is 2, expected 0 to 1", min_reference_score=2)
    told("'best', expected some of head", buckets=["best"])
    linear.fit(["a", "b"], ["en", "ru"], "words").save(tmp_path / "other/references.npz")
    shutil.copytree(models, tmp_path / "less", ignore=lambda *_: [references.FILE])
    told("references.npz is no file: min_reference_score 0 does", models=str(tmp_path / "less"))
    shutil.copy(tmp_path / "other/references.npz", tmp_path / "less")
    references.classifier.cache_clear()
    told("tells en, ru, not references", models=str(tmp_path / "less"))
    (tmp_path / "less/references.npz").write_bytes(b"no model")
    references.classifier.cache_clear()
    told("references.npz is no classifier", models=str(tmp_path / "less"))
    with pytest.raises(UserError, match="reads what lies below --input"):
        quality.plan(quality.Options("c", str(models)), [])
    for bad in ("xx.npz", str(models / "cutoffs.npz")):
        with pytest.raises(UserError, match=f"{Path(bad).name} is no file"):
            language.check([], 0.5, bad)
    language.check(["en", "ru"], 0.5, str(models / "language.npz"))
    with pytest.raises(UserError, match="names de, which .*language.npz does not know"):
        language.check(["de"], 0.5, str(models / "language.npz"))


def test_one_pass_is_the_same_as_two(models, lexicons, rng, tmp_path) -> None:
    """The crawl cleaned with models, beside one cleaned without and graded afterwards."""
    names = ["good", "dull", "ru"]
    pages = [text(rng, lexicons[names[i % 3]], 90) for i in range(30)]
    parts = [record(i, f"Title\n{page}".encode(), "conversion") for i, page in enumerate(pages)]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.warc.wet.gz").write_bytes(gzip.compress(b"".join(parts)))
    made = {}
    for name, graded in (("one", {"models": str(models)}), ("two", {})):
        chosen = commoncrawl.Options(
            "c", "llama1", ["en"], language_model=str(models / "language.npz"), **graded
        )
        plan, out = commoncrawl.plan(chosen, [tmp_path / "raw"]), tmp_path / name
        shuffle.pipeline(plan, commoncrawl.steps(chosen), out, Executor(1), 1.0)
        made[name] = {d["id"]: d for p in out.glob("0*.zst") for d in read_documents(p)}
    assert len(made["two"]) == 20 and 5 < len(made["one"]) < 15
    found, _ = run(quality.Options("c", str(models)), tmp_path / "two", tmp_path / "graded")
    assert found == made["one"]
