"""What lies outside a run: disks, loggers, packages, places, secrets. Training goes on, or it stops
with a sentence; no step is lost.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_runs import ROOT, call, make_workspace, rows, train_here, words

from llama.cli import UserError
from llama.config import LogConfig
from llama.runtime import checkpoint, metrics

STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with shards, the working one, and a run that nothing disturbed."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    # of a name that paths rarely have
    folder = make_workspace(
        tmp_path_factory.mktemp("odd place") / "naïve\n日本 x", random.Random(seed)
    )
    before = Path.cwd()
    os.chdir(folder)
    assert train_here("calm") == 0
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def _at(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def _same(run: Path, other: Path = Path("runs/calm")) -> None:
    """The same steps with the same numbers, and the same last checkpoint."""
    keep = ("step", "tokens", "loss", "grad_norm")
    ours, theirs = ([{k: row[k] for k in keep} for row in rows(path)] for path in (run, other))
    assert ours == theirs
    assert checkpoint.newest(run).name == checkpoint.newest(other).name


def _when(run: Path, n: int, action: Callable[[], None]) -> threading.Thread:
    """Do it once the run has so many rows."""

    def wait() -> None:
        path = run / "metrics.jsonl"
        while not (path.exists() and path.read_bytes().count(b"\n") >= n):
            time.sleep(0.002)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


# -- disks -----------------------------------------------------------------------------------------

FULL = """
import os, sys, threading, time
sys.path.insert(0, "{tests}")
from pathlib import Path
import made_runs

os.chdir("{disk}")
run, filler = Path("runs/full"), Path("filler")

def n_rows():
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\\n") if path.exists() else 0

def fill():
    while n_rows() < 22:
        time.sleep(0.001)
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            os.write(2, b"the disk is full\\n")
    # a save fails meanwhile
    while b"step-00000040 failed" not in Path("{told}").read_bytes():
        time.sleep(0.001)
    filler.unlink()
    os.write(2, b"the disk has room\\n")

threading.Thread(target=fill, daemon=True).start()
options = {options}
sys.exit(made_runs.train_here("full", options))
"""


@pytest.mark.slow
@pytest.mark.faults
def test_a_disk_full_under_everything_costs_no_step(place: Path, tmp_path: Path, score) -> None:
    """Checkpoints, metrics and log lie on it; the terminal does elsewhere, to be watched."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("no mount of its own is allowed here (unshare -rm)")
    disk, told = tmp_path / "disk", tmp_path / "told"
    disk.mkdir()
    options = {
        "train.tokens": 256 * 90,
        "checkpoint.every": 20,
        "checkpoint.keep": 1,
        "data.path": place / "tokens",
        "data.mixture": place / "mixture.yaml",
    }
    code = FULL.format(
        tests=ROOT / "tests", disk=disk, told=told, options={k: str(v) for k, v in options.items()}
    )
    (tmp_path / "full.py").write_text(code)
    mount = f"mount -t tmpfs -o size=2m none '{disk}' && '{sys.executable}' '{tmp_path}/full.py'"
    copy = f"; code=$?; cp -r '{disk}/runs' '{tmp_path}/kept'; exit $code"
    with open(told, "w") as out:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount + copy],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
    said = told.read_text()
    assert done.returncode == 0, said
    assert (
        "step-00000040 failed" in said
        and "0 B free on the disk" in said
        and "the disk has room" in said
    )
    run = tmp_path / "kept/full"
    # the buffer of the record is written when there is room again
    assert [row["step"] for row in rows(run)] == list(range(1, 91))
    assert checkpoint.newest(run).name == "step-00000090"
    assert json.loads((run / "EXIT_REASON").read_text())["exit"] == "done"
    score("outside.steps", 90, ">= 90")
    score("outside.lost", 90 - len(rows(run)), "0")


