"""Passages of benchmarks: found whatever the file's form, named, counted; other text stays."""

import gzip
import json
import os
from pathlib import Path

import orjson
import pytest
from made_data import document, write_documents

from llama.cli import UserError
from llama.corpus import graph, shuffle
from llama.corpus.document import Document, Dropped, Noted
from llama.corpus.executors import Executor
from llama.corpus.steps.decontaminate import WORDS, Decontaminate
from llama.files import read_documents, read_json, read_lines

# Thirteen words each.
SENTENCES = {
    "questions.jsonl": "Natalia sold clips to forty eight friends in April and half in May",
    "list.json": "A farmer has seventeen sheep and all but nine die how many remain",
    "whole.json": "Which of these branches of the nerve do not contain any motor processes",
    "rows.csv": 'The "first" man, on the roof: removes shingles, then carries them down slowly',
    "rows.tsv": "The technician told the customer politely that she could certainly pay with cash",
    "text.txt": "Write a function which returns the longest prefix that several given strings have",
    "packed.jsonl.gz": "Пять больших слонов медленно идут через реку и птицы на дереве тихо поют",
    "han.jsonl": "小明有十二个苹果他给了小红五个还剩几个",
}


@pytest.fixture
def benchmarks(tmp_path) -> Path:
    folder = tmp_path / "benchmarks"
    (folder / "deep").mkdir(parents=True)

    def item(name: str) -> dict:
        # nested, and not the first string of its item
        return {"id": 3, "gold": "x", "turns": [{"text": SENTENCES[name]}, "and an answer"]}

    texts = {
        "questions.jsonl": json.dumps(item("questions.jsonl")) + '\n\n{"q": "too short"}\n',
        "list.json": json.dumps([{"q": "short"}, item("list.json")], indent=1),
        "whole.json": json.dumps({"canary": 1, "examples": [item("whole.json")]}, indent=1),
        "rows.csv": 'question,answer\n"' + SENTENCES["rows.csv"].replace('"', '""') + '",3\n',
        "rows.tsv": f"sentid\tsentence\n1\t{SENTENCES['rows.tsv']}\n",
        "text.txt": "Some words.\n \n" + SENTENCES["text.txt"].replace(" which", "\nwhich"),
        "han.jsonl": json.dumps(item("han.jsonl")),
    }
    for name, text in texts.items():
        (folder / "deep" / name).write_text(text)
    packed = json.dumps(item("packed.jsonl.gz")).encode()
    (folder / "deep/packed.jsonl.gz").write_bytes(gzip.compress(packed))
    (folder / "labels.lst").write_text("1\n")
    return folder


def through(step, *texts: str) -> list:
    return list(step(iter([Document(str(i), text, "x", {}) for i, text in enumerate(texts)])))


@pytest.mark.parametrize("name", SENTENCES)
def test_a_passage_is_found_in_every_format(benchmarks, rng, name):
    step = Decontaminate(str(benchmarks))
    around = " ".join(f"before{rng.random()}" for _ in range(rng.randrange(99)))
    passage = SENTENCES[name].upper().replace(" ", rng.choice(["\n", " - ", ", "]))
    count, dropped = through(step, f"{around} ({passage}) {around}")
    assert count == Noted(f"hold a passage of deep/{name}")
    assert isinstance(dropped, Dropped) and dropped.reason == "contaminated" and not dropped.error
    told, _, words = dropped.detail.partition(": ")
    assert told == f"deep/{name}"
    first = "".join(filter(str.isalnum, SENTENCES[name].lower()))
    assert first.startswith("".join(words.split()))
    assert len(words.split()) == WORDS


def test_less_than_a_passage_is_no_passage(benchmarks):
    step = Decontaminate(str(benchmarks))
    words = SENTENCES["questions.jsonl"].split()
    texts = [" ".join(words[1:]), " ".join(words[:-1]), " ".join([*words[:6], "x", *words[6:]]), ""]
    assert [item.text for item in through(step, *texts)] == texts


def test_documents_are_only_counted_if_asked(benchmarks):
    step = Decontaminate(str(benchmarks), drop=False)
    text = f"{SENTENCES['rows.tsv']}. {SENTENCES['list.json']}"
    *counts, kept = through(step, text)
    names = ["deep/list.json", "deep/rows.tsv"]
    assert counts == [Noted(f"hold a passage of {name}") for name in names]
    assert kept.text == text
    told = kept.meta["contaminated"].split("; ")
    assert [each.partition(": ")[0] for each in told] == names


def test_forms_and_counting_are_nobodys_passage(tmp_path, rng):
    form = "Answer the following question by choosing one of the four letters given below it"
    items = [f"{form} {' '.join(f'{i}word{k}' for k in range(20))}" for i in range(11)]
    items += [" ".join(map(str, range(30))), " ".join("abcdefghijklmnopqrstuvwxyz"), "zero " * 30]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(orjson.dumps({"q": item}) for item in items))
    step = Decontaminate(str(tmp_path))
    texts = [form, *items[11:]]
    assert [item.text for item in through(step, *texts)] == texts
    assert through(step, items[rng.randrange(11)])[-1].reason == "contaminated"
    assert through(Decontaminate(str(tmp_path), max_items=11), form)[-1].reason == "contaminated"


