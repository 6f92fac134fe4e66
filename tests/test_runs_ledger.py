"""What a run was really trained on is what its ledger says, to the token: over kills, epochs, other
numbers of processes, and changes that were accepted.
"""

import hashlib
import json
import random
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from made_data import make_source, make_sources, random_documents
from made_runs import ENV, OPTIONS, ROOT, VOCABULARY, call, rows

from llama.data import shards
from llama.data.order import Order, from_json
from llama.runtime import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.faults]
LENGTH = OPTIONS["data.seq_len"]
Visit = tuple[str, str]  # source, hash of a window


@dataclass
class Watched:
    """A run that writes down what it is trained on; started again it goes on."""

    place: Path
    options: dict[str, Any]
    starts: int = 0

    def start(self, size: int, faults: str = "", expect: int = 0, **more: Any) -> str:
        options = OPTIONS | {"name": "watched"} | self.options | more
        words = [f"--{key}={value}" for key, value in options.items()]
        launch, self.starts = [sys.executable], self.starts + 1
        if size > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        done = subprocess.run(
            [*launch, str(ROOT / "tests/made_ledger.py"), f"trained-{self.starts:02}", *words],
            cwd=self.place,
            env={**ENV, "LLAMA_FAULTS": faults},
            capture_output=True,
            text=True,
        )
        said = done.stdout + done.stderr
        codes = (-signal.SIGKILL, 1) if faults else (expect,)
        assert done.returncode in codes and ("FAULT" in said) == bool(faults), said
        return said

    def trained(self, batch_windows: dict[int, int]) -> dict[int, Counter[Visit]]:
        """Per step the windows it was made with; one made again was made with the same."""
        made: dict[int, dict[str, Counter[Visit]]] = defaultdict(lambda: defaultdict(Counter))
        for path in sorted(self.place.glob("trained-*")):
            for line in map(json.loads, path.open()):
                start = path.name.split("-")[1]
                made[line["step"]][start].update(map(tuple, line["rows"]))
        found = {}
        for step, starts in made.items():
            # the last start to make a step has made it whole; what a kill cut off was of it too
            found[step] = whole = starts[max(starts)]
            assert whole.total() == batch_windows[step], f"step {step}"
            assert all(part <= whole for part in starts.values()), f"step {step}"
        return found


def windows_of(place: Path, name: str) -> Iterator[Visit]:
    source = shards.Source(name, "train", place / "tokens" / name / "train")
    for window in range(source.n_windows(LENGTH)):
        tokens = source.read(window * LENGTH, LENGTH + 1).astype("int64").tobytes()
        yield name, hashlib.sha256(tokens).hexdigest()[:16]


def check(run: Watched) -> tuple[Order, int, int]:
    """(order, steps, tokens) of a finished run, whose every token is where its ledger has it."""
    newest = checkpoint.newest(run.place / "runs/watched")
    state = checkpoint.read_state(newest)
    order, steps = Order(state["config"]["seed"], from_json(state["segments"])), state["step"]
    assert [row["step"] for row in rows(run.place / "runs/watched")] == list(range(1, steps + 1))
    sizes = {step: order.segment(step - 1).batch_windows for step in range(1, steps + 1)}
    trained = run.trained(sizes)
    assert sorted(trained) == list(range(1, steps + 1))
    seen = sum(trained.values(), Counter[Visit]())
    drawn = order.source_tokens(steps)
    text = call("-m", "llama.data.ledger", "runs/watched", "--spent", cwd=run.place)
    tokens = 0
    for name in order.names:
        every = list(windows_of(run.place, name))
        assert len(set(every)) == len(every), "windows cannot be told from each other"
        visits = {visit: n for visit, n in seen.items() if visit[0] == name}
        assert set(visits) <= set(every)
        # each exactly once an epoch: as often as there were whole ones, or once more
        total, windows = sum(visits.values()), len(every)
        epochs = total // windows
        times = Counter(visits.get(visit, 0) for visit in every)
        rest = total - epochs * windows
        assert times == +Counter({epochs: windows - rest, epochs + 1: rest}), name
        assert total * LENGTH == drawn[name]
        # name, tokens, and how many epochs
        shown = re.search(rf"^ *{name} +([\d,]+) .* ([\d.]+) +[\d,]+$", text, re.MULTILINE)
        assert shown and int(shown[1].replace(",", "")) == drawn[name], text
        tokens += drawn[name]
    assert tokens == order.tokens(steps) == rows(run.place / "runs/watched")[-1]["tokens"]
    return order, steps, tokens