def test_a_terminal_on_a_full_disk_ends_nothing(place: Path) -> None:
    """As Slurm's output file may be."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *words("mute")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 0, done.stderr
    _same(Path("runs/mute"))
    assert f" {STEPS}/{STEPS} " in (Path("runs/mute") / "train.log").read_text()


def test_rows_are_on_the_disk_before_their_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut takes what is not synced; what a kill left half-written is swept."""
    run, events = Path("runs/synced"), []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle: int) -> None:
        fsync(handle)
        path = run / "metrics.jsonl"
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            events.append(len(rows(run)))

    def noted_rename(path: Path, target: Path) -> Path:
        events.extend([target.name] if target.name.startswith("step") else [])
        return rename(path, target)

    (run / "profile").mkdir(parents=True)
    left = ["config.yaml.part-n1-7", "EXIT_REASON.part-n2-9", "profile/rank-0-steps-3-4.part.gz"]
    theirs = run / "report.html.part-n1-8"
    for path in (*(run / name for name in left), theirs):
        path.write_text("torn")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    assert train_here("synced", {"checkpoint.background": False}) == 0
    assert events[:6] == [4, "step-00000004", 8, "step-00000008", 12, "step-00000012"]
    assert theirs.exists() and not any((run / name).exists() for name in left)


def test_a_failure_behind_a_step_counts_that_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(log: metrics.Metrics, step: int, values: object) -> None:
        if step == 3:
            raise RuntimeError("planted")

    monkeypatch.setattr(metrics.Metrics, "row", failing)
    with pytest.raises(RuntimeError, match="planted"):
        train_here("behind")
    reason = json.loads((Path("runs/behind") / "EXIT_REASON").read_text())
    assert (reason["exit"], reason["step"]) == ("failed", 3)


