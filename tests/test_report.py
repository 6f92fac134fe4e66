"""Reports: numbers of runs as they were written, pictures that repeat, pages that stand alone."""

import base64
import contextlib
import math
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import yaml
from made_data import make_source, make_tokenizer

from llama import config, files, html
from llama.cli import UserError
from llama.data import ledger
from llama.data.order import Order, from_json
from llama.data.writer import Vocabulary, place_tokenizer
from llama.html import Markup, Picture, tag
from llama.report import __main__ as command
from llama.report import runs
from tokenizer.tokenizer import Tokenizer

matplotlib = pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
from llama.report import plots  # noqa: E402

ROOT = Path(__file__).parent.parent
PNG = b"\x89PNG\r\n\x1a\n"


def made_rows(rng: random.Random, n: int = 80, sources: tuple[str, ...] = ("code", "mail")) -> list:
    rows = []
    for step in range(1, n + 1):
        row: dict[str, Any] = {"step": step, "tokens": 1024 * step, "loss": 4 + rng.random()}
        row |= {"lr": step * 1e-5, "grad_norm": rng.lognormvariate(0, 1)}
        row |= {"tokens_per_s": 900 + 200 * rng.random(), "data_wait_pct": rng.random()}
        row |= {f"loss/{name}": 4 + rng.random() for name in sources}
        if step % 10 == 0:
            row |= {f"val/{name}": 4 + rng.random() for name in sources}
        rows.append(row)
    return rows


def write_run(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """A run folder without checkpoint; `changes` are dotted keys with __ for dots."""
    settings: dict[str, Any] = config.to_dict(config.Config())
    settings["data"] |= {"mixture": {"code": 0.7, "mail": 0.3}, "path": str(folder / "none")}
    settings["model"]["vocab_size"] = 512
    for key, value in changes.items():
        part, _, name = key.partition("__")
        settings[part][name] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    (folder / "metrics.jsonl").write_bytes(lines)
    return folder


def read_one(folder: Path) -> runs.Run:
    return runs.read([str(folder)])[0]


# -- numbers ---------------------------------------------------------------------------------------


def test_series_are_the_rows_that_have_the_key(tmp_path: Path, rng: random.Random) -> None:
    rows = made_rows(rng)
    for row in rows:
        for key in rng.sample(sorted(row), 3):
            if key != "step":
                del row[key]
    lost = rng.choice([row for row in rows if "loss" in row and "tokens" in row])
    lost["loss"] = math.nan  # orjson writes null
    run = read_one(write_run(tmp_path / "run", rows))
    for key in ("loss", "lr", "loss/code", "val/mail", "no such key"):
        tokens, values = run.series(key)
        expected = [(r["tokens"], r[key]) for r in rows if key in r and "tokens" in r]
        assert tokens == [t for t, _ in expected]
        np.testing.assert_array_equal(values, [v for _, v in expected])
    assert "1 log line without a finite loss" in command.state(run)


def test_a_row_still_being_written_is_left_out_and_a_broken_one_is_named(
    tmp_path: Path, rng: random.Random
) -> None:
    rows = made_rows(rng, 9)
    folder = write_run(tmp_path / "run", rows)
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: -rng.randrange(2, 60)])
    assert read_one(folder).rows == rows[:8]
    lines = whole.splitlines(keepends=True)
    for bad, problem in (
        (b'{"step": 3,\n', "is not valid JSON"),
        (b'{"step": "x"}\n', "is no row"),
    ):
        path.write_bytes(b"".join([*lines[:4], bad, *lines[5:]]))
        with pytest.raises(UserError, match=f"metrics.jsonl:5 {problem}"):
            read_one(folder)


