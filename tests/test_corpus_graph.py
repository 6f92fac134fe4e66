"""All sources with one command: in order, checked before it starts, the same after any kill."""

import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from made_kills import kill_again_and_again
from test_corpus_models_linear import words
from test_corpus_models_train import lexicons, text

from llama.cli import UserError
from llama.corpus import graph, lineage
from llama.data.tokenize import source_names
from llama.files import read_documents, read_json

ROOT = Path(__file__).parent.parent
YAML = "recipe: plain\nunit_bytes: 20k\n"


@pytest.fixture
def raw(tmp_path, rng):
    """Three sources, read by the recipe `plain`, with texts that are in more than one."""
    texts = [" ".join(rng.choices("abcdefgh", k=rng.randrange(3, 60))) for _ in range(900)]
    for name in ("c4", "books", "wikipedia"):
        folder = tmp_path / "raw" / name
        folder.mkdir(parents=True)
        for k in range(3):
            lines = [orjson.dumps({"text": text}) for text in rng.choices(texts, k=300)]
            (folder / f"{k}.jsonl").write_bytes(b"\n".join(lines))
        (tmp_path / f"{name}.yaml").write_text(YAML)
    (tmp_path / "raw/README.md").write_text("not a source")
    (tmp_path / "all.yaml").write_text("across:\n  - step: exact\n")
    return tmp_path / "raw"


@pytest.fixture
def with_crawl(raw, rng):
    """Articles in two languages, and a crawl some of whose pages they refer to."""
    known = lexicons(rng)
    dull = words(rng, "abcdefghij", 300).split()
    articles = [
        {
            "text": text(rng, known[language], 400),
            "language": language,
            "references": [f"http://site{i}.org/{k}" for k in range(10)]
            if language == "en"
            else [],
        }
        for i in range(1000)
        for language in ("en", "fr")
    ]
    pages = [
        {"text": text(rng, lexicon, 60), "language": "en", "url": f"http://{site}{i}.org/{i % 10}/"}
        for i in range(1100)
        for site, lexicon in (("www.site", known["en"]), ("spam", dull))
    ]
    for name, many in (("wikipedia", articles), ("commoncrawl", pages)):
        (raw / name).mkdir(exist_ok=True)
        rng.shuffle(many)
        (raw / name / "9.jsonl").write_bytes(b"\n".join(map(orjson.dumps, many)))
    (raw.parent / "commoncrawl.yaml").write_text(YAML)
    (raw.parent / "quality.yaml").write_text("recipe: quality\nunit_bytes: 100k\n")
    return raw


def line(raw: Path, output: str, *more: str) -> list[str]:
    given = ["--config", str(raw.parent / "all.yaml"), "--input", str(raw), "--workers", "2"]
    return [*given, "--output", str(raw.parent / output), *more]


def made(folder: Path) -> dict[str, bytes]:
    found = (
        p for p in folder.rglob("*") if p.is_file() and p.name not in ("journal.jsonl", ".lock")
    )
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def test_sources_in_order_then_across_them(raw, capsys):
    graph.main(line(raw, "clean"))
    told = capsys.readouterr().out
    places = [told.index(f"== {name}") for name in ("wikipedia", "books", "c4", "exact, across")]
    assert places == sorted(places)
    clean = raw.parent / "clean"
    assert source_names(clean) == ["books", "c4", "wikipedia"]
    texts = [
        (name, found["text"])
        for name in ("wikipedia", "books", "c4")
        for path in sorted((clean / name).glob("0*.zst"))
        for found in read_documents(path)
    ]
    raw_texts = {
        orjson.loads(text)["text"]
        for path in raw.rglob("*.jsonl")
        for text in path.read_bytes().splitlines()
    }
    assert len(texts) == len({text for _, text in texts}) and {t for _, t in texts} == raw_texts
    # what two sources have stays in the first of the order
    read = read_json(clean / ".stages/recipe/wikipedia/stats.json")["total"]["documents"]["out"]
    left = read_json(clean / "wikipedia/stats.json")["total"]["documents"]
    assert read == left["in"] == 900 and left["out"] == sum(
        name == "wikipedia" for name, _ in texts
    )
    before = made(clean)
    graph.main(line(raw, "clean"))
    assert made(clean) == before


def test_without_steps_across_the_recipes_write_the_result(raw):
    (raw.parent / "all.yaml").write_text("across: []\n")
    graph.main(line(raw, "clean", "--sources", "books"))
    assert source_names(raw.parent / "clean") == ["books"]
    assert not (raw.parent / "clean/.stages").exists()


def test_what_is_wrong_is_said_before_anything_runs(raw, tmp_path):
    clean = tmp_path / "clean"
    for change, told in (
        (lambda: (tmp_path / "c4.yaml").unlink(), "c4.yaml cannot be read"),
        (lambda: (tmp_path / "c4.yaml").write_text(YAML + "colour: red\n"), "colour"),
        (lambda: (raw / "poems").mkdir(), "raw/poems is called after no recipe"),
        (lambda: (tmp_path / "all.yaml").write_text("across: [{step: fuzzy}]"), "step is 'fuzzy'"),
        (
            lambda: (tmp_path / "all.yaml").write_text("across: [{step: exact, by: x}]"),
            "step exact has no option by",
        ),
    ):
        change()
        with pytest.raises(UserError, match=told):
            graph.main(line(raw, "clean"))
        assert not clean.exists()
        for path, content in (("c4.yaml", YAML), ("all.yaml", "across:\n  - step: exact\n")):
            (tmp_path / path).write_text(content)
        if (raw / "poems").exists():
            (raw / "poems").rmdir()
    with pytest.raises(UserError, match="--sources names arxiv, but .*raw/arxiv is no folder"):
        graph.main(line(raw, "clean", "--sources", "arxiv"))


