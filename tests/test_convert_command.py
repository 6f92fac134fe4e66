"""The command: what it says, what it refuses, and what it leaves."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_convert import SHAPES, convert, fresh_rng, make_run, without_transformers
from made_data import make_tokenizer

from llama import files
from llama.cli import UserError
from llama.convert import __main__ as command
from llama.convert import load
from llama.convert.__main__ import main
from llama.runtime import checkpoint, signals

ROOT = Path(__file__).parent.parent
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with without_transformers():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("place"), fresh_rng(), **SHAPES["plain"])


def test_it_says_what_was_checked(run: Path, tmp_path: Path, capsys: Capture) -> None:
    convert(run, tmp_path / "hf", "hf", "--dtype", "bfloat16")
    printed = capsys.readouterr().out.splitlines()
    assert "native, " in printed[0] and "context 64" in printed[0]
    assert "checked by a second implementation" in printed[1]
    assert "logits differ by" in printed[1] and "the same ids for" in printed[1]
    assert printed[2] == f"wrote {tmp_path / 'hf'}: hf, bfloat16"
    assert len({file.stat().st_mode for file in (tmp_path / "hf").iterdir()}) == 1
    convert(tmp_path / "hf", tmp_path / "native", "native")
    printed = capsys.readouterr().out.splitlines()
    assert "logits differ by" in printed[1] and "bit for bit" in printed[2]


def test_an_option_without_effect_warns(run: Path, tmp_path: Path, capsys: Capture) -> None:
    convert(run, tmp_path / "meta", "meta", "--license", "mit")
    assert "--license has no effect with --to meta" in capsys.readouterr().err


def test_the_tokenizer_can_be_named(run: Path, tmp_path: Path) -> None:
    tokens, away = run.parent.parent / "tokens", run.parent.parent / "away"
    given = Path(shutil.copy(tokens / "tokenizer.model", tmp_path))
    tokens.rename(away)
    try:
        with pytest.raises(UserError, match="has no tokenizer.*tokens.*name it with --tokenizer"):
            convert(run, tmp_path / "hf", "hf")
        with pytest.raises(UserError, match="nowhere does not exist"):
            convert(run, tmp_path / "hf", "hf", "--tokenizer", str(tmp_path / "nowhere"))
        convert(run, tmp_path / "hf", "hf", "--tokenizer", str(given))
        convert(run, tmp_path / "meta", "meta", "--tokenizer", str(tmp_path))
    finally:
        away.rename(tokens)
    for folder in ("hf", "meta"):
        assert files.sha256(tmp_path / folder / "tokenizer.model") == files.sha256(given)
    given.write_bytes(given.read_bytes() + b"\x1a\x00")
    with pytest.raises(UserError, match="is not the tokenizer that .* was trained with"):
        convert(run, tmp_path / "out", "hf", "--tokenizer", str(given))
    # where no hash is recorded, sizes must agree
    other = make_tokenizer(tmp_path / "other", pieces=300)
    with pytest.raises(UserError, match="has .* pieces, .* has embeddings for"):
        convert(tmp_path / "hf", tmp_path / "out", "meta", "--tokenizer", str(other))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "onnx"], "onnx"),
        ([], "to"),
        (["--to", "hf", "--dtype", "int8"], "int8"),
        (["--to", "native", "--dtype", "bfloat16"], "--dtype is bfloat16, but weights that are"),
        (["--to", "hf", "--licence", "mit"], "did you mean license"),
    ],
)
def test_bad_options_are_one_sentence(
    run: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        main([str(run), str(tmp_path / "out"), *options])
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["hf", "native", "meta", "gguf"])
def test_nothing_is_overwritten_and_a_full_disk_leaves_nothing(
    run: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="mine exists already"):
        convert(run, tmp_path / "mine", to)
    assert (tmp_path / "mine").read_text() == "mine"
    with monkeypatch.context() as patch:
        patch.setattr(files, "free_bytes", lambda path: 1000)
        with pytest.raises(UserError, match="has 1.0 kB free, one checkpoint takes"):
            convert(run, tmp_path / "out", to)

    # /dev/full takes part in no rename, so the disk fills up where files are synced
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="out cannot be written: .*[Nn]o space left on "):
        convert(run, tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_exit_codes(run: Path, tmp_path: Path) -> None:
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llama.convert", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    good = call(str(run), "out/meta", "--to", "meta")
    assert good.returncode == 0 and "wrote out/meta" in good.stdout, good.stderr
    (tmp_path / "out/meta/consolidated.00.pth").write_bytes(b"PK")
    bad = call("out/meta", "out/hf", "--to", "hf")
    assert bad.returncode == 2 and bad.stderr.startswith("error: out/meta/consolidated.00.pth")
    assert len(bad.stderr.splitlines()) == 1 and not bad.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["meta"]


KILLED = """
import os, signal, sys, tempfile
from llama.convert import check
from llama.convert.__main__ import main

