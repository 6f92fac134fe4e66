"""Repeated lines: against the slow way, whatever the shards and partitions."""

import hashlib
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from made_data import document, write_documents

from llama.corpus import shuffle
from llama.corpus.document import Document
from llama.corpus.executors import Executor
from llama.corpus.steps import lines
from llama.corpus.steps.lines import Lines, line_keys, normalized
from llama.files import read_documents, read_json

LINES = ["Home", "Über uns", "Seite 17", "seite 99!", "a b", "---", "", " ", "…", "\u200b", "Ⅳ x"]


def key(line: str) -> str:
    """What lines have in common that are the same, by the book."""
    gone = ("Cc", "Cf", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Zs", "Zl", "Zp")
    kinds = [(c, unicodedata.category(c)) for c in line.lower()]
    kept = ["0" if kind == "Nd" else c for c, kind in kinds if kind not in gone or c == " "]
    return "".join(kept).strip(" ")


def slowly(given: list[list[str]], copies: str, group: int) -> list[list[str]]:
    """Texts of each shard, "" where nothing is left."""
    group = group or len(given)
    found = []
    for k, shard in enumerate(given):
        together = given[k // group * group : (k // group + 1) * group]
        times = Counter(x for s in together for t in s for x in {key(y) for y in t.split("\n")})
        if k % group == 0:
            seen = set()
        found.append([])
        for text in shard:
            kept, here = [], set()
            for line in text.split("\n"):
                same = key(line)
                repeated = times[same] > 1 if copies == "none" else same in seen
                if not same or not repeated and same not in here:
                    kept.append(line)
                here.add(same)
            seen |= here
            whole = lines._BLANK_LINES.sub("\n\n", "\n".join(kept)).strip()
            changed = len(kept) < len(text.split("\n"))
            found[-1].append((whole if any(map(key, kept)) else "") if changed else text)
    return found


def texts(rng, shards: int, each: int) -> list[list[str]]:
    pool = LINES + [f"line {chr(97 + i)} of {i}" for i in range(25)]
    return [
        ["\n".join(rng.choices(pool, k=rng.randrange(1, 9))) for _ in range(rng.randrange(each))]
        for _ in range(shards)
    ]


@pytest.mark.parametrize("copies", ["first", "none"])
@pytest.mark.parametrize("group", [0, 1, 2])
def test_as_the_slow_way(tmp_path: Path, rng, copies, group) -> None:
    given = texts(rng, 5, 12)
    for k, shard in enumerate(given):
        made = [document(f"{k}:{i}", text, "crawl") for i, text in enumerate(shard)]
        write_documents(tmp_path / "in" / f"{k}.jsonl.zst", made)
    step = Lines(copies, group)
    outs = []
    for partitions in (1, 5):
        out = tmp_path / f"out{partitions}"
        shuffle.run(step, [tmp_path / "in"], [out], Executor(1), partitions=partitions)
        outs.append({p.name: p.read_bytes() for p in sorted(out.glob("0*.zst"))})
    assert outs[0] == outs[1]
    found = {d["id"]: d["text"] for p in sorted(out.glob("0*.zst")) for d in read_documents(p)}
    expected = {
        f"{k}:{i}": text
        for k, shard in enumerate(slowly(given, copies, group))
        for i, text in enumerate(shard)
    }
    assert found == {id: text for id, text in expected.items() if text or id in found}
    gone = len(expected) - len(found)
    dropped = read_json(out / "stats.json")["total"].get("dropped", {})
    assert dropped == ({"duplicate_lines": gone} if gone else {})


def test_normal_form() -> None:
    assert normalized("  ÀB-c 12\u2014x\t\x85 ٣,\n") == "  àbc 00x 0\n".encode()
    for line in LINES:
        assert normalized(line).strip().decode() == key(line)
    keys, numbers = line_keys("…\n Seite 17 \n\n---\nx")
    expected = [hashlib.sha1(line).digest()[:8] for line in (b"seite 00", b"x")]
    assert keys.tobytes() == b"".join(expected) and numbers.tolist() == [1, 4]
    assert line_keys("") and len(line_keys(" \n\u3000\n-")[0]) == 0


def test_any_character_normalises_as_by_the_book(rng) -> None:
    for _ in range(300):
        codes = [rng.randrange(rng.choice([0x80, 0x3100, 0x10000])) for _ in range(40)]
        line = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000 and c != 10)
        assert normalized(line).decode().strip(" ") == key(line)


def test_a_line_of_its_own_document_counts_once() -> None:
    step = Lines("none")
    given = [Document("a", "x\nx\ny\nx", "", {}), Document("b", "z\ny", "", {})]
    records, decisions = step.map(0, iter(given))
    assert sorted(map(tuple, decisions[["document", "line"]].tolist())) == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 1),
    ]
    assert len(records) == 3
    assert step.apply(given[0], decisions[decisions["document"] == 0]).text == "x"


def test_blank_lines_that_meet_become_one() -> None:
    given = Document("a", "one\n\nmenu\n\nmenu\n\ntwo", "", {})
    decisions = np.zeros(2, Lines.decisions)
    decisions["line"] = [2, 4]
    assert Lines().apply(given, decisions).text == "one\n\ntwo"


@pytest.mark.full
def test_a_line_of_100_mb_and_ten_million_lines() -> None:
    records, decisions = Lines().map(0, iter([Document("a", "word " * 20_000_000, "", {})]))
    assert (len(records), len(decisions)) == (1, 0)
    given = Document("a", "a\n" * 9_999_999 + "b", "", {})
    records, decisions = Lines().map(0, iter([given]))
    # more than 65,536: the number of a line needs more than two bytes
    assert (len(records), len(decisions)) == (2, 9_999_998)
    assert Lines().apply(given, decisions).text == "a\nb"


@pytest.mark.slow
def test_large_documents_take_linear_time() -> None:
    def seconds(text: str) -> float:
        start = time.process_time()
        Lines().map(0, iter([Document("a", text, "", {})]))
        return time.process_time() - start

    for unit in ("x" * 999, "\n", "…\n", "жы\n", "\u3000ab\n12\n"):
        seconds(unit * 1000)
        n = 60_000 if len(unit) < 9 else 2000
        assert seconds(unit * 4 * n) < 8 * seconds(unit * n) + 0.1, unit