def test_a_recipe_whose_library_is_missing_names_it(raw, tmp_path, monkeypatch):
    (raw / "c4/0.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="reading .parquet needs pyarrow.parquet, .*pip install"):
        graph.main(line(raw, "clean"))
    assert not (tmp_path / "clean/c4").exists()


def test_a_source_that_fails_does_not_stop_the_next_and_is_named(raw, tmp_path):
    (raw / "books/0.jsonl").write_text("nothing\nbut\nnonsense\n" * 50)
    with pytest.raises(UserError, match=r"1 of 3 sources are not complete: books: .*quarantined"):
        graph.main(line(raw, "clean"))
    assert (tmp_path / "clean/.stages/recipe/c4/stats.json").exists()
    assert not (tmp_path / "clean/wikipedia").exists()


def test_too_little_to_learn_from_is_said_and_the_crawl_stays(raw, capsys):
    (raw.parent / "commoncrawl.yaml").write_text(YAML)
    (raw.parent / "quality.yaml").write_text("recipe: quality\n")
    (raw / "commoncrawl").mkdir()
    (raw / "commoncrawl/0.jsonl").write_text('{"text": "a page", "url": "http://a.org"}\n')
    graph.main(line(raw, "clean"))
    told = capsys.readouterr().out
    assert told.index("== commoncrawl") < told.index("== models") < told.index("== quality of comm")
    assert "0 pages that Wikipedia refers to, 1,000 needed" in told
    clean = raw.parent / "clean"
    [page] = read_documents(clean / "commoncrawl/00000.jsonl.zst")
    assert page["text"] == "a page" and page["meta"]["bucket"] == "all"
    names = [stage.name for stage in lineage.sources(clean)["commoncrawl"]]
    assert names == ["plain", "quality", "exact"]
    assert "language" in read_json(clean / ".stages/models/models.json")["not_learnt"]
    # neither learnt nor graded
    graph.main(line(raw, "raw-crawl", "--models", "none"))
    assert "commoncrawl stays as it is, ungraded: --models none" in capsys.readouterr().out
    [page] = read_documents(raw.parent / "raw-crawl/commoncrawl/00000.jsonl.zst")
    assert "bucket" not in page["meta"]
    # a folder that is ready, or is not
    with pytest.raises(UserError, match="nowhere (is no folder|holds no)"):
        graph.main(line(raw, "x", "--models", str(raw.parent / "nowhere")))
    assert not (raw.parent / "x").exists()
    (raw.parent / "quality.yaml").write_text("recipe: quality\nmin_reference_score: 0\n")
    (raw.parent / "all.yaml").write_text("across: []\n")
    graph.main(line(raw, "y", "--models", str(clean / ".stages/models")))
    assert "== models" not in capsys.readouterr().out
    [page] = read_documents(raw.parent / "y/commoncrawl/00000.jsonl.zst")
    assert page["meta"]["bucket"] == "all" and not (raw.parent / "y/.stages/models").exists()
    (raw.parent / "quality.yaml").write_text("recipe: quality\ncolour: red\n")
    with pytest.raises(UserError, match="colour"):
        graph.main(line(raw, "z"))
    assert not (raw.parent / "z").exists()


@pytest.mark.slow
def test_models_are_learnt_and_pages_graded(with_crawl, capsys):
    graph.main(line(with_crawl, "clean"))
    told, clean = capsys.readouterr().out, with_crawl.parent / "clean"
    models = read_json(clean / ".stages/models/models.json")
    assert set(models["learnt"]) == {"language", "lm-en", "references"}
    assert models["not_learnt"] == {"lm-fr": "0 pages in fr, 100 needed"} and "lm-fr" in told
    kept = [d for p in (clean / "commoncrawl").glob("0*.zst") for d in read_documents(p)]
    of_references = sum("site" in d["meta"]["url"] for d in kept)
    assert of_references > 600 and len(kept) - of_references < 100
    assert {d["meta"]["bucket"] for d in kept} <= {"head", "middle"}
    dropped = read_json(clean / ".stages/0-quality/commoncrawl/stats.json")["total"]["dropped"]
    assert dropped["tail"] > 500


@pytest.mark.full
def test_kill_9_while_models_are_learnt_leaves_the_same_bytes(with_crawl, rng):
    test_kill_9_anywhere_leaves_the_same_bytes(with_crawl, rng)


@pytest.mark.slow
def test_kill_9_anywhere_leaves_the_same_bytes(raw, rng):
    def start(output: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "llama.corpus", "all", *line(raw, output)]
        return subprocess.Popen(command, cwd=ROOT, stdout=-3, stderr=-3, start_new_session=True)

    assert start("calm").wait() == 0
    expected = made(raw.parent / "calm")
    kill_again_and_again(
        lambda: start("killed"), raw.parent / "killed", raw.parent / "calm", rng, 6
    )
    assert start("killed").wait() == 0
    assert made(raw.parent / "killed") == expected
