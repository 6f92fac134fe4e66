"""The repository itself: import ranks, wheel, tracked files, sizes, README, make targets."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The first matching prefix gives a module's rank; it may import its own rank and below.
RANKS = [
    ("tokenizer.train", 1),
    ("tokenizer", 0),
    ("kernels", 0),
    ("llama.config", 0),
    ("llama.cli", 0),
    ("llama.files", 0),
    ("llama.html", 0),
    ("llama.limits", 0),
    ("llama.costs", 0),
    ("llama.faults", 0),
    ("llama.corpus", 1),
    ("llama.model", 1),
    ("llama.data", 2),
    ("llama.optim", 2),
    ("llama.parallel", 2),
    ("llama.runtime", 2),
    ("llama.generate", 3),
    ("llama.convert", 3),
    ("llama.report", 3),
    ("llama.doctor", 3),
    ("llama.plan", 3),
    ("llama.trace", 3),
    ("llama.__main__", 3),
    ("train", 4),
    ("llama.verify", 5),
    ("benchmarks", 5),
]
OURS = ("llama", "kernels", "tokenizer", "train", "benchmarks")


def _modules() -> dict[str, Path]:
    found = {"train": ROOT / "train.py"}
    for package in ("llama", "kernels", "tokenizer", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def _rank(module: str) -> int | None:
    for prefix, rank in RANKS:
        if module == prefix or module.startswith(prefix + "."):
            return rank
    return None


def _imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """Everything a file imports, at its top or inside functions, as module names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else str(node.module))
    return found


def test_every_module_has_a_rank_and_imports_downwards_without_circles() -> None:
    modules = _modules()
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        if name == "llama":
            continue
        rank = _rank(name)
        assert rank is not None, f"{name} has no rank: add it to RANKS and docs/design.md"
        graph[name] = set()
        for imported in _imports(path, modules):
            if imported.split(".")[0] not in OURS or imported == "llama":
                continue
            other = _rank(imported)
            assert other is not None and other <= rank, f"{name} may not import {imported}"
            graph[name].add(imported)
    seen: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in seen:
            for other in graph.get(name, ()):
                if other != name:
                    visit(other, (*trail, name))
            seen[name] = 1

    for name in graph:
        visit(name, ())


def test_kernels_and_the_tokenizer_import_nothing_of_ours() -> None:
    modules = _modules()
    for name, path in modules.items():
        if name.startswith("kernels") or name == "tokenizer.tokenizer":
            home = name.split(".")[0]
            ours = {i for i in _imports(path, modules) if i.split(".")[0] in OURS}
            assert all(i.split(".")[0] == home for i in ours), (name, ours)


def test_text_is_cleaned_and_tokenised_without_torch() -> None:
    code = (
        "import sys, llama.corpus.__main__, llama.data.tokenize, llama.data.mixture,"
        " llama.data.ledger, llama.costs, tokenizer.train\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("package", ["kernels", "tokenizer"])
def test_names_shared_with_pypi_cost_nothing_to_import(package: str) -> None:
    code = (
        f"import sys, {package}\n"
        "heavy = {'torch', 'triton', 'sentencepiece', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    body = ast.parse((ROOT / package / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr)


def tracked_files() -> list[Path]:
    """What a clone holds, and what is not yet added to it."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).exists()]


def test_tracked_files_name_no_machine_and_no_secret() -> None:
    # written in pieces, so that this file does not find itself
    places = "|".join(["ro" + "ot", "ho" + "me/[a-z]", "Us" + "ers/[a-z]", "wo" + "rk/"])
    pattern = re.compile(rf"(?<![\w./])/(?:{places})|hf_[A-Za-z0-9]{{30}}|AKIA[A-Z0-9]{{16}}")
    for path in tracked_files():
        if path.suffix in (".png", ".model", ".bin", ".idx"):
            continue
        found = pattern.search(path.read_text(errors="replace"))
        assert not found, f"{path.relative_to(ROOT)} holds {found[0]!r}"


def test_files_stay_small() -> None:
    lines = {
        str(path.relative_to(ROOT)): path.read_text().count("\n")
        for path in tracked_files()
        if path.suffix == ".py" and "tests" not in path.parts
    }
    assert max(lines.values()) <= 450
    done = subprocess.run([sys.executable, "scripts/size.py"], cwd=ROOT, text=True)
    assert done.returncode == 0, "more lines of code than scripts/size.py allows"


def test_benchmarks_shadow_no_standard_module() -> None:
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)


@pytest.mark.slow
def test_wheel_holds_the_code_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for path in tracked_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert {name.split("/")[0] for name in names} == {"llama", "kernels", "tokenizer"}
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in tracked_files()
        if path.relative_to(ROOT).parts[0] in names_of_packages()
    }
    assert names == expected


def names_of_packages() -> set[str]:
    return {"llama", "kernels", "tokenizer"}


def test_an_old_python_is_named_before_anything_is_written(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    # stands in for an old interpreter: runs the check with another version
    old.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import sys; "
        'sys.version_info = (3, 9, 1); sys.version = "3.9.1 (old)"; exec(sys.argv[2])\' "$@"\n'
    )
    old.chmod(0o755)
    venv = tmp_path / "venv"
    result = subprocess.run(
        ["make", "env", f"PYTHON={old}", f"VENV={venv}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "is Python 3.9.1, this project needs 3.11 or newer" in result.stderr + result.stdout
    assert not venv.exists()


def test_make_honours_its_variables() -> None:
    url = "https://download.pytorch.org/whl/cpu"
    shown = subprocess.run(
        ["make", "-n", "-B", "env", "PYTHON=python9", "VENV=elsewhere", f"TORCH_INDEX={url}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "python9 -m venv elsewhere" in shown
    assert f"elsewhere/bin/python -m pip install -q --index-url {url} -c constraints.txt" in shown
    assert ".venv" not in shown


def test_every_command_is_listed_and_answers_help() -> None:
    listing = subprocess.run(
        [sys.executable, "-m", "llama"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert max(map(len, listing.splitlines())) <= 80
    for name, path in _modules().items():
        text = path.read_text()
        # without a main it is a script that another module starts
        has_main = 'if __name__ == "__main__"' in text and "def main(" in text
        if has_main and name not in ("llama.__main__", "train") and "benchmarks" not in name:
            assert f"python -m {name.removesuffix('.__main__')}" in listing, name


def test_readme_shows_the_commands_and_the_tree_as_they_are() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import readme

    text = (ROOT / "README.md").read_text()
    assert readme.rewritten(text) == text, "run python scripts/readme.py"