check.ask_transformers = lambda *_: None

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "amid":
    os.fsync = kill
else:
    os.rename = kill
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["amid", "last"])
@pytest.mark.parametrize("to", ["hf", "native", "meta", "gguf"])
def test_a_killed_conversion_leaves_nothing_under_the_name(
    run: Path, tmp_path: Path, to: str, moment: str
) -> None:
    """Killed when the first file is complete, or when all that is missing is the name."""
    if to == "gguf":
        pytest.importorskip("gguf")
    child = subprocess.run(
        [sys.executable, "-c", KILLED, moment, str(run), "place/out", "--to", to],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert child.returncode == -signal.SIGKILL
    place = tmp_path / "place"
    assert list(place.iterdir()) and not (place / "out").exists()
    # and what is left does not stand in the way of the next
    convert(run, place / "out", to)
    assert (place / "out").exists()


@pytest.mark.faults
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_undoes_a_conversion(
    run: Path, tmp_path: Path, name: str, rng: random.Random, scale: Any, score: Any
) -> None:
    """While it reads, where a library turns interrupts into errors of its own, writes, and ends."""
    moments = {
        "start": (command, "main"),
        "read": (checkpoint.Reader, "read_data"),
        "write": (os, "fsync"),
        "last": (os, "rename"),
    }
    formats = ["hf", "native", "meta"]
    cells = [(to, moment) for to in formats for moment in moments]
    for to, moment in scale(rng.sample(cells, 2), cells):
        place = tmp_path / f"{to}-{moment}"
        child = os.fork()
        if not child:
            code = 1
            try:
                owner, function = moments[moment]
                whole = getattr(owner, function)

                def signalled(*words: Any, whole: Any = whole) -> Any:
                    os.kill(os.getpid(), getattr(signal, name))
                    return whole(*words)

                signals.listen()
                setattr(owner, function, signalled)
                code = signals.undone(command.main)([str(run), str(place / "out"), "--to", to])
            finally:
                os._exit(code or 0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 75, (to, moment)
        assert not place.exists() or not list(place.iterdir()), (to, moment)
        score("signals", 1)
    convert(run, place / "out", to)


MEMORY = """
import sys, threading, time
from pathlib import Path
from llama.convert import check
from llama.convert.__main__ import main

check.ask_transformers = lambda *_: None

def anonymous() -> int:
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no RssAnon")

peak = 0
def watch() -> None:
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
for arguments in sys.argv[1:]:
    src, dst, to = arguments.split(",")
    start = peak = anonymous()
    main([src, dst, "--to", to])
    print("grew", to, peak - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_block_not_of_the_model(tmp_path: Path) -> None:
    """20 blocks of 6.3 MB; with the moments there is twice as much on the disk."""
    run = make_run(tmp_path, fresh_rng(), dim=352, n_layers=20, n_heads=4, ffn_dim=1024)
    model_bytes = 4 * load.open_source(run).n_parameters
    assert model_bytes > 120e6
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, f"{run},hf,hf", "hf,native,native"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    grown = [line.split() for line in result.stdout.splitlines() if line.startswith("grew")]
    assert [to for _, to, _ in grown] == ["hf", "native"]
    print(grown)
    assert all(int(size) < 0.6 * model_bytes for _, _, size in grown)
