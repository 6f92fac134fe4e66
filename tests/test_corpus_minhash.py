"""Near duplicates: all planted ones go, what only shares its frame stays, always the same bytes."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from made_data import document, write_documents

from llama.cli import UserError
from llama.corpus import shuffle
from llama.corpus.document import Document
from llama.corpus.executors import Executor
from llama.corpus.steps import words as words_module
from llama.corpus.steps.minhash import MinHash, signature
from llama.corpus.steps.words import in_a_row, words
from llama.files import read_documents, read_json, read_lines


def made(folder: Path) -> dict[str, bytes]:
    found = (
        p for p in folder.rglob("*") if p.is_file() and p.name not in ("journal.jsonl", ".lock")
    )
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def prose(rng, n: int) -> list[str]:
    return [f"w{min(int(rng.paretovariate(0.5)), 5000)}" for _ in range(n)]


def edited(rng, given: list[str], times: int) -> list[str]:
    """A few words of a text changed, put in or taken out."""
    text = list(given)
    for _ in range(times):
        at = rng.randrange(len(text))
        text[at : at + rng.randrange(2)] = [f"edit{rng.randrange(9)}"] * rng.randrange(2)
    return text


def shares(a: str, b: str) -> float:
    """What two texts have in common of their five-word shingles, the slow way."""
    rows = [re.findall(r"\w+", text.lower()) for text in (a, b)]
    a_, b_ = ({tuple(row[i : i + 5]) for i in range(len(row) - 4)} for row in rows)
    return len(a_ & b_) / len(a_ | b_)


def run(tmp_path: Path, name: str, given: dict[str, list[str]], step=None, shards=3, **how):
    for source, texts in given.items():
        for k in range(shards):
            part = [document(f"{source}{i}", t) for i, t in enumerate(texts) if i % shards == k]
            write_documents(tmp_path / f"in/{source}/{k}.jsonl.zst", part)
    outputs = [tmp_path / name / source for source in given]
    executor = Executor(how.pop("workers", 1))
    shuffle.run(step or MinHash(), [tmp_path / "in" / s for s in given], outputs, executor, **how)
    return {
        line["id"]
        for path in (tmp_path / name).rglob("0*.jsonl.zst")
        for line in read_documents(path)
    }


def test_every_planted_copy_goes_and_every_innocent_stays(tmp_path, rng):
    originals = [prose(rng, rng.randrange(200, 600)) for _ in range(150)]
    copies, pairs = [], []
    for text in originals:
        copy = edited(rng, text, len(text) // 100)
        if shares(" ".join(text), " ".join(copy)) >= 0.9:
            pairs.append(len(copies))
        # another case and other punctuation are no edit
        copies.append(rng.choice([" ", "\n", ", "]).join(copy).title())
    innocents = [" ".join(prose(rng, 300)) for _ in range(150)]
    # pages of one form: 60 % of each is the same
    frame = prose(rng, 180)
    forms = [" ".join([*frame[:90], *prose(rng, 120), *frame[90:]]) for _ in range(60)]
    print(f"{len(pairs)} pairs, forms share {shares(*forms[:2]):.2f}")
    assert len(pairs) > 50 and 0.3 < shares(*forms[:2]) < 0.7
    first = [" ".join(text) for text in originals]
    given = {"a": [*first, *innocents], "b": [*copies, *forms]}
    kept = run(tmp_path, "out", given)
    assert {f"a{i}" for i in range(300)} <= kept
    assert {f"b{i}" for i in range(150, 210)} <= kept
    assert not {f"b{i}" for i in pairs} & kept
    lines = [eval(x) for p in (tmp_path / "out/b/dropped").iterdir() for x in read_lines(p)]
    for line in lines:
        number = int(line["id"][1:])
        assert line["reason"] == "near_duplicate" and line["step"] == "1 minhash"
        # the shard and the place in it of the document that stays: a text of a
        assert line["detail"] == f"{number % 3}:{number // 3}"
    stats = read_json(tmp_path / "out/b/stats.json")["total"]
    assert stats["dropped"] == {"near_duplicate": len(lines)}


def test_a_chain_is_one_cluster_whose_first_stays(tmp_path, rng):
    """Each is nearly the one before; the last has little in common with the first."""
    text = prose(rng, 400)
    chain = []
    for k in range(30):
        chain.append(" ".join(text))
        text = [*text[: k * 8], *(f"new{k}x{i}" for i in range(8)), *text[k * 8 + 8 :]]
    assert shares(chain[0], chain[1]) > 0.9 and shares(chain[0], chain[-1]) < 0.4
    rng.shuffle(chain)
    assert run(tmp_path, "out", {"a": chain}, shards=1) == {"a0"}


def test_partitions_workers_and_shards_do_not_change_what_stays(tmp_path, rng):
    texts = [prose(rng, 100) for _ in range(40)]
    given = {s: [" ".join(edited(rng, rng.choice(texts), 2)) for _ in range(60)] for s in "ab"}
    kept = run(tmp_path, "1", given)
    assert 30 <= len(kept) < 80
    for name, how in (("7", {"partitions": 7}), ("50", {"partitions": 50, "workers": 3})):
        assert run(tmp_path, name, given, **how) == kept
        assert made(tmp_path / name) == made(tmp_path / "1")


def test_short_documents_are_not_compared_and_empty_ones_do_not_matter(tmp_path):
    poem = " ".join(f"w{i}" for i in range(23))
    given = {"a": [poem, poem, poem + " w23", poem + " w23", "", "again " * 99, "again " * 99]}
    assert run(tmp_path, "out", given, shards=1) == {f"a{i}" for i in (0, 1, 2, 4, 5, 6)}
    assert run(tmp_path, "none", {"b": ["", "x"]}) == {"b0", "b1"}
    step = MinHash(min_shingles=1)
    assert run(tmp_path, "all", given, step, shards=1) == {"a0", "a4", "a5"}


def test_a_band_that_all_documents_have_costs_a_bounded_number_of_comparisons(rng):
    """A form that is everywhere: 20,000 documents agree in a band and differ in all else."""
    step = MinHash(bands=1, rows=1)
    records = np.zeros(20_000, MinHash(bands=1, rows=111).records)
    records["document"] = np.arange(len(records))
    records["lows"] = np.frombuffer(rng.randbytes(records["lows"].size), "u1").reshape(-1, 56)
    records["lows"][777::7] = 5
    wide = MinHash(bands=14)
    assert len(wide.orders) == 112 and step.orders.size == 2
    found = wide.reduce(records)
    # every seventh, each with those up to 32 behind it
    assert set(np.unique(found)) == set(range(777, 20_000, 7))
    assert len(found) < 5 * len(range(777, 20_000, 7))
    assert len(wide.resolve(iter([found]))) == len(range(777, 20_000, 7)) - 1


def test_the_share_of_equal_orders_is_that_of_equal_shingles(rng):
    orders = MinHash(bands=100).orders
    numbers = np.random.default_rng(rng.randrange(2**32))
    for alike in (0.3, 0.6, 0.9):
        found = []
        for _ in range(50):
            both = int(600 * alike)
            values = numbers.integers(0, 2**64, 600, dtype=np.uint64)
            half = both + (600 - both) // 2
            a, b = values[:half], np.r_[values[:both], values[half:]]
            found.append((signature(a, orders) == signature(b, orders)).mean())
        # 50 x 800 throws
        assert abs(np.mean(found) - alike) < 0.03


def test_options_out_of_range_are_refused():
    for key, value in (("bands", 0), ("rows", -1), ("similarity", 1.5), ("min_shingles", 0)):
        with pytest.raises(UserError, match=f"{key} is {value}, expected"):
            MinHash(**{key: value})


def test_words_are_those_of_the_slow_way(rng, monkeypatch):
    monkeypatch.setattr(words_module, "BLOCK_CHARS", 64)
    words_module._tables.cache_clear()
    alphabet = "abcÄéж09 \n.,-_'“”—İß漢字か\U00020bb7\ud800\0ा"
    for _ in range(200):
        text = "".join(rng.choices(alphabet, k=rng.randrange(300)))
        found = words(text)
        shown = [found.text[b:e] for b, e in zip(found.begins, found.ends, strict=True)]
        expected, start = [], True
        for letter in text.lower():
            whole = letter in "漢字か\U00020bb7"
            if not (letter.isalnum() or letter in "ा\u0307"):
                start = True
                continue
            expected += [""] if start or whole else []
            expected[-1] += letter
            start = whole
        # a run longer than a block is cut, and no space is near
        assert "".join(shown) == "".join(expected)
        if all(len(part) < 40 for part in re.split(r"[ \n]", text.lower())):
            assert shown == expected
        hashes = {}
        for word, hash in zip(shown, found.hashes.tolist(), strict=True):
            assert hashes.setdefault(word, hash) == hash
        assert len(set(hashes.values())) == len(hashes)
        rows = in_a_row(found.hashes, 3).tolist()
        assert len(rows) == max(0, len(shown) - 2)
        assert len(set(rows)) == len({tuple(shown[i : i + 3]) for i in range(len(rows))})
    words_module._tables.cache_clear()


@pytest.mark.slow
def test_hostile_texts_take_linear_memory_and_time(rng):
    import time

    step = MinHash()
    for text in ("a" * 500_000, "漢" * 500_000, "a " * 250_000, "\u0301" * 500_000, ". " * 250_000):
        seconds = []
        for times in (1, 4):
            documents = [Document("x", text * times, "x", {})]
            best = []
            for _ in range(3):
                began = time.process_time()
                step.map(0, iter(documents))
                best.append(time.process_time() - began)
            seconds.append(min(best))
        print(repr(text[:2]), seconds, file=sys.stderr)
        assert seconds[1] <= 8 * seconds[0] + 0.05