def test_what_is_not_covered_is_said(benchmarks, capsys):
    step = Decontaminate(str(benchmarks))
    told = capsys.readouterr().out
    assert "passages of 8 files" in told
    assert step.known["not covered"] == {
        "deep/questions.jsonl": "1 of 2 items are shorter",
        "deep/list.json": "1 of 2 items are shorter",
        "deep/rows.csv": "1 of 2 items are shorter",
        "deep/rows.tsv": "1 of 2 items are shorter",
        "deep/text.txt": "1 of 2 items are shorter",
        "labels.lst": "not read: suffix",
    }
    assert all(f"{name} ({why})" in told for name, why in step.known["not covered"].items())


def test_benchmarks_that_cannot_be_used_are_refused(benchmarks, tmp_path):
    (tmp_path / "short").mkdir()
    (tmp_path / "short/a.jsonl").write_text('{"q": "too short"}')
    for folder, told in (
        ("", "benchmarks is ''"),
        (str(tmp_path / "no"), "which is no folder"),
        (str(tmp_path / "short"), "holds no benchmark of 13 words"),
    ):
        with pytest.raises(UserError, match=told):
            Decontaminate(folder)
    for name, data in (
        ("bad.jsonl", b'{"q": "x"}\n{"q'),
        ("bad.json", b"[1,\n2"),
        ("bad.jsonl.gz", gzip.compress(b'{"q": "x"}')[:-4]),
        ("bad.txt", b"a\0b"),
    ):
        path = benchmarks / name
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"benchmark file .*/{name} cannot be read"):
            Decontaminate(str(benchmarks))
        path.unlink()


def test_as_a_step_across_sources_beside_others(benchmarks, tmp_path, rng):
    """Plain steps run alone, before a global one and behind it, and are part of the plan."""
    clean = [" ".join(f"w{rng.randrange(999)}" for _ in range(60)) for _ in range(30)]
    texts = [*clean, *clean[:5], *SENTENCES.values(), "Write to me@example.org or not."]
    rng.shuffle(texts)
    for source in ("books", "c4"):
        folder = tmp_path / "raw" / source
        folder.mkdir(parents=True)
        (folder / "0.jsonl").write_bytes(b"\n".join(orjson.dumps({"text": t}) for t in texts))
        (tmp_path / f"{source}.yaml").write_text("recipe: plain\n")
    decontaminate = f"{{step: decontaminate, benchmarks: {benchmarks}}}"
    line = ["--config", str(tmp_path / "all.yaml"), "--input", str(tmp_path / "raw"), "--output"]
    left = sorted([*clean, "Write to <EMAIL> or not."])
    first = f"[{{step: personal}}, {decontaminate}, {{step: exact}}]"
    later = f"[{{step: exact}}, {decontaminate}, {{step: minhash}}, {{step: personal}}]"
    # before the copies in the second source are gone, and behind that
    for name, across, hits in (("first", first, 16), ("later", later, 8)):
        (tmp_path / "all.yaml").write_text(f"across: {across}")
        out = tmp_path / name
        for _ in range(2):
            graph.main([*line, str(out), "--workers", "2"])
        found = [
            document for path in sorted(out.glob("*/0*.zst")) for document in read_documents(path)
        ]
        assert sorted(each["text"] for each in found) == left
        assert {each["source"] for each in found} == {"books"}
        assert all(each["meta"] == {} for each in found)
        every = [read_json(path) for path in out.rglob("stats.json")]
        noted = [stats["total"].get("noted", {}) for stats in every]
        passages = [n for group in noted for what, n in group.items() if "passage" in what]
        assert sum(passages) == hits
    dropped = [orjson.loads(x) for p in out.rglob("dropped/*") for x in read_lines(p)]
    details = {x["detail"].partition(": ")[0] for x in dropped if x["reason"] == "contaminated"}
    assert details == {f"deep/{name}" for name in SENTENCES}
    # changed benchmarks are another plan
    (benchmarks / "more.txt").write_text(
        "Quite another passage of more than thirteen words in a "
        "row which changes the plan of the run"
    )
    with pytest.raises(UserError, match="sha256"):
        graph.main([*line, str(out), "--workers", "2"])


def test_a_plain_step_alone_writes_folders_like_a_global_one(benchmarks, tmp_path):
    texts = ["all is well", SENTENCES["text.txt"]]
    write_documents(tmp_path / "in/a/0.jsonl", [document(t[:3], t) for t in texts])
    step = Decontaminate(str(benchmarks))
    [summary] = shuffle.run(step, [tmp_path / "in/a"], [tmp_path / "out/a"], Executor(1))
    assert summary.total["dropped"] == {"contaminated": 1}
    assert summary.total["steps"] == {"1 decontaminate": 1}
    assert [x["id"] for x in read_documents(tmp_path / "out/a/00000.jsonl.zst")] == ["all"]


@pytest.mark.slow
def test_the_real_benchmarks_are_read_and_found(capsys):
    folder = os.environ.get("LLAMA_REAL_DATA", "")
    if not Path(folder, "eval").is_dir():
        pytest.skip("LLAMA_REAL_DATA names no folder with eval/")
    step = Decontaminate(str(Path(folder, "eval")))
    with open(Path(folder, "eval/gsm8k/test.jsonl")) as file:
        questions = [json.loads(line)["question"] for line in file]
    found = [step.find(question) for question in questions]
    # some are short, or begin like more than ten others
    assert sum("gsm8k/test.jsonl" in each for each in found) > 0.98 * len(questions)
    assert not step.find("The quick brown fox jumps over the lazy dog. " * 20)
