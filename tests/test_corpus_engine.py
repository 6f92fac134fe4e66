"""The engine: same bytes however a run went, and a bad record, crash or hang costs that record."""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import orjson
import pytest

from llama.cli import UserError
from llama.corpus import engine
from llama.corpus.document import Document, Noted
from llama.corpus.journal import only_one
from llama.corpus.plan import Piece, Plan, Unit
from llama.corpus.sources import plain
from llama.files import read_documents, read_json, read_lines, sha256

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/corpus/plain.yaml"


# -- readers and steps: at the top of the module, since workers import them -----------------


def counting(piece, documents=40):
    """A reader whose documents are called after their number."""
    if piece.name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    for i in range(documents):
        if piece.name == "broken" and i == 25:
            raise ValueError("the input ends here")
        yield Document(f"{piece.name}:{i}", f"text {i} ", "test", {})


def odd_only(documents):
    for document in documents:
        yield Noted("seen")
        if int(document.id.rpartition(":")[2]) % 2:
            yield document._replace(text=document.text * 2)
        else:
            yield document.dropped("even")


def misbehave(documents, how, ids):
    """Go wrong on some documents; the rest of the batch is already half through the generator."""
    for document in documents:
        if document.id in ids:
            if how == "raise":
                raise RuntimeError(f"no idea what {document.id} means")
            if how == "memory":
                raise MemoryError
            if how == "segfault":
                ctypes.string_at(0)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "exit":
                os._exit(3)
            if how == "hang":
                time.sleep(60)
        yield document


def not_json(documents):
    for document in documents:
        yield document._replace(text="\ud800") if document.id.endswith(":3") else document


def plan_of(*names: str, per_unit: int = 2, read=counting, **options) -> Plan:
    pieces = [Piece(name, f"/nowhere/{name}", "test", 100) for name in names]
    groups = [pieces[i : i + per_unit] for i in range(0, len(pieces), per_unit)]
    units = [Unit(f"{i:05}.jsonl.zst", tuple(group)) for i, group in enumerate(groups)]
    return Plan("test", options, read, tuple(units))


def made(folder: Path) -> dict[str, bytes]:
    """Everything a run has written that must not depend on how it went."""
    found = (
        p for p in folder.rglob("*") if p.is_file() and p.name not in ("journal.jsonl", ".lock")
    )
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def ids_in(folder: Path) -> list[str]:
    shards = sorted(p for p in folder.glob("*.jsonl.zst") if p.name[0].isdigit())
    return [document["id"] for path in shards for document in read_documents(path)]


def quarantine(folder: Path) -> dict[str, dict]:
    records = map(orjson.loads, read_lines(folder / "quarantine.jsonl.zst"))
    return {record["id"]: record for record in records}


def all_ids(*names: str, documents: int = 40) -> list[str]:
    return [f"{name}:{i}" for name in names for i in range(documents)]


# -- counts ----------------------------------------------------------------------------------------


def test_counts_of_what_went_in_came_out_and_was_dropped(tmp_path):
    summary = engine.run(plan_of("a", "b", "c"), [odd_only], tmp_path, workers=2)
    stats = read_json(tmp_path / "stats.json")
    texts = [f"text {i} " for i in range(40)]
    expected = {
        "files": {"read": 3, "bytes": 300},
        "documents": {"in": 120, "out": 60},
        "bytes": {
            "in": 3 * sum(map(len, texts)),
            "out": 3 * 2 * sum(map(len, texts[1::2])),
        },
        "dropped": {"even": 60},
        "dropped_bytes": {"even": 3 * sum(map(len, texts[::2]))},
        "noted": {"seen": 120},
        "steps": {"1 odd_only": 60},
        "step_bytes": {"1 odd_only": 3 * 2 * sum(map(len, texts[1::2]))},
    }
    assert stats["total"] == expected and stats["formats"] == {"test": expected}
    assert summary.total == expected
    one = engine.run(plan_of("a"), [], tmp_path / "one", workers=1)
    assert orjson.dumps(one.total["files"]) == b'{"read":1,"bytes":100}'
    for output in stats["outputs"]:
        assert output["sha256"] == sha256(tmp_path / output["name"])
    assert ids_in(tmp_path) == [id for id in all_ids("a", "b", "c") if int(id[2:]) % 2]
    assert "dropped: even 60" in summary.table() and "noted: seen 120" in summary.table()
    assert not (tmp_path / "quarantine.jsonl.zst").exists()


