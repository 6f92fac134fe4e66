"""metrics.jsonl is the record; other loggers get the same rows and can never end a run."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama.cli import UserError
from llama.config import LogConfig
from llama.runtime import metrics

ROW = {
    "tokens": 4_194_304_000,
    "branch": 0,
    "loss": 2.6131,
    "lr": 2.9e-4,
    "grad_norm": 0.41,
    "tokens_per_s": 3_900_000.0,
    "tokens_per_s_gpu": 3810.4,
    "mfu_causal": 0.461,
    "memory_gib": 61.2,
    "eta_s": 1_740_000.0,
    "loss/c4": 2.7,
}


def read_rows(run: Path) -> list[dict[str, float]]:
    return list(map(json.loads, (run / "metrics.jsonl").open()))


def test_the_line_stands_under_its_header_within_80_columns() -> None:
    for mfu in (0.461, None):
        line = metrics.line(1200, 250_000, {**ROW, "mfu_causal": mfu})
        assert len(line) == len(metrics.HEADER) <= 80
    assert line.split() == [
        "1200/250000", "4.19B", "2.613", "2.9e-4", "0.41", "3,810", "-", "61.2G", "20d", "3h",
    ]  # fmt: skip


def test_rows_behind_the_resumed_step_and_torn_rows_are_dropped(tmp_path: Path) -> None:
    log = metrics.Metrics(tmp_path, LogConfig(), 0, {})
    for step in (1, 2, 3):
        log.row(step, {**ROW, "mfu_palm": None})
    log.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "lo')
    again = metrics.Metrics(tmp_path, LogConfig(), 2, {})
    again.row(3, {"loss": 1.0})
    again.close()
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2] == {"step": 3, "loss": 1.0} and "mfu_palm" not in rows[0]


def test_a_full_disk_is_said_once_and_costs_no_row(tmp_path: Path, capsys) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    log = metrics.Metrics(tmp_path, LogConfig(), 0, {})
    there, log.path = log.path, Path("/dev/full")
    log.row(1, ROW)
    log.row(2, ROW)
    log.close()
    assert capsys.readouterr().out.count("cannot be written: No space left on device") == 1
    log.path = there
    log.row(3, ROW)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]


def test_clock_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    clock = metrics.Clock(tokens=1000)
    now[0] += 4
    with clock.paused():
        now[0] += 50
    assert clock.read(tokens=9000, waited_s=1.0) == (2000.0, 25.0)
    now[0] += 2
    assert clock.read(tokens=10_000, waited_s=1.0) == (500.0, 0.0)


OFFLINE = """
import sys
from pathlib import Path
from llama.config import LogConfig
from llama.runtime import metrics

log = metrics.Metrics(Path(sys.argv[1]), LogConfig(wandb="offline"), 0, {"seed": 1})
assert len(log._sinks) == 1
for branch, step in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (1, 4)):
    log.row(step, {"branch": branch, "loss": 2.6})
log.close()
"""


def test_wandb_gets_every_row_offline_also_after_a_rewind(tmp_path: Path) -> None:
    """In a process of its own: wandb writes where the first run of a process said."""
    pytest.importorskip("wandb")
    # nor may it write where a run of this process has left its address in the environment
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env |= {"WANDB_SILENT": "true", "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", OFFLINE, str(tmp_path)], env=env, check=True)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(file.read_bytes()))
    # wandb drops a row whose step is below its last one: what a rewind takes back comes again
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    assert [(row["branch"], row["step"]) for row in rows] == [
        (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (1, 4),
    ]  # fmt: skip
    assert [row["_step"] for row in rows] == list(range(6))
    metric = next(r.metric for r in records if r.HasField("metric"))
    assert (metric.glob_name, metric.step_metric) == ("*", "step")


def wandb_records(data: bytes) -> Iterator[Any]:
    """Messages of a small .wandb file: records of a LevelDB log behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    at = 7
    while at < len(data):
        _, size, _ = struct.unpack("<IHB", data[at : at + 7])
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[at + 7 : at + 7 + size])
        yield record
        at += 7 + size


def test_an_unreachable_or_broken_logger_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    wandb = pytest.importorskip("wandb")

    def unreachable(**options: object) -> None:
        raise RuntimeError("timed out")

    monkeypatch.setattr(wandb, "init", unreachable)
    log = metrics.Metrics(tmp_path, LogConfig(wandb="offline"), 0, {})
    log.row(1, ROW)

    def dying(step: int, row: dict[str, object]) -> None:
        raise ConnectionError("gone")

    log._sinks.append(dying)
    log.row(2, ROW)
    log.row(3, ROW)
    log.close()
    told = capsys.readouterr().out
    assert "wandb cannot start (timed out)" in told and told.count("gone") == 1
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]


def test_settings_that_wandb_refuses_do_not_stop_a_run(tmp_path: Path, monkeypatch, capsys) -> None:
    wandb = pytest.importorskip("wandb")

    def refused() -> None:
        raise ValueError("1 error\nbase_url\n  no URL: 'http://someone:secret@host'")

    monkeypatch.setattr(wandb, "setup", refused)
    metrics.Metrics(tmp_path, LogConfig(wandb="offline"), 0, {}).row(1, ROW)
    told = capsys.readouterr().out
    assert "wandb cannot start (1 error base_url no URL: 'http://host')" in told
    assert [row["step"] for row in read_rows(tmp_path)] == [1]


def test_a_logger_asked_for_but_missing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match="log.wandb offline needs wandb, .* pip install 'llama-pretraining"
    ):
        metrics.Metrics(tmp_path, LogConfig(wandb="offline"), 0, {})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="log.tensorboard"):
        metrics.Metrics(tmp_path, LogConfig(tensorboard=True), 0, {})


def test_tensorboard_gets_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = metrics.Metrics(tmp_path, LogConfig(tensorboard=True), 0, {})
    for step in (1, 2):
        log.row(step, {**ROW, "loss": 3.0 - step})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == [2.0, 1.0]
