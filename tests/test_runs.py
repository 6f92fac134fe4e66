"""Runs of the main job: real commands, real formats, one and more gloo processes on a CPU.

Text becomes documents, a tokenizer, shards; then a list of runs, each with what must hold.
"""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import train
from llama import config
from llama.cli import UserError
from llama.data import order
from llama.runtime import checkpoint, world

ROOT = Path(__file__).parent.parent
ENV = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
pytestmark = pytest.mark.slow

STEPS = 20
OPTIONS = {
    "seed": 3,
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "data.path": "tokens",
    "data.mixture": "mixture.yaml",
    "data.seq_len": 64,
    "train.batch_tokens": 1024,
    "train.tokens": 1024 * STEPS,
    "optim.lr": 5e-3,
    "optim.warmup_steps": 2,
    "validation.every": 6,
    "validation.tokens": 2048,
    "checkpoint.every": 4,
    "log.every": 1,
}


def _call(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(words, cwd=cwd, env=ENV, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with token shards of two sources, made by the project's own commands."""
    place = tmp_path_factory.mktemp("main job")
    library = Path(os.__file__).parent
    for source, pattern in {"code": "a*.py", "mail": "email/*.py"}.items():
        texts = place / "raw" / source
        texts.mkdir(parents=True)
        for path in sorted(library.glob(pattern)):
            shutil.copy(path, texts / path.name)
        _call(
            sys.executable, "-m", "llama.corpus", "run",
            "--config", str(ROOT / "configs/corpus/plain.yaml"),
            "--input", f"raw/{source}", "--output", f"documents/{source}",
            cwd=place,
        )  # fmt: skip
    (place / "mixture.yaml").write_text("code: 0.7\nmail: 0.3\n")
    _call(
        sys.executable, "-m", "tokenizer.train", "--config", str(ROOT / "configs/tokenizer.yaml"),
        "--vocab_size", "512", "--input", "documents", "--mixture", "mixture.yaml",
        "--output", "tokenizer", cwd=place,
    )  # fmt: skip
    _call(
        sys.executable, "-m", "llama.data.tokenize", "--input", "documents",
        "--tokenizer", "tokenizer", "--output", "tokens", "--valid_per_10k", "2000",
        cwd=place,
    )  # fmt: skip
    return place


@dataclass
class Run:
    """One start of train.py in a workspace."""

    place: Path
    name: str
    world: int = 1
    options: dict[str, object] = field(default_factory=dict)
    torchrun: bool = True

    @property
    def folder(self) -> Path:
        return self.place / "runs" / self.name

    def command(self) -> list[str]:
        options = {**OPTIONS, "name": self.name, **self.options}
        words = [f"--{key}={value}" for key, value in options.items()]
        start = [sys.executable]
        if self.torchrun and self.world > 1:
            start = [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", str(self.world),
                "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGUSR2",
            ]  # fmt: skip
        return [*start, str(ROOT / "train.py"), *words]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(),
            cwd=self.place,
            env=ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, expect: int = 0) -> str:
        child = self.start()
        output, _ = child.communicate(timeout=300)
        assert child.returncode == expect, output
        return output

    def rows(self) -> list[dict[str, float]]:
        return list(map(json.loads, (self.folder / "metrics.jsonl").open()))

    def verdict(self) -> str:
        return str(json.loads((self.folder / "EXIT_REASON").read_text())["exit"])

    def wait_for_step(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        for _ in range(1200):
            if path.exists() and len(path.read_bytes().splitlines()) >= step:
                return
            time.sleep(0.05)
        raise AssertionError(f"{self.name} never reached step {step}")


def _losses(rows: list[dict[str, float]]) -> list[tuple[float, float]]:
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [(row["loss"], row["grad_norm"]) for row in rows]


def _exact(row: dict[str, float]) -> dict[str, float]:
    """What a row says about the model, without speed and memory."""
    keep = ("step", "tokens", "loss", "lr", "grad_norm")
    return {k: v for k, v in row.items() if k in keep or k.startswith(("loss/", "val/"))}


def _weights(run: Run) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint of a run, whole."""
    path = checkpoint.newest(run.folder)
    reader = checkpoint.Reader(path)
    listed = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size) for name, entry in listed.items()}
    torch.distributed.checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.fixture(scope="session")
def single(workspace: Path) -> Run:
    run = Run(workspace, "single")
    output = run.finish()
    assert f"{STEPS}/{STEPS}" in output and run.verdict() == "done"
    assert "1 micro-step per step" in output and "first line after one step" in output
    return run


@pytest.fixture(scope="session")
def double(workspace: Path) -> Run:
    run = Run(workspace, "double", world=2)
    run.finish()
    assert run.verdict() == "done"
    return run


def test_loss_falls_and_every_key_is_there(single: Run) -> None:
    rows = single.rows()
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    keys = {
        "step", "branch", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "tokens_per_s_gpu",
        "memory_gib", "data_wait_pct", "eta_s", "spikes", "skipped_steps",
        "loss/code", "loss/mail", "val/code", "val/mail",
    }  # fmt: skip
    assert set(rows[-1]) == keys
    # the row after a checkpoint says what its step waited
    assert [row["step"] for row in rows if "checkpoint_stall_s" in row] == [5, 9, 13, 17]
    assert rows[-1]["tokens"] == 1024 * STEPS
    assert rows[-1]["lr"] == pytest.approx(5e-4) and rows[-1]["eta_s"] == 0
    assert max(row["lr"] for row in rows) == pytest.approx(5e-3)
    # untrained, the model knows nothing: the loss is that of guessing among 512 pieces
    assert rows[0]["loss"] == pytest.approx(math.log(512), abs=0.1)


def test_run_folder_holds_what_the_design_says(single: Run) -> None:
    names = {path.name for path in single.folder.iterdir()} - {".lock"}
    files = {"config.yaml", "metrics.jsonl", "train.log", "env.json", "EXIT_REASON"}
    assert names == files | {"ckpt", "stacks"}
    steps = [step for step, _ in checkpoint.steps(single.folder)]
    assert steps == [16, 20]
    log = (single.folder / "train.log").read_text()
    assert f" {STEPS}/{STEPS} " in log and max(map(len, log.splitlines())) <= 100
    state = checkpoint.read_state(checkpoint.newest(single.folder))
    assert state["step"] == STEPS and state["adam_steps"] == STEPS


def test_two_processes_train_the_same_model(single: Run, double: Run) -> None:
    pairs = zip(_losses(single.rows()), _losses(double.rows()), strict=True)
    for step, ((loss, norm), (other, other_norm)) in enumerate(pairs, 1):
        assert other == pytest.approx(loss, rel=1e-6), step
        assert other_norm == pytest.approx(norm, rel=1e-5), step
    for key in ("val/code", "val/mail"):
        assert double.rows()[-1][key] == pytest.approx(single.rows()[-1][key], rel=1e-6)


def test_first_gradients_agree_per_tensor(workspace: Path) -> None:
    """After one step Adam's first moment is the gradient, but for a factor they share."""
    moments = []
    for size in (1, 2):
        run = Run(workspace, f"one-step-{size}", size, {"train.tokens": 1024})
        run.finish()
        moments.append({k: t for k, t in _weights(run).items() if k.startswith("exp_avg.")})
    alone, shared = moments
    assert alone.keys() == shared.keys() and len(alone) == 2 * 9 + 3
    for name, gradient in alone.items():
        assert gradient.norm() > 0
        assert (shared[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_run_repeats_itself_to_the_bit(workspace: Path, double: Run) -> None:
    again = Run(workspace, "again", world=2)
    again.finish()
    assert list(map(_exact, again.rows())) == list(map(_exact, double.rows()))


def test_killed_at_random_moments_it_ends_bit_equal(workspace: Path, double: Run, rng) -> None:
    run = Run(workspace, "killed", world=2, options={"checkpoint.every": 2})
    for step in sorted(rng.sample(range(2, STEPS), 2)):
        child = run.start()
        run.wait_for_step(step)
        time.sleep(rng.random() * 0.1)
        _kill_all(child)
    output = run.finish()
    assert "resuming runs/killed from step" in output
    assert list(map(_exact, run.rows())) == list(map(_exact, double.rows()))
    ours, theirs = _weights(run), _weights(double)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _kill_all(child: subprocess.Popen[str]) -> None:
    """SIGKILL torchrun and its workers, which live in sessions of their own."""
    listed = subprocess.run(
        ["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    children = [
        int(p) for p, parent in map(str.split, listed.splitlines()) if int(parent) == child.pid
    ]
    for pid in [child.pid, *children]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    child.communicate()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_saves_once_and_the_same_command_goes_on(
    workspace: Path, double: Run, name: str
) -> None:
    run = Run(workspace, f"stopped {name}".replace(" ", "-"), 2, {"checkpoint.every": 1000})
    child = run.start()
    run.wait_for_step(3)
    child.send_signal(getattr(signal, name))
    output, _ = child.communicate(timeout=120)
    reason = json.loads((run.folder / "EXIT_REASON").read_text())
    assert reason["exit"] == "requeue" and reason["why"] == name, output
    assert [step for step, _ in checkpoint.steps(run.folder)] == [reason["step"]]
    assert 3 <= reason["step"] < STEPS
    run.finish()
    assert run.verdict() == "done"
    assert list(map(_exact, run.rows())) == list(map(_exact, double.rows()))


def test_a_batch_ramp_resumes_inside_documents(workspace: Path) -> None:
    """Smaller batches first, attention and loss inside documents, stopped within the ramp."""
    options: dict[str, object] = {
        "train.batch_ramp": "[[512,4],[768,4]]",
        "data.attend_across_documents": "false",
        "data.boundary_loss": "false",
        "optim.schedule": "wsd",
        "log.tensorboard": "true",
    }
    whole, stopped = Run(workspace, "ramp", 1, options), Run(workspace, "ramp-stopped", 1, options)
    whole.finish()
    child = stopped.start()
    stopped.wait_for_step(2)
    child.send_signal(signal.SIGUSR2)
    child.communicate(timeout=120)
    assert stopped.verdict() == "requeue"
    stopped.finish()
    rows = whole.rows()
    assert list(map(_exact, stopped.rows())) == list(map(_exact, rows))
    batches = [int(b["tokens"] - a["tokens"]) for a, b in zip(rows, rows[1:], strict=False)]
    assert [int(rows[0]["tokens"]), *batches] == [512] * 4 + [768] * 4 + [1024] * 15
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert list((whole.folder / "tensorboard").iterdir())


def test_without_torchrun_a_signal_exits_75(workspace: Path, single: Run) -> None:
    run = Run(workspace, "interrupted", options={"checkpoint.every": 1000})
    child = run.start()
    run.wait_for_step(2)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 75, output
    assert run.verdict() == "requeue"
    run.finish()
    assert list(map(_exact, run.rows())) == list(map(_exact, single.rows()))


def test_resumed_on_another_world_it_trains_the_same_model(workspace: Path, single: Run) -> None:
    run = Run(workspace, "moved", 2, {"checkpoint.every": 1000})
    child = run.start()
    run.wait_for_step(5)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=120)
    moved = Run(workspace, "moved", 1)
    moved.finish()
    for (loss, _), (other, _) in zip(_losses(moved.rows()), _losses(single.rows()), strict=True):
        assert other == pytest.approx(loss, rel=1e-6)


@pytest.mark.full
@pytest.mark.faults
def test_moved_again_and_again_it_trains_the_same_model(
    workspace: Path, single: Run, score
) -> None:
    worlds = (1, 2, 4, 2, 1)
    for number, size in enumerate(worlds):
        run = Run(workspace, "moving", size, {"checkpoint.every": 1000})
        if number + 1 == len(worlds):
            run.finish()
            break
        child = run.start()
        run.wait_for_step(4 * number + 2)
        child.send_signal(signal.SIGTERM)
        output, _ = child.communicate(timeout=300)
        assert run.verdict() == "requeue", output
    pairs = zip(_losses(run.rows()), _losses(single.rows()), strict=True)
    apart = max(abs(loss - other) / other for (loss, _), (other, _) in pairs)
    score("resume.worlds", len(worlds) - 1, ">= 4")
    score("resume.loss", apart, "<= 1e-6")
    assert apart <= 1e-6


def test_a_run_is_verified_by_its_world_and_by_another(workspace: Path, double: Run) -> None:
    before = {p: p.stat().st_mtime_ns for p in double.folder.rglob("*")}
    command = ["-m", "llama.verify", "runs/double"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    said = _call(*start, "--nproc-per-node", "2", *command, cwd=workspace).stdout
    assert "steps 17 to 20" in said and "4 rows of metrics.jsonl    bit-equal" in said
    assert "tensors                 bit-equal" in said
    said = _call(sys.executable, *command, cwd=workspace).stdout
    assert "bits are not compared, for processes: 2 -> 1" in said
    assert "equal to 1e-06, largest difference" in said
    assert {p: p.stat().st_mtime_ns for p in double.folder.rglob("*")} == before


LAYOUTS = [
    {"train.micro_batch": 3},
    {"train.dtype": "float32", "kernels.attention": "reference"},
    {"parallel.recompute": "full"},
    {"parallel.recompute": "manual"},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=[str(o) for o in LAYOUTS])
def test_choices_that_must_not_change_the_loss(
    workspace: Path, single: Run, options: dict[str, object]
) -> None:
    name = "-".join(str(v) for v in options.values())
    run = Run(workspace, f"layout-{name}", options=options)
    run.finish()
    for (loss, _), (other, _) in zip(_losses(run.rows()), _losses(single.rows()), strict=True):
        assert other == pytest.approx(loss, rel=1e-6)


@pytest.mark.full
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (4, {}),
        (2, {"parallel.replicate": 2, "parallel.shard": 1}),
        (4, {"parallel.replicate": 2, "parallel.recompute": "manual"}),
        (2, {"parallel.recompute": "selective"}),
    ],
)
def test_more_layouts(workspace: Path, single: Run, size: int, options: dict[str, object]) -> None:
    run = Run(workspace, f"layout-{size}-{len(options)}", size, options)
    run.finish()
    for (loss, _), (other, _) in zip(_losses(run.rows()), _losses(single.rows()), strict=True):
        assert other == pytest.approx(loss, rel=1e-6)


def test_the_ledger_of_a_run_and_of_a_damaged_one(workspace: Path, single: Run) -> None:
    ledger = [sys.executable, "-m", "llama.data.ledger"]
    spent = _call(*ledger, "runs/single", "--spent", cwd=workspace).stdout
    assert f"{1024 * STEPS:,} tokens in {STEPS} of {STEPS} steps" in spent
    listed = _call(*ledger, "runs/single", "--step", "3", cwd=workspace).stdout
    assert "code" in listed and "mail" in listed
    copy = workspace / "runs" / "damaged-ledger"
    shutil.copytree(single.folder, copy)
    state = checkpoint.newest(copy) / "state.json"
    state.write_text('{"step": 20}')
    result = subprocess.run(
        [*ledger, "runs/damaged-ledger", "--spent"],
        cwd=workspace,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "state.json is not what train.py writes" in result.stderr


def test_a_damaged_checkpoint_falls_back_loudly(workspace: Path, single: Run) -> None:
    run = Run(workspace, "damaged", options={"checkpoint.every": 4, "train.tokens": 1024 * 8})
    run.finish()
    file = next((checkpoint.folder(run.folder) / "step-00000008").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    output = run.finish()
    assert "is damaged" in output and "from step 4" in output
    assert (checkpoint.folder(run.folder) / "corrupt-0").is_dir()


# -- refusals --------------------------------------------------------------------------------------


def _refused(run: Run, sentence: str) -> None:
    child = run.start()
    output, _ = child.communicate(timeout=120)
    assert child.returncode == (1 if run.world > 1 else 2), output
    line = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(line) == 1 and sentence in line[0], output
    assert "Traceback (most recent call last)" not in output.split("torch/distributed")[0]


REFUSED = {
    "finished": ({}, f"is finished, all {STEPS} steps are trained"),
    "other values": ({"optim.lr": 2e-3}, "optim.lr: 0.005 -> 0.002"),
    "other model": (
        {"model.n_layers": 3, "checkpoint.accept_changes": True},
        "is of another model (model.n_layers: 2 -> 3)",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_run_folder_is_protected(workspace: Path, single: Run, case: str) -> None:
    options, sentence = REFUSED[case]
    before = {p: p.stat().st_mtime_ns for p in (single.folder / "ckpt").rglob("*")}
    _refused(Run(workspace, "single", options=options), sentence)
    assert {p: p.stat().st_mtime_ns for p in (single.folder / "ckpt").rglob("*")} == before


FRESH = {
    "no data": ({"data.path": "data/quickstart/tokens"}, "`make quickstart` makes it"),
    "no source": ({"data.mixture": '{"code": 0.5, "poems": 0.5}'}, "poems"),
    "vocabulary": ({"model.vocab_size": 513}, "model.vocab_size is 513"),
    "no window": ({"data.seq_len": 512_000, "train.batch_tokens": 512_000}, "holds no window"),
    "layout": ({"parallel.shard": 3}, "do not make a world of 1: parallel.shard 1 would"),
    "init": ({"train.init_from": "runs/nothing"}, "runs/nothing does not exist"),
}


@pytest.mark.parametrize("case", list(FRESH))
def test_refused_before_anything_is_trained(workspace: Path, case: str) -> None:
    options, sentence = FRESH[case]
    run = Run(workspace, f"refused-{case}".replace(" ", "-"), options=options)
    _refused(run, sentence)
    assert not run.folder.exists()


def test_under_torchrun_one_sentence_for_all_ranks(workspace: Path) -> None:
    options = {"train.batch_tokens": 1024 + 64}
    _refused(
        Run(workspace, "refused-two", 2, options),
        "does not divide over parallel.replicate x shard = 2",
    )


def test_another_tokenizer_is_refused(workspace: Path, single: Run) -> None:
    """Of the same size, so that only its bytes tell."""
    python = [sys.executable, "-m"]
    _call(
        *python, "tokenizer.train", "--config", str(ROOT / "configs/tokenizer.yaml"),
        "--vocab_size", "512", "--input", "documents", "--mixture", "mixture.yaml",
        "--character_coverage", "0.99", "--output", "other/tokenizer", cwd=workspace,
    )  # fmt: skip
    _call(
        *python, "llama.data.tokenize", "--input", "documents", "--tokenizer", "other/tokenizer",
        "--output", "other/tokens", "--valid_per_10k", "2000", cwd=workspace,
    )  # fmt: skip
    run = Run(workspace, "single", options={"data.path": "other/tokens"})
    _refused(run, "was trained with another tokenizer")
    accepted = {"data.path": "other/tokens", "checkpoint.accept_changes": True}
    _refused(Run(workspace, "single", options=accepted), "was trained with another tokenizer")


def test_changed_values_are_accepted_when_asked(workspace: Path) -> None:
    first = Run(workspace, "changed", options={"train.tokens": 1024 * 4})
    first.finish()
    options = {
        "train.tokens": 1024 * 8,
        "data.mixture": '{"code": 0.2, "mail": 0.8}',
        "train.batch_tokens": 512,
        "checkpoint.accept_changes": True,
    }
    output = Run(workspace, "changed", options=options).finish()
    assert "data.mixture.code: 0.7 -> 0.2" in output
    state = checkpoint.read_state(checkpoint.newest(first.folder))
    segments = order.from_json(state["segments"])
    assert [(s.first_step, s.batch_windows) for s in segments] == [(0, 16), (4, 8)]
    # the second segment goes on where the first one stopped
    plan = order.Order(3, segments)
    for name in plan.names:
        ahead = segments[1].starts[name]
        assert (
            ahead[0] * segments[1].windows[name] + ahead[1]
            == plan.source_tokens(4)[name] // plan.segment(0).seq_len
        )


def test_a_run_starts_from_the_weights_of_another(workspace: Path, single: Run) -> None:
    options = {"train.init_from": "runs/single", "train.tokens": 1024}
    run = Run(workspace, "continued", options=options)
    output = run.finish()
    assert "runs/single" in output
    # lower than any loss while the weights were made: no step of a fresh model does that
    assert run.rows()[0]["loss"] < min(row["loss"] for row in single.rows()[:-5])
    state = checkpoint.read_state(checkpoint.newest(run.folder))
    assert (state["step"], state["adam_steps"]) == (1, 1)


def test_dry_run_builds_the_published_sizes_and_writes_nothing(tmp_path: Path) -> None:
    parameters = {"7b": "6,738,415,616", "65b": "65,285,660,672"}
    for size, number in parameters.items():
        words = [sys.executable, str(ROOT / "train.py"), "--config"]
        words += [str(ROOT / f"configs/llama_{size}.yaml"), "--dry_run", "--gpus", "2048"]
        result = _call(*words, cwd=tmp_path)
        assert number in result.stdout and "commoncrawl" in result.stdout
        assert re.search(r"parameters +([\d.]+ \w+) +\1 +\1\n", result.stdout)
    # kilobytes, of any process started so far
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 8e6
    assert list(tmp_path.iterdir()) == []


# -- one process, inside the test ------------------------------------------------------------------


@pytest.fixture
def inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[train.State]:
    monkeypatch.chdir(workspace)
    here = world.start()
    words = [f"--{key}={value}" for key, value in {**OPTIONS, "name": "inside"}.items()]
    yield train.build(config.load(words), here, Path("runs/inside"))
    world.stop()


def _batch(state: train.State) -> tuple[torch.Tensor, torch.Tensor]:
    reader = train.loader.Loader(state.sources, state.order)
    tokens, source = reader.batch(state.step, 0, 16)
    reader.close()
    return tokens, source


def test_a_bad_number_changes_nothing(inside: train.State, rng: random.Random) -> None:
    train.step(inside, *_batch(inside))
    before = {name: tensor.clone() for name, tensor in inside.tensors().items()}
    window, adam_steps = inside.window.clone(), train.optim.step_count(inside.optimizer)
    victim = rng.choice(list(inside.model.parameters()))
    for bad in (math.nan, math.inf, -math.inf):
        hook = victim.register_hook(lambda grad, bad=bad: grad.fill_(bad))
        measured = train.step(inside, *_batch(inside))
        hook.remove()
        assert not math.isfinite(float(measured.grad_norm))
        assert all(torch.equal(t, before[name]) for name, t in inside.tensors().items())
    assert torch.equal(inside.window, window)
    assert train.optim.step_count(inside.optimizer) == adam_steps
    train.step(inside, *_batch(inside))
    assert any(not torch.equal(t, before[name]) for name, t in inside.tensors().items())


def test_masked_targets_do_not_shrink_the_gradient(inside: train.State) -> None:
    """The mean is over the targets that count, whatever the nominal number."""
    inside.cfg.data.boundary_loss = False
    tokens, source = _batch(inside)
    tokens[:, ::3] = inside.eos_id
    expected, counts = train.forward(inside, tokens)
    assert counts.sum() < tokens[:, 1:].numel()
    mean = expected.sum() / counts.sum()
    mean.backward()
    norm = torch.stack([p.grad.norm() for p in inside.model.parameters()]).norm()
    inside.model.zero_grad()
    measured = train.step(inside, tokens, source)
    assert float(measured.loss) == pytest.approx(float(mean), rel=1e-5)
    assert float(measured.grad_norm) == pytest.approx(float(norm), rel=1e-4)


def test_attention_may_stay_inside_documents(inside: train.State) -> None:
    """What stands before a document's end must not reach what stands after it."""
    inside.cfg.data.attend_across_documents = False
    tokens, _ = _batch(inside)
    tokens = tokens[:2].clone()
    tokens[tokens == inside.eos_id] = 5
    tokens[:, 30] = inside.eos_id
    other = tokens.clone()
    other[:, :30] = 7
    inputs = torch.stack([tokens[0, :-1], other[0, :-1]])
    docs = train.loader.document_ids(inputs, inside.eos_id)
    logits = inside.model(inputs, doc_ids=docs)
    assert torch.allclose(logits[0, 31:], logits[1, 31:], atol=1e-6)
    assert not torch.allclose(inside.model(inputs)[0, 31:], inside.model(inputs)[1, 31:], atol=1e-4)


def test_a_disk_too_small_is_refused_before_training(inside: train.State) -> None:
    with pytest.raises(UserError, match=r"one checkpoint takes 1000\.0 TB"):
        train.folder.check(inside.run, inside.cfg, inside.world, 10**15)
    assert not inside.run.exists()


def test_what_is_said_before_the_first_line(inside: train.State, capsys) -> None:
    inside.cfg.optim.warmup_steps = 30
    train.console.announce(inside)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "optim.warmup_steps 30 is longer than the run of 20 steps" in said
    assert "1 micro-step per step, each 16 windows of 64 tokens per process" in said
    assert "first line after one step, about" in said