def test_every_document_that_ends_is_listed_with_its_step_and_some_with_their_text(tmp_path):
    steps = [odd_only, partial(misbehave, how="raise", ids=["a:3"])]
    engine.run(plan_of("a", "broken"), steps, tmp_path, 1, max_quarantined=1)
    lines = [orjson.loads(line) for line in read_lines(tmp_path / "dropped/00000.zst")]
    found = {line.pop("id"): line for line in lines}
    assert sorted(found) == sorted(
        [f"a:{i}" for i in range(0, 40, 2)]
        + ["a:3", "broken"]
        + [f"broken:{i}" for i in range(0, 25, 2)]
    )
    even = {"reason": "even", "bytes": 7, "step": "1 odd_only"}
    assert found["a:0"] == {**even, "sample": "text 0 "}
    assert found["broken:24"] == {**even, "bytes": 8}
    assert found["a:3"]["step"] == "2 misbehave" and "no idea what a:3" in found["a:3"]["error"]
    assert found["broken"]["step"] == "" and found["broken"]["reason"] == "damaged"
    total = read_json(tmp_path / "stats.json")["total"]
    assert list(total["steps"].items()) == [("1 odd_only", 32), ("2 misbehave", 31)]


# -- one bad record costs one record ---------------------------------------------------------------


@pytest.mark.parametrize("how", ["raise", "memory", "segfault", "kill", "exit", "hang"])
def test_a_step_that_goes_wrong_costs_the_documents_it_goes_wrong_on(tmp_path, rng, how):
    names = ("a", "b", "c")
    bad = sorted(rng.sample(all_ids(*names), 2))
    steps = [odd_only, partial(misbehave, how=how, ids=bad)]
    # the even ones never reach the step that goes wrong
    lost = [id for id in bad if int(id[2:]) % 2]
    engine.run(plan_of(*names), steps, tmp_path / "x", 2, max_quarantined=1, deadline_s=1.0)
    assert ids_in(tmp_path / "x") == [
        id for id in all_ids(*names) if int(id[2:]) % 2 and id not in lost
    ]
    total = read_json(tmp_path / "x/stats.json")["total"]
    reason = "exception" if how in ("raise", "memory") else "crash"
    assert total.get("quarantined", {}) == ({reason: len(lost)} if lost else {})
    if lost:
        listed = quarantine(tmp_path / "x")
        told = {
            "raise": "RuntimeError: no idea what",
            "memory": "MemoryError",
            "segfault": "signal SIGSEGV",
            "kill": "out of memory?",
            "exit": "ended with code 3",
            "hang": "longer than the deadline",
        }
        assert sorted(listed) == lost
        assert all(told[how] in record["error"] for record in listed.values())


def test_crashes_leave_the_same_bytes_as_dropping_the_documents(tmp_path):
    ids = ["a:7", "a:8", "d:39"]
    crash = [partial(misbehave, how="segfault", ids=ids)]
    engine.run(plan_of(*"abcd"), crash, tmp_path / "crash", 2, max_quarantined=1)
    error = [partial(misbehave, how="raise", ids=ids)]
    engine.run(plan_of(*"abcd"), error, tmp_path / "error", 1, max_quarantined=1)
    shards = [n for n in made(tmp_path / "crash") if n[0].isdigit()]
    assert len(shards) == 2
    for name in shards:
        assert (tmp_path / "crash" / name).read_bytes() == (tmp_path / "error" / name).read_bytes()


def test_a_reader_that_fails_or_crashes_costs_the_rest_of_its_input(tmp_path):
    names = ("a", "broken", "b", "crash", "c")
    engine.run(plan_of(*names, per_unit=5), [], tmp_path, 1, max_quarantined=1)
    assert ids_in(tmp_path) == [
        *all_ids("a"),
        *all_ids("broken", documents=25),
        *all_ids("b", "c"),
    ]
    listed = quarantine(tmp_path)
    assert listed["broken"]["reason"] == "damaged" and "ends here" in listed["broken"]["error"]
    assert listed["crash"]["reason"] == "crash" and "SIGSEGV" in listed["crash"]["error"]


def test_a_document_that_is_no_json_is_quarantined(tmp_path):
    engine.run(plan_of("a"), [not_json], tmp_path, 1, max_quarantined=1)
    assert "a:3" not in ids_in(tmp_path) and quarantine(tmp_path)["a:3"]["reason"] == "not_json"


# -- the limit -------------------------------------------------------------------------------------


def test_too_much_quarantine_is_refused_by_name_and_accepted_when_allowed(tmp_path):
    steps = [partial(misbehave, how="raise", ids=["c:3", "d:4", "d:9"])]
    plan = plan_of(*"abcde")
    with pytest.raises(UserError) as error:
        engine.run(plan, steps, tmp_path, 2)
    told = str(error.value)
    assert "3 of 200 documents" in told and "1.50%" in told, told
    assert "00001.jsonl.zst" in told and "c:3" in told and "quarantine.jsonl.zst" in told
    assert sorted(quarantine(tmp_path)) == ["c:3", "d:4", "d:9"]
    assert not (tmp_path / "stats.json").exists()
    # nothing is done again: only the limit is another
    journal = (tmp_path / "journal.jsonl").read_bytes()
    engine.run(plan, steps, tmp_path, 2, max_quarantined=0.015)
    assert (tmp_path / "journal.jsonl").read_bytes() == journal