def make(place: Path, rng: random.Random, steps: int) -> Watched:
    """One source of a few windows, which `steps` go through several times, and a larger one."""
    make_sources(
        rng, place / "tokens", {"code": 60, "mail": 150}, vocabulary=VOCABULARY, pieces=300
    )
    return Watched(
        place,
        {
            "seed": rng.randrange(1000),
            "data.mixture": '{"code": 0.7, "mail": 0.3}',
            "train.tokens": 256 * steps,
            "checkpoint.every": 3,
        },
    )


def planned(run: Watched, order: Order, steps: int) -> None:
    """No source is a window off what the weights of the configuration give it."""
    windows = order.tokens(steps) // LENGTH
    for name, share in (("code", 0.7), ("mail", 0.3)):
        assert abs(order.source_tokens(steps)[name] / LENGTH - share * windows) < 1, name


def test_kills_and_epochs_cost_no_token(tmp_path: Path, rng: random.Random) -> None:
    steps = 30
    run = make(tmp_path, rng, steps)
    run.start(1, f"step.begun:step={rng.randint(5, steps)},action=kill")
    said = run.start(1)
    assert "resuming runs/watched from step" in said
    order, steps, _ = check(run)
    planned(run, order, steps)
    # epochs have ended, of the smaller source several
    assert order.source_tokens(steps)["code"] > 2 * LENGTH * order.segment(0).windows["code"]


@pytest.mark.full
def test_worlds_kills_and_epochs_cost_no_token(tmp_path: Path, rng: random.Random, score) -> None:
    steps, worlds = 60, (1, 2, 4, 2)
    run = make(tmp_path, rng, steps)
    for number, size in enumerate(worlds):
        victim, step = rng.randrange(size), 10 * number + rng.randint(6, 10)
        run.start(size, f"step.begun:step={step},rank={victim},action=kill")
    run.start(1)
    order, steps, tokens = check(run)
    planned(run, order, steps)
    trained = sum(c.total() for c in run.trained(dict.fromkeys(range(1, steps + 1), 8)).values())
    score("ledger.tokens", trained * LENGTH, f">= {256 * steps}")
    score("ledger.off", abs(trained * LENGTH - tokens), "0")


@pytest.mark.full
def test_changes_that_were_accepted_are_in_the_ledger(tmp_path: Path, rng, score) -> None:
    """Another mixture and another batch, then other shards of one source."""
    run = make(tmp_path, rng, 12)
    run.start(1)
    before, _, _ = check(run)
    run.options |= {"checkpoint.accept_changes": "true", "train.tokens": 512 * 24}
    run.options |= {"train.batch_tokens": 512, "data.mixture": '{"code": 0.2, "mail": 0.8}'}
    run.start(1, f"step.begun:step={rng.randint(17, 20)},action=kill")
    run.start(2)
    order, steps, tokens = check(run)
    assert [(s.first_step, s.batch_windows) for s in order.segments] == [(0, 8), (12, 16)]
    # what was spent before stays spent as it was
    assert order.source_tokens(12) == before.source_tokens(12)
    late = {n: order.source_tokens(steps)[n] - order.source_tokens(12)[n] for n in order.names}
    for name, share in (("code", 0.2), ("mail", 0.8)):
        assert abs(late[name] - share * sum(late.values())) < LENGTH
    score("ledger.tokens", tokens, f">= {256 * 60}")
    score("ledger.off", abs(tokens - rows(run.place / "runs/watched")[-1]["tokens"]), "0")
    # other shards: refused, and where they are accepted a new epoch of theirs begins
    documents = random_documents(rng, "code", 40, pieces=300)
    make_source(tmp_path / "tokens/code", [documents], VOCABULARY)
    run.options |= {"checkpoint.accept_changes": "false"}
    said = run.start(1, expect=2)
    assert "error: the shards of code in tokens are not those of" in said
    more = {"checkpoint.accept_changes": "true", "train.tokens": 512 * 30}
    assert "code starts a new epoch: " in run.start(1, **more)
    state = checkpoint.read_state(checkpoint.newest(tmp_path / "runs/watched"))
    later = Order(state["config"]["seed"], from_json(state["segments"]))
    assert state["step"] == 30 and later.segments[-1].first_step == 24
    assert later.source_tokens(24) == order.source_tokens(24)
    assert later.tokens(30) == tokens + 6 * 512