# -- data under a running job ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut", "gone", "other ids"])
def test_shards_that_change_under_a_run_stop_it_by_name(tmp_path: Path, how: str) -> None:
    """And with the shards as they were the run goes on as if nothing had been."""
    shutil.copytree("tokens", tmp_path / "tokens")
    options = {"data.path": tmp_path / "tokens", "train.tokens": 256 * 60}
    name = f"shards-{how[:4].strip()}"
    run, victims = Path("runs") / name, sorted((tmp_path / "tokens").rglob("train/*.bin"))
    good = {path: path.read_bytes() for path in victims}

    def spoil() -> None:
        for path, data in good.items():
            if how == "cut":
                os.truncate(path, len(data) // 3)
            elif how == "gone":
                path.unlink()
                path.with_suffix(".idx").rename(path.with_suffix(".away"))
            else:
                path.write_bytes(b"\xff\xfe" * (len(data) // 2))

    thread = _when(run, 3, spoil)
    if how == "gone":
        # a file that is open stays readable: the run ends whole, or at one that was not open yet
        try:
            assert train_here(name, options) == 0
        except UserError as error:
            assert ".bin: byte" in str(error)
        thread.join()
        with pytest.raises(UserError, match=r"\.bin cannot be read: No such file"):
            train_here(f"{name}-again", options)
        return
    with pytest.raises(UserError, match=r"\.bin") as caught:
        train_here(name, options)
    thread.join()
    assert "\n" not in str(caught.value).replace(str(Path.cwd()), "")
    reason = json.loads((run / "EXIT_REASON").read_text())
    assert reason["exit"] == "failed" and ".bin" in reason["why"]
    for path, data in good.items():
        path.write_bytes(data)
    assert train_here(name, options) == 0
    assert train_here(f"{name}-calm", options) == 0
    _same(run, Path(f"runs/{name}-calm"))


# -- places and packages ---------------------------------------------------------------------------

OPTIONAL = (
    "wandb tensorboard matplotlib xformers triton flash_attn transformers pyarrow datatrove "
    "resiliparse py7zr brotli fasttext kenlm megatron gguf transformer_engine peft"
).split()


@pytest.mark.slow
@pytest.mark.faults
def test_the_worst_of_environments_changes_no_number(place: Path, tmp_path: Path) -> None:
    """Optional packages that raise, no home, an ASCII locale, an odd time zone."""
    for name in OPTIONAL:
        # of triton torch itself takes nothing but this
        error = "ImportError" if name == "triton" else "RuntimeError"
        (tmp_path / f"{name}.py").write_text(f"raise {error}('built for another machine')\n")
    env = {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "HOME": "/dev/null",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "TZ": "Mars/Phobos",
    }
    call(str(ROOT / "train.py"), *words("worst"), cwd=place, env=env)
    _same(Path("runs/worst"))


def test_a_network_that_is_not_there_is_a_sentence(place: Path) -> None:
    env = {"GLOO_SOCKET_IFNAME": "none0"}
    said = call(str(ROOT / "train.py"), *words("alone"), cwd=place, env=env, expect=2)
    assert "error: rank 0 cannot join the others over the network: " in said
    assert "Traceback" not in said and not (place / "runs/alone").exists()


@pytest.mark.parametrize("module", ["wandb", "torch.utils.tensorboard"])
def test_a_broken_logger_is_a_sentence(tmp_path: Path, monkeypatch, module: str) -> None:
    class Broken:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == module:
                raise RuntimeError("built for another machine")

    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    cfg = LogConfig(wandb="offline", tensorboard=True)
    with pytest.raises(UserError, match="built for another machine"):
        metrics.Metrics(tmp_path, cfg, 0, {})


GONE = """
import os, shutil, sys, threading, time
sys.path.insert(0, "{tests}")
from pathlib import Path
import made_runs
from llama import cli

os.mkdir("{gone}")
os.chdir("{gone}")

def remove():
    path = Path("{gone}/runs/gone/metrics.jsonl")
    while not (path.exists() and path.read_bytes().count(b"\\n") >= 3):
        time.sleep(0.001)
    # a save that begins meanwhile puts something there again
    while os.path.exists("{gone}"):
        shutil.rmtree("{gone}", ignore_errors=True)

threading.Thread(target=remove, daemon=True).start()
options = {options}
cli.run(lambda _: made_runs.train_here("gone", options))
"""


@pytest.mark.full
@pytest.mark.faults
def test_a_working_folder_that_is_deleted_is_told(place: Path, tmp_path: Path) -> None:
    options = {"data.path": str(place / "tokens"), "data.mixture": str(place / "mixture.yaml"),
               "train.tokens": 256 * 40}  # fmt: skip
    script = tmp_path / "gone.py"
    script.write_text(GONE.format(tests=ROOT / "tests", gone=tmp_path / "gone", options=options))
    said = call(str(script), cwd=place, expect=2)
    assert "WARNING: the checkpoint step-" in said and "Traceback" not in said
    assert said.count("error: ") == 1 and "in a row could not be written" in said


# -- loggers ---------------------------------------------------------------------------------------


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *rest: object) -> None: ...


def test_an_unreachable_server_means_offline_at_once(tmp_path: Path, monkeypatch, capsys) -> None:
    wandb = pytest.importorskip("wandb")
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked = []

    def begun(mode: str, **options: object) -> SimpleNamespace:
        asked.append(mode)
        return SimpleNamespace(define_metric=lambda *words, **more: None)

    monkeypatch.setattr(wandb, "init", begun)
    monkeypatch.setattr(type(wandb.api), "api_key", "k" * 40, raising=False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(metrics, "_answers", lambda url, real=metrics._answers: real(address))
    metrics.Metrics(tmp_path, LogConfig(wandb="online"), 0, {}).close()
    server.shutdown()
    server.server_close()
    metrics.Metrics(tmp_path, LogConfig(wandb="online"), 0, {}).close()
    assert asked == ["online", "offline"]
    assert capsys.readouterr().out.count("does not answer: logging offline") == 1


# in a process of its own: the one that dies serves every run of a process
ORPHANED = """
import os, subprocess, sys
sys.path.insert(0, "{tests}")
from pathlib import Path
import made_runs, test_runs_outside

def kill():
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        pid, parent, command = line.split(None, 2)
        if int(parent) == os.getpid() and "wandb-core" in command:
            os.kill(int(pid), 9)

test_runs_outside._when(Path("runs/orphaned"), 5, kill)
sys.exit(made_runs.train_here("orphaned", {{"log.wandb": "offline"}}))
"""


@pytest.mark.full
@pytest.mark.faults
def test_loggers_that_fail_cost_no_step(place: Path, score) -> None:
    pytest.importorskip("wandb")
    env = {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = words("unreachable", {"log.wandb": "online"})
    said = call(str(ROOT / "train.py"), *command, cwd=place, env=env)
    assert "logging offline" in said
    said = call("-c", ORPHANED.format(tests=ROOT / "tests"), cwd=place)
    assert "_wandb failed and is off now" in said
    runs = [Path("runs") / name for name in ("unreachable", "orphaned")]
    for run in runs:
        _same(run)
    score("outside.steps", STEPS * len(runs), ">= 90")
    score("outside.lost", sum(STEPS - len(rows(run)) for run in runs), "0")


# -- secrets ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.faults
def test_five_canaries_are_in_no_file_a_run_writes(rng, score, scale, tmp_path: Path) -> None:
    """Environment, command line, configuration, git remote, token files; a run that ends well and
    one that fails, with every logger that is installed, and the report.
    """
    where = ["environment", "argument", "configuration", "remote", "token"]
    canaries = {key: f"{key[:4]}{rng.getrandbits(144):036x}" for key in where}
    home, project = tmp_path / "home", tmp_path / "project"
    make_workspace(project, rng)
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    remote = f"https://someone:{canaries['remote']}@example.invalid/project.git"
    subprocess.run(["git", "-C", str(project), "remote", "add", "origin", remote], check=True)
    for name in (
        ".netrc",
        ".cache/huggingface/token",
        ".config/wandb/settings",
        ".aws/credentials",
    ):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(f"machine api.wandb.ai login user password {canaries['token']}\n")
    # nothing a key may hold is a secret: keys are saved. What stands beside them is not
    settings = project / canaries["argument"] / "mine.yaml"
    settings.parent.mkdir()
    settings.write_text(f"# key {canaries['configuration']}\nseed: 5\n")
    secrets = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN")
    env = {**dict.fromkeys(secrets, canaries["environment"]), "HOME": str(home)}
    env |= {"WANDB_BASE_URL": f"http://someone:{canaries['environment']}@127.0.0.1:9"}
    options = {} if _missing("wandb") else {"log.wandb": "online"}
    options |= {} if _missing("tensorboard") else {"log.tensorboard": "true"}
    given = [f"--config={settings}", *words("secret", options)]
    call(str(ROOT / "train.py"), *given, cwd=project, env=env)
    if scale(False, True):
        unknown = f"--log.token={canaries['argument']}"
        call(str(ROOT / "train.py"), *given, unknown, cwd=project, env=env, expect=2)
        if not _missing("matplotlib"):
            call("-m", "llama.report", "runs/secret", cwd=project, env=env)
        call("-m", "llama.verify", "runs/secret", cwd=project, env=env)
        for path in project.rglob("train/*.bin"):
            os.truncate(path, 100)
        more = ["--train.tokens=256k", "--checkpoint.accept_changes=true"]
        call(str(ROOT / "train.py"), *given, *more, cwd=project, env=env, expect=2)
    files = [path for path in (project / "runs").rglob("*") if path.is_file()]
    assert len(files) > 20
    found = [
        (key, str(path.relative_to(project)))
        for path in files
        for key, canary in canaries.items()
        if canary.encode() in path.read_bytes()
    ]
    score("canaries", len(canaries), ">= 5")
    score("canaries.found", len(found), "0")
    assert not found


def _missing(module: str) -> bool:
    return (
        subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode
        > 0
    )