def test_a_hopeless_run_is_stopped_early(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "ENOUGH_DOCUMENTS", 100)
    names = [f"{i:03}" for i in range(60)]
    ids = frozenset(all_ids(*names))
    steps = [partial(misbehave, how="raise", ids=ids)]
    with pytest.raises(UserError, match="documents had to be quarantined"):
        engine.run(plan_of(*names), steps, tmp_path, 1)
    assert len((tmp_path / "journal.jsonl").read_bytes().splitlines()) < 10


# -- resuming --------------------------------------------------------------------------------------


def test_workers_do_not_change_a_byte(tmp_path):
    steps = [odd_only, partial(misbehave, how="raise", ids=["b:3", "e:5"])]
    runs = []
    for workers in (1, 2, 5):
        engine.run(plan_of(*"abcdefg"), steps, tmp_path / str(workers), workers, 1.0)
        runs.append(made(tmp_path / str(workers)))
    assert runs[0] == runs[1] == runs[2]


def test_a_finished_run_is_not_done_again_and_a_damaged_shard_is(tmp_path):
    plan = plan_of(*"abcd")
    engine.run(plan, [], tmp_path, 1)
    before, journal = made(tmp_path), (tmp_path / "journal.jsonl").read_bytes()
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("0*")}
    engine.run(plan, [], tmp_path, 3)
    assert made(tmp_path) == before and (tmp_path / "journal.jsonl").read_bytes() == journal
    assert times == {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("0*")}
    path = tmp_path / "00001.jsonl.zst"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (tmp_path / "00000.jsonl.zst").unlink()
    (tmp_path / "00001.jsonl.zst.part-123").write_bytes(b"left by a kill")
    engine.run(plan, [], tmp_path, 1)
    assert made(tmp_path) == before


