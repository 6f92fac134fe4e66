"""Global steps: what they find does not depend on partitions, workers, shards or kills."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import pytest
from made_data import document, write_documents
from made_kills import kill_again_and_again

from llama.cli import UserError
from llama.corpus import dedup, shuffle
from llama.corpus.executors import Executor
from llama.corpus.sources import plain
from llama.corpus.steps.exact import Exact
from llama.corpus.steps.text import at_least, unix_line_ends
from llama.files import read_documents, read_json, read_lines

ROOT = Path(__file__).parent.parent


def made(folder: Path) -> dict[str, bytes]:
    found = (
        p for p in folder.rglob("*") if p.is_file() and p.name not in ("journal.jsonl", ".lock")
    )
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def sources(folder: Path, rng, each: int = 60, shards: int = 4, words: int = 90) -> dict:
    """Two sources with texts that come again; returns their documents in order."""
    given: dict[str, list[dict]] = {}
    for name in ("wiki", "crawl"):
        given[name] = []
        for k in range(shards):
            found = [
                document(f"{k}/{i}", f"text {rng.randrange(words)}é" + " " * rng.randrange(2), name)
                for i in range(rng.randrange(each))
            ]
            write_documents(folder / name / f"{k}.jsonl.zst", found)
            given[name] += found
    return given


def kept(folder: Path) -> list[str]:
    paths = sorted(folder.glob("[0-9]*.jsonl.zst"))
    return [found["id"] for path in paths for found in read_documents(path)]


def firsts(given: dict) -> dict[str, list[str]]:
    """What must stay, the slow way."""
    seen, left = set(), {name: [] for name in given}
    for name, documents in given.items():
        for each in documents:
            if each["text"].strip() not in seen:
                left[name].append(each["id"])
            seen.add(each["text"].strip())
    return left


def run(tmp_path: Path, name: str, step=None, workers: int = 1, **how) -> Path:
    inputs = [tmp_path / "in/wiki", tmp_path / "in/crawl"]
    outputs = [tmp_path / name / path.name for path in inputs]
    shuffle.run(step or Exact(), inputs, outputs, Executor(workers), **how)
    return tmp_path / name


def test_the_first_of_equal_documents_stays(tmp_path, rng):
    given = sources(tmp_path / "in", rng)
    expected = firsts(given)
    out = run(tmp_path, "out")
    assert {name: kept(out / name) for name in given} == expected
    for name, documents in given.items():
        stats = read_json(out / name / "stats.json")["total"]
        gone = len(documents) - len(expected[name])
        assert stats["documents"] == Counter({"in": len(documents), "out": len(expected[name])})
        assert stats.get("dropped", {}) == ({"exact_duplicate": gone} if gone else {})
        assert stats["steps"] == {"1 exact": len(expected[name])}
        lines = [orjson.loads(x) for p in (out / name / "dropped").iterdir() for x in read_lines(p)]
        assert {x["id"] for x in lines} == {d["id"] for d in documents} - set(expected[name])
        assert all(x["reason"] == "exact_duplicate" and x["step"] == "1 exact" for x in lines)
        assert all(x.get("sample", "text").startswith("text") for x in lines)
    assert all(found["meta"] == {} for found in read_documents(next((out / "wiki").glob("0*.zst"))))
    assert not list(out.rglob(".shuffle"))


def test_partitions_and_workers_do_not_change_a_byte(tmp_path, rng):
    sources(tmp_path / "in", rng)
    one = made(run(tmp_path, "1"))
    assert made(run(tmp_path, "7", partitions=7)) == one
    assert made(run(tmp_path, "200", partitions=200, workers=3)) == one
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "1").rglob("*.jsonl.zst")}
    run(tmp_path, "1", workers=2)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    # a lost shard is made again, for which the partitions must be made again
    (tmp_path / "1/crawl/00002.jsonl.zst").unlink()
    assert made(run(tmp_path, "1")) == one


def test_groups_come_back(tmp_path, rng):
    dtype = np.dtype([("key", "<u8"), ("at", "<u4")])
    for _ in range(50):
        n, size = rng.randrange(1, 20), rng.randrange(100)
        rows = np.zeros(size, dtype)
        rows["at"] = np.arange(size)
        group = np.array([rng.randrange(n) for _ in range(size)], np.int64)
        shuffle.write_groups(tmp_path / "x", rows, group, n)
        for g in range(n):
            found = shuffle.read_groups(tmp_path / "x", dtype, n, g)
            assert found["at"].tolist() == np.flatnonzero(group == g).tolist()
        assert len(shuffle.read_groups(tmp_path / "x", dtype, n)) == size


@dataclass(frozen=True)
class Chains:
    """Documents "a b" join a and b; of each set that hangs together the first stays."""

    name = "chains"
    records = np.dtype([("key", "<u8"), ("unit", "<u4"), ("document", "<u4")])
    decisions = np.dtype([("unit", "<u4"), ("document", "<u4"), ("first", "<u8")])

    def map(self, unit, documents):
        rows = []
        for number, each in enumerate(documents):
            rows += [(hash(int(word)) * 2**50 % 2**64, 0, number) for word in each.text.split()]
        return np.array(rows, self.records), np.zeros(0, self.decisions)

    def reduce(self, records):
        place = records["unit"].astype("<u8") << np.uint64(32) | records["document"]
        same = records["key"][1:] == records["key"][:-1]
        return np.stack([place[:-1][same], place[1:][same]], 1)

    def resolve(self, finds):
        first = {}

        def find(x):
            while first.get(x, x) != x:
                x = first[x]
            return x

        for a, b in (pair for part in finds for pair in part.tolist()):
            a, b = find(a), find(b)
            first[max(a, b)] = min(a, b)
        rows = [(x >> 32, x & 0xFFFFFFFF, find(x)) for x in first if find(x) != x]
        return np.array(rows, self.decisions)

    def apply(self, document, decisions):
        assert len(decisions) == 1
        return document.dropped("chained")


def test_finds_may_be_joined_before_they_are_decisions(tmp_path, rng):
    chains = {"wiki": ["1 2", "5 6", "9"], "crawl": ["2 3", "3 4", "6 7", "8"]}
    for name, texts in chains.items():
        found = [document(text, text, name) for text in texts]
        write_documents(tmp_path / f"in/{name}/0.jsonl", found)
    for partitions in (1, 5):
        out = run(tmp_path, str(partitions), Chains(), partitions=partitions)
        assert kept(out / "wiki") == ["1 2", "5 6", "9"] and kept(out / "crawl") == ["8"]


def test_further_steps_run_behind_the_global_one(tmp_path, rng):
    given = sources(tmp_path / "in", rng)
    out = run(tmp_path, "out", then=[at_least_eight], options={"min_chars": 8})
    texts = {(n, d["id"]): d["text"].strip() for n, found in given.items() for d in found}
    expected = firsts(given)
    for name in given:
        wanted = [id for id in expected[name] if len(texts[name, id]) >= 8]
        assert kept(out / name) == wanted
    stats = read_json(out / "wiki/stats.json")
    assert list(stats["total"]["steps"]) == ["1 exact", "2 at_least_eight"]
    with pytest.raises(UserError, match="options.min_chars: 8 -> 9"):
        run(tmp_path, "out", then=[at_least_eight], options={"min_chars": 9})


def at_least_eight(documents):
    return at_least(documents, 8)


def test_a_recipe_may_have_global_steps_among_its_own(tmp_path, rng):
    words = [rng.choice(["short", "a longer text", "another text"]) for _ in range(50)]
    for i, word in enumerate(words):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{i:02}.txt").write_text(word)
    options = plain.Options(source="x", unit_bytes=20_000)
    plan = plain.plan(options, [tmp_path / "in"])
    steps = [unix_line_ends, Exact(), at_least_eight]
    outputs = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        summary = shuffle.pipeline(plan, steps, out, Executor(workers))
        wanted = [f"{words.index(word):02}.txt" for word in set(words) if len(word) >= 8]
        assert kept(out) == sorted(wanted)
        assert summary.total["documents"] == {"in": 50, "out": len(wanted)}
        gone = 50 - len(set(words))
        short = {"short": 1} if "short" in words else {}
        assert summary.total["dropped"] == {"exact_duplicate": gone, **short}
        told = {line.split()[0]: line.split() for line in summary.table().splitlines()}
        assert told["all"][1] == "50" and told["all"].count(str(len(wanted))) == 1
        assert told["exact"][1] == "50" and f"exact_duplicate {gone}" in summary.table()
        outputs.append(made(out))
    assert outputs[0] == outputs[1]
    assert read_json(out / ".stages/0/stats.json")["total"]["steps"] == {"1 unix_line_ends": 50}
    again = plain.plan(plain.Options(source="x", unit_bytes=20_000, min_chars=3), [tmp_path / "in"])
    with pytest.raises(UserError, match="options.min_chars: 1 -> 3"):
        shuffle.pipeline(again, steps, out, Executor(1))


@dataclass(frozen=True)
class Fragile(Exact):
    """`Exact`, whose map goes wrong on some texts."""

    how: str = "raise"

    def map(self, unit, documents):
        return super().map(unit, (self.look(each) for each in documents))

    def look(self, each):
        if "text 7" in each.text:
            if self.how == "raise":
                raise ValueError("seven")
            if self.how == "hang":
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGSEGV)
        return each


@pytest.mark.parametrize("how", ["raise", "crash", "hang"])
def test_a_document_that_the_step_cannot_map_costs_itself(tmp_path, rng, monkeypatch, how):
    given = sources(tmp_path / "in", rng, each=12 if how == "hang" else 60)
    extra = [document(f"more/{i}", f"text {700 + i}", "wiki") for i in range(2)]
    write_documents(tmp_path / "in/wiki/9.jsonl.zst", extra)
    bad = {d["id"] for found in given.values() for d in found if "text 7" in d["text"]}
    bad |= {d["id"] for d in extra}
    monkeypatch.setattr(shuffle.Shuffle.__init__, "__defaults__", (1.0,))
    expected = firsts(
        {name: [d for d in f if "text 7" not in d["text"]] for name, f in given.items()}
    )
    out = run(tmp_path, "out", Fragile(how=how), max_quarantined=1, partitions=3)
    assert {name: kept(out / name) for name in given} == expected
    listed = [orjson.loads(x) for p in out.glob("*/quarantine.*") for x in read_lines(p)]
    assert {x["id"] for x in listed} == bad
    [reason] = {x["reason"] for x in listed}
    told = {"raise": "ValueError: seven", "crash": "SIGSEGV", "hang": "longer than the deadline"}
    assert reason == ("exception" if how == "raise" else "crash")
    assert all(told[how] in x["error"] for x in listed)


def test_empty_shards_and_unfinished_inputs(tmp_path, rng):
    for name in ("wiki", "crawl"):
        write_documents(tmp_path / f"in/{name}/0.jsonl.zst", [])
    out = run(tmp_path, "out")
    assert kept(out / "wiki") == [] == kept(out / "crawl")
    (tmp_path / "in/wiki/journal.jsonl").write_bytes(b"{}\n")
    with pytest.raises(UserError, match="in/wiki holds an unfinished run"):
        run(tmp_path, "other")
    (tmp_path / "in/wiki/journal.jsonl").unlink()
    (tmp_path / "in/wiki/0.jsonl.zst").unlink()
    with pytest.raises(UserError, match="in/wiki holds no documents"):
        run(tmp_path, "other")


def test_a_damaged_input_is_named_before_anything_is_made(tmp_path, rng):
    sources(tmp_path / "in", rng)
    path = tmp_path / "in/crawl/1.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"00005: .*crawl/1.jsonl.zst is damaged"):
        run(tmp_path, "out")
    assert not list((tmp_path / "out").rglob("stats.json"))


def test_the_command_refuses_what_it_cannot_do(tmp_path, rng):
    sources(tmp_path / "in", rng, each=5)
    wiki = str(tmp_path / "in/wiki")
    for line, told in (
        (["--step", "fuzzy", "--input", wiki, "--output", "x"], "step is 'fuzzy', expected one of"),
        (["--input", wiki, wiki, "--output", "x"], "two folders of one name"),
        (["--input", wiki, "--output", str(tmp_path / "in")], "would write over --input"),
        (["--input", "nowhere", "--output", "x"], "nowhere is no folder"),
        (["--input", wiki, "--output", "x", "--partitions", "-1"], "--partitions is -1"),
    ):
        with pytest.raises(UserError, match=told):
            dedup.main(line)


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_the_same_bytes(tmp_path, rng):
    sources(tmp_path / "in", rng, each=3000, words=20_000)
    given = [str(tmp_path / "in" / name) for name in ("wiki", "crawl")]

    def start(output: str) -> subprocess.Popen:
        line = [sys.executable, "-m", "llama.corpus", "dedup", "--input", *given, "--workers", "2"]
        line += ["--partitions", "5", "--output", str(tmp_path / output)]
        return subprocess.Popen(line, cwd=ROOT, stdout=-3, stderr=-3, start_new_session=True)

    assert start("calm").wait() == 0
    expected = made(tmp_path / "calm")
    for trial in range(3):
        again = functools.partial(start, f"killed{trial}")
        kill_again_and_again(again, tmp_path / f"killed{trial}", tmp_path / "calm", rng, 3)
        assert start(f"killed{trial}").wait() == 0
        assert made(tmp_path / f"killed{trial}") == expected