def test_validation_is_averaged_so_that_runs_compare(tmp_path: Path, rng: random.Random) -> None:
    rows = made_rows(rng, 20)
    one = read_one(write_run(tmp_path / "one", rows))
    same = read_one(write_run(tmp_path / "same", made_rows(rng, 20)))
    other = read_one(
        write_run(tmp_path / "other", made_rows(rng, 20), data__mixture={"code": 0.1, "mail": 0.9})
    )
    more = read_one(write_run(tmp_path / "more", made_rows(rng, 20, ("mail", "news"))))
    bare = read_one(write_run(tmp_path / "bare", []))
    assert runs.validation_weights([one, same, bare]) == ({"code": 0.7, "mail": 0.3}, True)
    assert runs.validation_weights([one, other]) == ({"code": 1.0, "mail": 1.0}, False)
    assert runs.validation_weights([one, more])[0].keys() == {"mail"}
    assert runs.validation_weights([bare])[0] == {}
    tokens, means = one.validation({"code": 0.7, "mail": 0.3})
    assert tokens == [10 * 1024, 20 * 1024]
    truth = [0.7 * rows[i]["val/code"] + 0.3 * rows[i]["val/mail"] for i in (9, 19)]
    assert means == pytest.approx(truth)
    assert bare.validation({"code": 1.0}) == ([], [])