def test_a_journal_cut_anywhere_is_gone_on_from(tmp_path, rng):
    plan = plan_of(*"abcdef")
    engine.run(plan, [], tmp_path / "whole", 1)
    expected = made(tmp_path / "whole")
    journal = (tmp_path / "whole/journal.jsonl").read_bytes()
    header = journal.index(b"\n") + 1
    for cut in (0, rng.randrange(1, header), rng.randrange(header, len(journal)), len(journal) - 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(journal[:cut])
        finished = journal[:cut].count(b"\n") - 1
        for i in range(finished):
            for name in (f"{i:05}.jsonl.zst", f"dropped/{i:05}.zst"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(expected[name])
        engine.run(plan, [], folder, 2)
        assert made(folder) == expected
        assert len((folder / "journal.jsonl").read_bytes().splitlines()) == 4


def test_another_plan_is_refused_with_the_differences(tmp_path):
    engine.run(plan_of("a", "b", min_chars=1), [], tmp_path, 1)
    before = made(tmp_path)
    with pytest.raises(UserError) as error:
        engine.run(plan_of("a", "z", min_chars=5), [], tmp_path, 1)
    told = str(error.value)
    assert "options.min_chars: 1 -> 5" in told
    assert "inputs added: 1 (z)" in told and "inputs gone: 1 (b)" in told
    assert made(tmp_path) == before


def test_folders_that_are_not_ours_to_write_are_refused(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/documents.jsonl.zst").write_bytes(b"precious")
    with pytest.raises(UserError, match="holds documents.jsonl.zst but no journal"):
        engine.run(plan_of("a"), [], tmp_path / "foreign", 1)
    assert (tmp_path / "foreign/documents.jsonl.zst").read_bytes() == b"precious"
    engine.run(plan_of("a"), [], tmp_path / "mine", 1)
    with only_one(tmp_path / "mine"):
        with pytest.raises(UserError, match="another run is writing"):
            engine.run(plan_of("a"), [], tmp_path / "mine", 1)
    lines = (tmp_path / "mine/journal.jsonl").read_bytes().splitlines()
    for journal in (lines[0] + b"\n{nonsense}\n" + lines[1], b"[]", b'{"other": 1}'):
        (tmp_path / "mine/journal.jsonl").write_bytes(journal + b"\n")
        with pytest.raises(UserError, match="journal.jsonl is damaged"):
            engine.run(plan_of("a"), [], tmp_path / "mine", 1)


def text_files(folder: Path, rng, n: int = 60) -> Path:
    folder.mkdir()
    for i in range(n):
        words = " ".join(rng.randbytes(rng.randrange(1, 9)).hex() for _ in range(4000))
        (folder / f"{i:03}.txt").write_text(words)
    (folder / "lines.jsonl").write_text(
        "".join(f'{{"text": "line {i}"}}\n' if i % 500 else "bad\n" for i in range(20_000))
    )
    return folder


def test_input_that_is_edited_is_refused_and_copied_input_is_not(tmp_path, rng):
    text_files(tmp_path / "in", rng, 8)
    options = plain.Options(source="x", unit_bytes=60_000)

    def go(folder: Path, workers: int = 1) -> None:
        plan = plain.plan(options, [folder])
        engine.run(plan, plain.steps(options), tmp_path / "out", workers)

    go(tmp_path / "in", 2)
    before = made(tmp_path / "out")
    shutil.copytree(tmp_path / "in", tmp_path / "copy", copy_function=shutil.copyfile)
    go(tmp_path / "copy")
    # one unit is lost, another one's input is edited to the same size
    (tmp_path / "out/00000.jsonl.zst").unlink()
    file = tmp_path / "copy/007.txt"
    content = file.read_text()
    file.write_text(content.swapcase())
    with pytest.raises(UserError, match=r"out was begun with other bytes in .*007.txt \(1 such"):
        go(tmp_path / "copy")
    file.write_text(content)
    go(tmp_path / "copy")
    assert made(tmp_path / "out") == before


def corpus_run(folder: Path, output: Path, **how) -> subprocess.Popen:
    line = [sys.executable, "-m", "llama.corpus", "run", "--config", str(CONFIG), "--workers", "2"]
    line += [
        "--source",
        "mine",
        "--unit_bytes",
        "40k",
        "--input",
        str(folder),
        "--output",
        str(output),
    ]
    how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen(line, cwd=ROOT, start_new_session=True, text=True, **how)


def finished_units(output: Path) -> int:
    journal = output / "journal.jsonl"
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_the_same_bytes(tmp_path, rng):
    folder = text_files(tmp_path / "in", rng)
    assert corpus_run(folder, tmp_path / "calm").wait() == 0
    expected = made(tmp_path / "calm")
    units = sum(name[0].isdigit() for name in expected)
    midway = 0
    for trial in range(4):
        output = tmp_path / f"killed{trial}"
        for _ in range(3):
            process = corpus_run(folder, output)
            wanted = rng.randrange(units)
            while finished_units(output) < wanted and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02) if wanted else rng.uniform(0, 0.5))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            midway += 0 < finished_units(output) < units
        assert corpus_run(folder, output).wait() == 0
        assert made(output) == expected
    print(f"{midway} of 12 kills hit a run with some units finished and some not")
    assert midway


def wait_for_nobody(group: int) -> None:
    """Return once no process of the group is left; helpers of Python take a moment to notice."""
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError("processes are left")


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_no_half_file(tmp_path, rng):
    folder = text_files(tmp_path / "in", rng)
    process = corpus_run(folder, tmp_path / "out")
    while not list(tmp_path.glob("out/0*.jsonl.zst")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() in (0, 130)
    wait_for_nobody(process.pid)
    assert corpus_run(folder, tmp_path / "out").wait() == 0
    assert not list(tmp_path.glob("out/*.part-*"))


@pytest.mark.parametrize("limit", [10_000, 100])
def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(tmp_path, rng, limit):
    folder = text_files(tmp_path / "in", rng, n=6)
    assert corpus_run(folder, tmp_path / "calm").wait() == 0

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = corpus_run(folder, tmp_path / "out", preexec_fn=small_files_only)
    _, told = process.communicate()
    assert process.returncode == 2, told
    last = told.splitlines()[-1]
    what = "units are not done" if limit == 10_000 else "cannot be written"
    assert last.startswith("error: ") and what in last and "Errno" in last
    assert not (tmp_path / "out/stats.json").exists()
    assert corpus_run(folder, tmp_path / "out").wait() == 0
    assert made(tmp_path / "out") == made(tmp_path / "calm")


def test_an_input_that_vanishes_is_listed(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / f"in/{name}.txt").write_text(name)
    options = plain.Options(source="x")
    plan = plain.plan(options, [tmp_path / "in"])
    (tmp_path / "in/a.txt").unlink()
    summary = engine.run(plan, plain.steps(options), tmp_path / "out", 1, max_quarantined=1)
    assert ids_in(tmp_path / "out") == ["b.txt"]
    assert quarantine(tmp_path / "out")["a.txt"]["reason"] == "unreadable"
    assert summary.quarantined == 1
