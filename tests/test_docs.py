"""Every command that README.md, CONTRIBUTING.md and docs/*.md show is run, in order, page by page.

A command is a line of an indented block or of a fence marked `sh`, a cell of a table's column
`command`, or an example of `python -m llama`, which README prints. They run in a copy of the
repository that is the home folder too, on the language reference that comes with Python. `INSTEAD`
and `SMALLER` hold all that is not run as it is written.
"""

import bz2
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from test_repo import ROOT, tracked_files

from llama import config
from llama.__main__ import LISTING

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
# the listing's, which README repeats; lines that are continued joined
EXAMPLES = re.findall(r"^    (\w.*)$", re.sub(r"\s*\\\n\s*", " ", LISTING), re.MULTILINE)
PROGRAMS = "python3?|torchrun|make|pip|bash|sh|git|cd|export|source|sbatch|srun"

# (pattern, what runs in its place, why)
INSTEAD = [
    (r"^make quickstart$", "make -o env quickstart", "the environment is that of this test"),
    (r"^make test$", "make -n test", "this test is a part of it"),
    (r"^make faults$", "make -n faults", "takes many minutes"),
    (r"--nproc-per-node 8 (.* configs/llama_7b.yaml)", r"\1 --dry_run", "takes eight GPUs"),
    (
        r"^torchrun --nproc-per-node 2 train.py --config configs/quickstart.yaml$",
        r"\g<0> --dry_run",
        "a finished run is not trained again",
    ),
    (r"^python -m llama.trace runs/quickstart$", r"\g<0> --help", "the quickstart records nothing"),
    (r"^sbatch .*", "bash -n scripts/slurm/train.sbatch", "needs Slurm"),
    (r"--train.tokens 4M\b", "--train.tokens 16k", "takes ten minutes"),
    (r"--input DIR\b", "--input texts", "stands for any folder"),
    (r"^python -m benchmarks.encode", r"\g<0> --mb 0.2 --vocab_size 1000", "takes minutes"),
    (r"^python -m kernels.tune$", r"\g<0> --help", "needs a GPU"),
    (r"^bash scripts/gpu.sh$", "bash -n scripts/gpu.sh", "needs a GPU"),
    (r"^python -m benchmarks.train_step", r"\g<0> --pairs 1", "takes minutes"),
    (r"^python -m benchmarks.generate", r"\g<0> --pairs 1 --new_tokens 4", "takes minutes"),
    (r"^python -m benchmarks.corpus_speed", r"\g<0> --rounds 1", "takes minutes"),
    (r"^(python -m llama.corpus train_models).*", r"\1 --help", "needs a crawl"),
    (r"^python -m benchmarks.recompute", r"\g<0> --rounds 1 --shape quickstart", "takes minutes"),
    (r"^python -m benchmarks.corpus_quality", r"\g<0> --only books", "takes minutes"),
    (r"^python -m benchmarks.loader", r"\g<0> --tokens 100k", "takes minutes"),
]
# (file of the copy, what it says, what stands there instead): a small model on little text
SMALLER = [
    ("configs/quickstart.yaml", "dim: 192", "dim: 48"),
    ("configs/quickstart.yaml", "  tokens: 1M", "  tokens: 12k"),
    ("configs/quickstart.yaml", "batch_tokens: 4096", "batch_tokens: 1024"),
    ("configs/quickstart.yaml", "  every: 100", "  every: 6"),
    ("configs/quickstart.yaml", "  tokens: 32768", "  tokens: 4096"),
    ("configs/corpus/installed.yaml", "max_bytes: 8M", "max_bytes: 1M"),
    ("configs/tokenizer.yaml", "vocab_size: 32000", "vocab_size: 8192"),
]
# Of these also the shortened form takes long.
LONG = r"^python -m (benchmarks\.|kernels\.check)"

# The quickstart takes minutes, on a busy machine many.
pytestmark = pytest.mark.timeout(1800)


# -- what pages show -------------------------------------------------------------------------------


def lines_of(page: str) -> Iterator[tuple[str, str]]:
    """(kind, line) of a page: `prose`, `sh`, or what another fence is marked with."""
    fence = ""
    for line in re.sub(r" *\\\n *", " ", (ROOT / page).read_text()).splitlines():
        if line.startswith("```"):
            fence = "" if fence else line[3:] or "nothing"
        elif fence:
            yield fence, line
        else:
            yield ("sh", line[4:]) if line.startswith("    ") else ("prose", line)


def prose_of(page: str) -> str:
    return "\n".join(line for kind, line in lines_of(page) if kind == "prose")


def cells_of(page: str) -> Iterator[str]:
    """What stands between backticks in a table's column headed `command`."""
    column = None
    for line in prose_of(page).splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            column = None
        elif "command" in row:
            column = row.index("command")
        elif column is not None:
            yield from re.findall("`([^`]+)`", row[column])


def commands(page: str) -> list[str]:
    """What a page tells its reader to type, in order."""
    found = [line.partition(" #")[0].strip() for kind, line in lines_of(page) if kind == "sh"]
    if page == "README.md":
        found += EXAMPLES
    found += [cell for cell in cells_of(page) if re.match(rf"(?:{PROGRAMS}) ", cell)]
    return [command.strip() for command in found if command]