def test_smoothing_is_a_centred_mean_of_what_is_finite(rng: random.Random) -> None:
    for _ in range(30):
        n = rng.randrange(1, 200)
        values = np.array([rng.choice([rng.random(), rng.random(), math.nan]) for _ in range(n)])
        width = 2 * rng.randrange(0, 8) + 1
        for i, mean in enumerate(plots.smoothed(values, width)):
            near = values[max(0, i - width // 2) : i + width // 2 + 1]
            near = [v for v in near if math.isfinite(v)]
            if near:
                assert mean == pytest.approx(sum(near) / len(near))
            else:
                assert math.isnan(mean)


def test_every_difference_of_configurations_is_listed(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [], optim__lr=0.1, model__n_kv_heads=2)
    b = write_run(tmp_path / "b", [], data__mixture={"code": 1.0}, optim__betas=[0.8, 0.9])
    files.write_json(a / "env.json", {"torch": "2.13.0", "device": "cpu"})
    files.write_json(b / "env.json", {"torch": "2.11.0", "device": "cpu"})
    columns, rows = runs.config_differences(runs.read([str(a), str(b)]))
    assert columns == ["a", "b"]
    assert dict(rows) == {
        "optim.lr": [0.1, 1e-3],
        "model.n_kv_heads": [2, None],
        "data.mixture.code": [0.7, 1.0],
        "data.mixture.mail": [0.3, "–"],
        "data.path": [str(a / "none"), str(b / "none")],
        "optim.betas": [[0.9, 0.95], [0.8, 0.9]],
        "env: torch": ["2.13.0", "2.11.0"],
    }
    columns, rows = runs.config_differences([read_one(a)])
    assert columns == ["default", "a"] and dict(rows)["optim.lr"] == [1e-3, 0.1]
    assert "optim.eps" not in dict(rows) and "name" not in dict(rows)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [str(write_run(tmp_path / k / "run", [])) for k in "ab"]
    assert [run.label for run in runs.read(paths)] == paths
    with pytest.raises(UserError, match="named twice"):
        runs.read([paths[0], paths[0] + "/"])


# -- pictures --------------------------------------------------------------------------------------


def test_pictures_depend_on_the_numbers_and_on_nothing_else(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = made_rows(rng)
    run = read_one(write_run(tmp_path / "run", rows))
    lines = [ledger.Spent("code", 690, 700.0, 0.1, 1000)]
    monkeypatch.setattr(plots, "mixture", lambda _: (9, lines))
    first = plots.draw([run])
    assert list(first) == ["loss", "sources", "optimizer", "speed", "mixture"]
    assert all(picture.png.startswith(PNG) for picture in first.values())
    assert "mean over 5 log lines" in first["loss"].caption
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "axes.grid": False}):
        assert plots.draw([run]) == first
    assert dict(matplotlib.rcParams) == before
    changed = {"loss": "loss", "lr": "optimizer", "grad_norm": "optimizer", "val/code": "sources"}
    changed |= {"tokens_per_s": "speed", "data_wait_pct": "speed", "loss/mail": "sources"}
    for key, name in changed.items():
        other = [row | {key: row[key] * 1.5} if key in row else row for row in rows]
        drawn = plots.draw([read_one(write_run(tmp_path / key.replace("/", "-"), other))])
        assert drawn[name].png != first[name].png, key
        assert drawn["mixture"] == first["mixture"]


@pytest.mark.parametrize("n", [0, 1, 2, 9])
@pytest.mark.parametrize(
    "without", [(), ("val/",), ("loss/", "val/"), ("lr", "grad", "tokens_per")]
)
def test_few_rows_and_missing_keys_draw_what_there_is(
    tmp_path: Path, rng: random.Random, n: int, without: tuple[str, ...]
) -> None:
    rows = [
        {k: v for k, v in row.items() if not k.startswith(without or ("none",))}
        for row in made_rows(rng, n)
    ]
    if n > 2:
        rows[1] |= {"loss": math.inf, "grad_norm": math.nan}
    drawn = plots.draw([read_one(write_run(tmp_path / "run", rows))])
    keys = {key for row in rows for key in row}
    assert ("loss" in drawn) == bool(n)
    assert ("sources" in drawn) == any(key.startswith(("loss/", "val/")) for key in keys)
    assert ("optimizer" in drawn) == bool({"lr", "grad_norm"} & keys)


@pytest.mark.slow
def test_many_runs_and_awkward_names_are_drawn(
    tmp_path: Path,
    rng: random.Random,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["_hidden", "a$b$c", "x_{1}", "long-" * 12, *(f"run-{i}" for i in range(17))]
    sources = ("$x$", "_y", "<b>z</b>", *(f"s{i}" for i in range(12)))
    paths = [str(write_run(tmp_path / n, made_rows(rng, 12, sources))) for n in names]
    found = runs.read(paths)
    lines = [ledger.Spent(s, 1, 1.0, 0.1, 10) for s in sources]
    assert len(found) == len({tuple(map(str, run.look.values())) for run in found}) == 21
    with pytest.raises(UserError, match="22 runs are given, 21 can be told apart"):
        runs.read([*paths, "more"])
    monkeypatch.setattr(plots, "mixture", lambda _: (9, lines))
    assert len(plots.draw(found)) == 5
    assert not [str(w.message) for w in recwarn]


# -- the page --------------------------------------------------------------------------------------


class Checked(HTMLParser):
    """Refuses tags that do not close, and collects pictures and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[bytes] = []
        self.tags: set[str] = set()
        self.shown = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        assert not {"href", "onload", "onerror", "srcset"} & values.keys()
        if tag == "img":
            kind, _, data = str(values["src"]).partition(",")
            assert kind == "data:image/png;base64" and values["alt"]
            self.pictures.append(base64.b64decode(data))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_a_page_stands_alone_and_its_pictures_lie_beside_it(
    tmp_path: Path, rng: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run(tmp_path / "a", made_rows(rng))
    b = write_run(tmp_path / "b", made_rows(rng), optim__lr=0.5)
    out = tmp_path / "out" / "compare.html"
    command.main([str(a), str(b), "-o", str(out), "--samples", "1"])
    text = out.read_text()
    shown = Checked(text)
    assert "script" not in shown.tags and "link" not in shown.tags
    assert not re.search(r"url\(|@import|https?:", text)
    names = ["loss", "sources", "optimizer", "speed"]
    beside = [(out.parent / f"compare-{name}.png").read_bytes() for name in names]
    assert shown.pictures == beside
    assert {path.name for path in out.parent.iterdir()} == {
        "compare.html", *(f"compare-{name}.png" for name in names)
    }  # fmt: skip
    assert "optim.lr" in shown.shown and "has no checkpoint yet" in shown.shown
    assert "compare.html" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    command.main([str(a), str(b), "-o", str(out), "--samples", "1"])
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before


def test_what_a_run_holds_cannot_become_markup(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = '<script>alert("x")</script>&amp;\x00\x1b[31m'
    rows = made_rows(rng, 12, (bad,))
    folder = write_run(tmp_path / "run", rows, data__mixture={bad: 1.0}, data__path=bad)
    files.write_json(folder / "EXIT_REASON", {"exit": "failed", "why": bad, "step": 1})
    passage = ledger.Passage(0, bad, 0, 0, bad, 0, 9, 9, 0)
    monkeypatch.setattr(runs, "samples", lambda *_: [(bad, bad, bad)])
    monkeypatch.setattr(runs, "extracts", lambda _: [(1, passage, bad)])
    text = command.page([read_one(folder)], {"loss": Picture(bad, bad, PNG)}, 1)
    shown = Checked(text)
    assert "script" not in shown.tags
    assert shown.shown.count('<script>alert("x")</script>&amp;') >= 8
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)


def test_a_table_shows_every_cell_and_numbers_at_the_right(rng: random.Random) -> None:
    n = rng.randrange(10_000)
    rows = [[n, "3 of 7", "−0.3 %", "<b>", tag("code", "x&y")], ["–", "–", 1, "9 lives", "1"]]
    text = html.table(["a", "b", "c", "d", "e"], rows)
    assert Checked(text).shown.split("\n") == [
        "abcde", f"{n:,}3 of 7−0.3 %<b>x&y", "––19 lives1", ""
    ]  # fmt: skip
    assert (
        re.findall(r"<td( class=\"n\")?>", text)
        == [' class="n"'] * 3 + [""] * 2 + [' class="n"'] * 3 + [""] * 2
    )
    assert html.table(["a"], []).count("<th>") == 1
    assert isinstance(text, Markup)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    (folder / "metrics.jsonl").unlink()
    command.main([str(folder)])
    text = Checked((folder / "report.html").read_text()).shown
    assert "No log line is written yet" in text and "0 of 123" in text
    assert not list(folder.glob("*.png"))


REFUSED = {
    "no such run": (["nothing"], "nothing is no run folder"),
    "broken config": (["broken"], "broken/config.yaml is not readable YAML"),
    "two runs, no page": (["good", "other"], "name the page, as in -o compare.html"),
    "no html": (["good", "-o", "page.pdf"], "expected a file name that ends in .html"),
    "a folder": (["good", "-o", "folder.html"], "expected a file name that ends in .html"),
    "twice": (["good", "./good", "-o", "x.html"], "named twice"),
    "samples": (["good", "--samples", "-1"], "--samples is -1"),
    "not a number": (["good", "--samples", "x"], "samples"),
    "unknown option": (["good", "--sample", "1"], "samples"),
    "broken verdict": (["torn"], "torn/EXIT_REASON is not valid JSON"),
    "no place": (["good", "-o", "config/x.html"], "cannot be written"),
    "nothing given": ([], "run"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("good", "other", "broken", "torn"):
        write_run(tmp_path / name, made_rows(rng, 3))
    (tmp_path / "broken" / "config.yaml").write_text("{a: [")
    (tmp_path / "torn" / "EXIT_REASON").write_text("{")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "config").write_text("a file, where a folder is asked for")
    before = sorted(tmp_path.rglob("*"))
    words, sentence = REFUSED[case]
    with pytest.raises(UserError) as error:
        command.main(words)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_one_sentence_names_the_extra(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    code = (
        "import sys; sys.modules['matplotlib'] = None; from llama import cli\n"
        "from llama.report.__main__ import main; cli.run(main)"
    )
    run = [sys.executable, "-c", code]
    result = subprocess.run([*run, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and not list(folder.glob("report*"))
    assert re.fullmatch(r"error: .* needs matplotlib.* install .*\[report\]'\n", result.stderr)
    assert subprocess.run([*run, "--help"], cwd=ROOT, capture_output=True).returncode == 0


# -- a real run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps on two sources, with its tokenizer and shards."""
    place = tmp_path_factory.mktemp("trained")
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    pieces = Tokenizer(make_tokenizer(place / "tokenizer") / "tokenizer.model")
    vocabulary = Vocabulary(pieces.sha256, pieces.vocab_size, pieces.bos_id, pieces.eos_id)
    for name in ("code", "mail"):
        words = ["def return", "the model of", "window = 3", "token and self"]
        documents = [
            (f"{name}/{i}", [1, *pieces.encode(" ".join(rng.choices(words, k=9))), 2])
            for i in range(150)
        ]
        make_source(place / "tokens" / name, [documents[:70], documents[70:]], vocabulary, 1000)
    place_tokenizer(Path(pieces.path), place / "tokens")
    options = {
        "name": "real", "data.path": "tokens", "data.mixture": "{code: 0.7, mail: 0.3}",
        "model.dim": 32, "model.n_layers": 1, "model.n_heads": 2, "data.seq_len": 32,
        "train.batch_tokens": 256, "train.tokens": 2560, "log.every": 1, "checkpoint.every": 10,
        "validation.every": 5, "validation.tokens": 256, "optim.warmup_steps": 2,
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in options.items()]
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=place, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return place


@pytest.mark.slow
def test_the_report_of_a_real_run(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    command.main(["runs/real", "--samples", "3"])
    folder = trained / "runs" / "real"
    shown = Checked((folder / "report.html").read_text())
    assert shown.pictures[0] == (folder / "loss.png").read_bytes() and len(shown.pictures) == 5
    run = read_one(Path("runs/real"))
    # what was drawn, counted batch by batch
    state = files.read_json(folder / "ckpt" / "step-00000010" / "state.json")
    order = Order(0, from_json(state["segments"]))
    drawn = np.concatenate([order.batch(step).sources for step in range(10)])
    step, lines = runs.mixture(run)
    assert step == 10 and [m.source for m in lines] == ["code", "mail"]
    for m in lines:
        assert m.tokens == 32 * int((drawn == order.names.index(m.source)).sum())
        assert abs(m.tokens - m.planned) <= 32 and m.total == 2560
        assert m.planned / 2560 == pytest.approx({"code": 0.7, "mail": 0.3}[m.source], abs=1e-4)
    # what the ledger says about the same rows
    capsys.readouterr()
    extracts = list(runs.extracts(run))
    assert {step for step, _, _ in extracts} == {1, 5, 10}
    for number in (1, 5, 10):
        ledger.main(["runs/real", "--step", str(number)])
        listed = capsys.readouterr().out
        for p in (p for step, p, _ in extracts if step == number):
            place = f"{p.first}-{p.end - 1} of {p.of}"
            line = rf"{p.row} +{p.source} +{p.epoch + 1} +{p.window} +{place} +{p.document}"
            assert re.search(rf"^ *{line}$", listed, re.M), (line, listed)
    assert any(text.strip() for _, _, text in extracts)
    sources, prompts, texts = zip(*runs.samples(run, 4), strict=True)
    assert sources == ("code", "mail", "code", "mail")
    assert all(prompts) and any(texts)
    for prompt in prompts[:3]:
        assert html.text(prompt) in (folder / "report.html").read_text()


@pytest.mark.slow
def test_what_has_gone_missing_is_said(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "copy"
    shutil.copytree(trained, place)
    monkeypatch.chdir(place)
    report = Path("runs/real/report.html")

    def shown() -> str:
        with contextlib.suppress(FileNotFoundError):
            report.unlink()
        command.main(["runs/real", "--samples", "1"])
        return Checked(report.read_text()).shown

    shutil.rmtree("tokens/mail/train")
    text = shown()
    assert "tokens/mail/train holds no finished source" in text and "after code" in text
    shutil.rmtree("tokenizer")
    Path("tokens", "tokenizer.model").unlink()
    assert re.search("No samples: .*tokenizer", shown())
    weights = next(Path("runs/real/ckpt/step-00000010").glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "No samples" in (text := shown()) and "70.0" in text
    state = Path("runs/real/ckpt/step-00000010/state.json")
    state.write_text('{"step": 10}')
    assert "state.json is not what train.py writes" in shown()
