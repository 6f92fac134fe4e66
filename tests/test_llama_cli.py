"""Counts, tables, parsing with suggestions, exit codes, progress."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from llama import cli
from llama.cli import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4194304", 4194304),
        (4194304, 4194304),
        ("4M", 4_000_000),
        ("1.4T", 1_400_000_000_000),
        ("1.4e12", 1_400_000_000_000),
        ("512k", 512_000),
        ("0.5B", 500_000_000),
        ("1_000", 1000),
        ("-3", -3),
        ("1.0001M", 1_000_100),
    ],
)
def test_counts(text: str | int, value: int) -> None:
    assert cli.count(text) == value


@pytest.mark.parametrize("text", ["", "abc", "1.5", "4Q", "1e", "M", "nan", "inf", "1e999", "--3"])
def test_what_is_no_count_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(UserError, match="is not a count") as caught:
        cli.count(text)
    assert repr(text) in str(caught.value)


def test_counts_survive_a_round_trip(rng) -> None:
    for _ in range(1000):
        number = rng.randrange(10 ** rng.randrange(1, 15))
        assert cli.count(str(number)) == number


def test_numbers_are_shown_with_their_unit() -> None:
    assert cli.show_count(1234) == "1,234"
    assert cli.show_count(4_194_304) == "4.19M"
    assert cli.show_count(1.4e12) == "1.40T"
    assert cli.show_bytes(999) == "999 B"
    assert cli.show_bytes(3.2e9) == "3.2 GB"
    assert cli.show_seconds(59.6) == "1m 00s"
    assert cli.show_seconds(7380) == "2h 03m"
    assert cli.show_seconds(200_000) == "2d 7h"


def test_table_aligns_numbers_to_the_right() -> None:
    text = cli.table(("source", "tokens"), [("github", 5), ("c4", "1,234")])
    assert text.splitlines() == [
        "source  tokens",
        "------  ------",
        "github       5",
        "c4       1,234",
    ]


def _parser() -> cli.Parser:
    parser = cli.parser("python -m example", "An example.")
    parser.add_argument("--min_chars", type=int, default=3)
    return parser


def test_hyphens_are_accepted() -> None:
    assert _parser().parse_args(["--min-chars", "5"]).min_chars == 5
    assert _parser().parse_args(["--min-chars=-5"]).min_chars == -5


def test_abbreviations_and_typos_fail_with_a_suggestion() -> None:
    for wrong in ("--min_char", "--min-chras", "--mim_chars"):
        with pytest.raises(UserError, match="did you mean min_chars"):
            _parser().parse_args([wrong, "5"])


def test_wrong_type_names_key_and_value() -> None:
    with pytest.raises(UserError, match="min_chars.*many"):
        _parser().parse_args(["--min_chars", "many"])


def _exit(
    body: str, *words: str | bytes, env: dict[str, str] | None = None, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    code = f"from llama import cli\ndef main(argv):\n    {body}\ncli.run(main)"
    return subprocess.run(
        [sys.executable, *options, "-c", code, *words],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **(env or {})},
    )


def test_exit_codes() -> None:
    user = _exit("raise cli.UserError('data/x is empty')")
    assert (user.returncode, user.stderr) == (2, "error: data/x is empty\n")
    assert _exit("return None").returncode == 0
    assert _exit("return 75").returncode == 75
    theirs = _exit("raise PermissionError(13, 'Permission denied', 'data/x')")
    assert theirs.returncode == 2
    assert theirs.stderr == "error: data/x: Permission denied\n"
    full = _exit("raise OSError(30, 'Read-only file system', 'runs')")
    assert (full.returncode, full.stderr) == (2, "error: runs: Read-only file system\n")
    for error in ("ValueError('a bug')", "PermissionError(1, 'Operation not permitted')"):
        bug = _exit(f"raise {error}")
        assert bug.returncode == 1 and "Traceback" in bug.stderr


WRITES = "open(argv[0], 'w').write(argv[0]); print('na\\xefve')"


def test_names_are_utf8_in_every_locale(tmp_path: Path) -> None:
    path = tmp_path / "naïve\n日本"
    odd = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert _exit(WRITES, str(path), env=odd).stdout == "naïve\n"
    assert path.read_text("utf-8") == str(path)
    # where Python is told otherwise it does not begin anew for ever
    told = _exit(WRITES, str(path), env=odd, options=["-X", "utf8=0"])
    assert told.returncode == 2 and "error: the command line is not UTF-8: " in told.stderr


def test_bytes_that_are_no_utf8_are_a_sentence() -> None:
    told = _exit(WRITES, b"na\xefve")
    assert told.returncode == 2 and "error: the command line is not UTF-8: " in told.stderr


def test_closed_outputs_end_nothing(tmp_path: Path) -> None:
    code = "from llama import cli; cli.run(lambda argv: open(argv[0], 'w').write('x') and print())"
    command = [sys.executable, "-c", code, str(tmp_path / "made")]
    assert subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command]).returncode == 0
    assert (tmp_path / "made").read_text() == "x"


def test_a_package_that_is_missing_or_broken_is_a_sentence(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "broken_extra.py").write_text("raise OSError('libcudart.so.12: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    for name, why in {"broken_extra": "libcudart", "missing_extra": "No module named"}.items():
        told = rf"^--to x needs {name}, which cannot be imported \({why}.*\): pip install it$"
        with pytest.raises(UserError, match=told):
            cli.needed(name, "--to x", "it")


def test_progress_prints_plain_lines_off_a_terminal(capsys) -> None:
    with cli.Progress("reading", total=10, unit="files") as progress:
        for _ in range(10):
            progress.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("reading: 10 of 10 files, ")