def test_no_command_stands_where_it_would_not_be_run() -> None:
    typed = re.compile(rf" *(?:\$|[A-Z_]+=\S+|(?:{PROGRAMS}) [-\w./]+)( |$)")
    listing = {*EXAMPLES, *LISTING.splitlines()}
    for page in PAGES:
        for kind, line in lines_of(page):
            assert kind in ("sh", "text", "prose"), f"{page}: a fence marked {kind}: {line}"
            printed = page == "README.md" and line.strip() in listing
            hidden = kind == "text" and typed.match(line) and not printed
            assert not hidden, f"{page}: never run: {line}"


def test_nothing_is_substituted_in_vain() -> None:
    shown = [command for page in PAGES for command in commands(page)]
    for pattern, _, why in INSTEAD:
        assert any(re.search(pattern, command) for command in shown), (pattern, why)
    for file, written, _ in SMALLER:
        assert (ROOT / file).read_text().count(written) == 1, (file, written)


def test_blocks_fit_into_80_columns() -> None:
    for page in PAGES:
        for line in re.findall("^    .*", (ROOT / page).read_text(), re.MULTILINE):
            assert len(line) <= 80, f"{page}: {line}"


def test_files_targets_and_keys_named_in_the_text_exist() -> None:
    keys = config.to_dict(config.Config())
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"data", "runs"}
    for page in PAGES:
        for span in re.findall("`([^`\n]+)`", prose_of(page)):
            first, *rest = span.removeprefix("--").split()
            part, _, key = first.partition(".")
            if first == "make":
                assert set(rest) <= set(targets), f"{page}: {span}"
            elif isinstance(keys.get(part), dict) and key not in ("", "py", "log"):
                assert key in keys[part], f"{page}: {span}"
            elif "/" in first and first.partition("/")[0] in folders:
                choices = re.search(r"\{(.*)\}", first)
                for choice in choices[1].split(",") if choices else [""]:
                    path = re.sub(r"\{.*\}", choice, re.sub(r"<\w+>", "*", first)).rstrip("/")
                    assert list(ROOT.glob(path)), f"{page}: {path}"


# -- running it ------------------------------------------------------------------------------------

Run = Callable[[str], None]


def copy_of_the_repository(place: Path) -> None:
    """The tracked files, with this environment as theirs."""
    for path in tracked_files():
        target = place / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    (place / ".venv").symlink_to(sys.prefix)


def call(command: str, place: Path) -> str:
    """Run it as a reader in that folder would; the output is shown when it fails."""
    env = {**os.environ, "HOME": str(place), "VENV": ".venv", "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{place / '.venv' / 'bin'}:{env['PATH']}"
    child = subprocess.Popen(
        ["bash", "-c", command],
        cwd=place,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = child.communicate()
    except BaseException:
        # torchrun ends its workers; without it they would run on behind a test that was stopped
        os.killpg(child.pid, signal.SIGTERM)
        raise
    assert child.returncode == 0, f"$ {command}\nended with {child.returncode}:\n{said}"
    return said


def write_texts(place: Path) -> None:
    """The pages' inputs: `texts` is any text, `raw` holds dumps by source."""
    names = sorted(topics)
    books, c4, posts = names[::2], names[1::4], names[3::4]
    site = place / "raw/stackexchange/coffee.meta.stackexchange.com"
    wiki = place / "raw/wikipedia"
    for folder in (place / "texts", place / "raw/books", place / "raw/c4", site, wiki):
        folder.mkdir(parents=True)
    for name in names:
        (place / f"texts/{name}.txt").write_text(topics[name])
    for name in books:
        (place / f"raw/books/{name}.txt").write_text(topics[name])
    with gzip.open(place / "raw/c4/c4-train.00000-of-01024.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": topics[name]}) + "\n" for name in c4)
    rows = (
        f'  <row Id="{i}" PostTypeId="1" Body="{escape(topics[name])}" />'
        for i, name in enumerate(posts)
    )
    text = "\n".join(row.replace("\n", "&#xA;") for row in rows)
    (site / "Posts.xml").write_text(f"<posts>\n{text}\n</posts>\n")
    pages = (
        f"<page><title>{name}</title><ns>0</ns><id>{i}</id><text>{escape(topics[name])}</text></page>"
        for i, name in enumerate(names[2::4])
    )
    with bz2.open(wiki / "enwiki-latest-pages-articles.xml.bz2", "wt") as file:
        file.write("<mediawiki>\n" + "\n".join(pages) + "\n</mediawiki>\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of a page in a copy shared by all pages, and none twice."""
    place = tmp_path_factory.mktemp("repository")
    copy_of_the_repository(place)
    write_texts(place)
    for file, written, instead in SMALLER:
        path = place / file
        path.write_text(path.read_text().replace(written, instead))
    done = set()

    def once(command: str) -> None:
        if command not in done:
            done.add(command)
            for pattern, instead, _ in INSTEAD:
                command = re.sub(pattern, instead, command)
            call(command, place)

    return once


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_of_a_page_run(page: str, run: Run) -> None:
    for command in commands(page):
        if not re.search(LONG, command):
            run(command)


@pytest.mark.full
def test_long_commands_run(run: Run) -> None:
    for command in sorted({c for page in PAGES for c in commands(page) if re.search(LONG, c)}):
        run(command)


@pytest.mark.full
def test_the_quickstart_runs_as_it_is(tmp_path: Path) -> None:
    copy_of_the_repository(tmp_path)
    said = call("make -o env quickstart", tmp_path)
    assert '"done"' in (tmp_path / "runs/quickstart/EXIT_REASON").read_text(), said
    assert (tmp_path / "runs/quickstart/report.html").exists()
