"""The doctor: every machine gets an answer in 80 columns, whatever is broken on it."""

import importlib
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from llama import doctor
from llama.cli import UserError
from llama.doctor import Finding

ROOT = Path(__file__).parent.parent


def distribution(folder: Path, name: str, version: str) -> None:
    """What pip leaves of an installed package, as far as its name goes."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def doctor_with(path: Path, **env: str) -> tuple[int, str]:
    """Exit code and output of the command with another folder of packages in front."""
    # a later PYTHONPATH entry holds the project, so that the fakes are found first
    paths = os.pathsep.join(map(str, (path, ROOT)))
    result = subprocess.run(
        [sys.executable, "-m", "llama.doctor"],
        cwd=path, env={**os.environ, "PYTHONPATH": paths, **env}, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in result.stdout + result.stderr, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    return result.returncode, result.stdout


def verdicts(findings: Iterable[Finding]) -> dict[str, str]:
    return {f.name: f.verdict for f in findings}


# -- clashes ---------------------------------------------------------------------------------------


def test_a_clash_of_names_is_refused_by_name_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    doctor.refuse_clashes()
    name, version = rng.choice(["kernels", "tokenizer"]), f"0.{rng.randrange(99)}.1"
    distribution(tmp_path, "tokenizers", "0.22")
    distribution(tmp_path, f"{name}-fast", "1.0")
    monkeypatch.syspath_prepend(tmp_path)
    doctor.refuse_clashes()
    distribution(tmp_path, name, version)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=rf"{name} {version} is installed.*`pip uninstall {name}`"):
        doctor.refuse_clashes()
    (found,) = doctor.clashes()
    assert found.verdict == "problem" and f"{name} {version}" in found.text and name in found.todo
    assert found in doctor.basics()


def test_an_import_that_finds_another_package_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verdicts(doctor.basics())["names"] == "ok"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise SystemExit('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    (found,) = doctor.clashes()
    assert found.verdict == "problem" and str(tmp_path / "kernels") in found.text


def test_the_check_at_start_up_imports_nothing_heavy() -> None:
    code = (
        "import sys; from llama.doctor import refuse_clashes; refuse_clashes()\n"
        "assert not {'torch', 'jsonargparse', 'yaml', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# -- broken packages -------------------------------------------------------------------------------

BROKEN = {
    "raises": "raise ImportError('undefined symbol: _ZN3c104cuda')",
    "exits": "import os; os._exit(3)",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "talks": "print('{}'); print('welcome \\x1b[31m'); raise SystemExit('no licence')",
}
SAID = {
    "raises": "undefined symbol: _ZN3c104cuda",
    "exits": "exit code 3",
    "crashes": "killed by signal 11",
    "talks": "no licence",
}


@pytest.mark.parametrize("how", list(BROKEN))
def test_a_package_that_cannot_be_imported_is_a_finding(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text(BROKEN[how])
    distribution(tmp_path, "wandb", "9.9")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "OPTIONAL", {"wandb": "logging"})
    monkeypatch.setattr(doctor, "requirements", dict)
    (found,) = doctor.packages()
    assert found.verdict == "note" and SAID[how] in found.text and "9.9" in found.text
    assert "pip" in found.todo


def test_a_package_that_never_answers_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "IMPORT_TIMEOUT_S", 0.2)
    assert doctor.tried("import time; time.sleep(60)") == (False, "no answer after 0.2 s")


def test_a_folder_of_that_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # wandb leaves one where a run was started
    (tmp_path / "xformers").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(doctor, "requirements", dict)
    (found,) = [f for f in doctor.packages() if f.name == "xformers"]
    assert found.verdict == "ok" and "not installed" in found.text


@pytest.mark.slow
def test_optional_packages_broken_or_not_the_doctor_answers(tmp_path: Path) -> None:
    code, text = doctor_with(ROOT)
    assert code == 0 and "training works here: 0 problems" in text
    for name in ("Python", "numpy", "torch", "GPU", "triton", "xformers", "disk", "ports"):
        assert re.search(rf"^(ok|note) +{name} ", text, re.M), (name, text)
    for name, how in zip(("xformers", "triton", "matplotlib"), BROKEN, strict=False):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(BROKEN[how])
    code, text = doctor_with(tmp_path)
    assert code == 0 and len(re.findall("cannot be imported", text)) == 3, text
    distribution(tmp_path, "kernels", "0.18.2")
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    code, text = doctor_with(tmp_path)
    assert code == 1 and "training is not possible here: 2 problems" in text
    assert re.search(r"^problem +torch +cannot be imported: OSError: libcudart", text, re.M)
    assert re.search(r"^problem +names +the PyPI package kernels 0.18.2", text, re.M)


@pytest.mark.slow
def test_a_missing_required_package_is_named(tmp_path: Path) -> None:
    # the command line itself is made of it
    (tmp_path / "jsonargparse.py").write_text("raise ImportError('broken')")
    code, text = doctor_with(tmp_path)
    assert code == 1
    assert re.search(
        r"^problem +jsonargparse .*cannot be imported: ImportError: broken", text, re.M
    )
    assert "pip install 'jsonargparse>=" in text


# -- single checks ---------------------------------------------------------------------------------


def test_versions_are_compared_by_number() -> None:
    for version, least, enough in [
        ("2.13.0+cpu", "2.11", True), ("2.9.1", "2.11", False), ("3", "2.11", True),
        ("2.11", "2.11", True), ("2.11.0rc1", "2.11", True), ("0", "0.1", False),
    ]:  # fmt: skip
        assert doctor.at_least(version, least) is enough, (version, least)


def test_old_and_missing_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    least = doctor.requirements()
    assert least["torch"] == "2.11" and "sentencepiece" in least and len(least) >= 10
    monkeypatch.setattr(doctor, "requirements", lambda: {"numpy": "99", "no-such-thing": "1"})
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    old, missing = doctor.packages()
    assert old.verdict == missing.verdict == "problem" and "numpy>=99" in old.todo
    assert "No module named 'no_such_thing'" in missing.text


GPU = {"name": "NVIDIA X", "capability": [9, 0], "free": 70 * 10**9, "total": 80 * 10**9}
GPU |= {"error": None}
TORCH = {"version": "2.13.0", "cuda": "13.0", "gloo": True, "nccl": [2, 29, 7], "error": None}


def examined(monkeypatch: pytest.MonkeyPatch, **changes: object) -> list[Finding]:
    answer = {**TORCH, "gpus": [dict(GPU, free=79 * 10**9)], **changes}

    def tried(code: str) -> tuple[bool, str]:
        return True, json.dumps(answer) if code == doctor.TORCH_PROBE else ""

    monkeypatch.setattr(doctor, "tried", tried)
    return list(doctor.torch_and_gpus())


def test_what_torch_says_about_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = examined(monkeypatch)
    assert verdicts(fine)["GPU"] == "ok" and verdicts(fine)["NCCL"] == "ok"
    assert any("0: NVIDIA X, 79.0 GB of 80.0 GB free" in f.text for f in fine)
    assert "2.29.7" in [f.text for f in fine]
    for changes, name, verdict in [
        ({"version": "2.6.0"}, "torch", "problem"),
        ({"gloo": False}, "gloo", "problem"),
        ({"nccl": None}, "NCCL", "problem"),
        ({"gpus": [GPU]}, "GPU", "note"),
        ({"gpus": [dict(GPU, capability=[7, 5])]}, "GPU", "note"),
        ({"gpus": [dict(GPU, error="no kernel image is available")]}, "GPU", "problem"),
        ({"gpus": []}, "GPU", "note"),
    ]:  # fmt: skip
        found = [f for f in examined(monkeypatch, **changes) if f.name == name]
        assert [f.verdict for f in found] == [verdict], changes
        assert found[0].todo or changes == {"gpus": []}


def test_a_driver_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    error = "The NVIDIA driver on your system is too old"
    found = examined(monkeypatch, gpus=[], error=error)
    (gpu,) = [f for f in found if f.name == "GPU"]
    assert gpu.verdict == "note" and error in gpu.text
    (gpu,) = [f for f in examined(monkeypatch, gpus=[], cuda=None) if f.name == "GPU"]
    assert gpu.verdict == "note" and "CUDA build" in gpu.todo
    # nor is there a compiler in that PATH
    (compiler,) = [f for f in doctor.basics() if f.name == "compiler"]
    assert compiler.verdict == "note" and "no C compiler" in compiler.text


def test_a_taken_port_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setattr(doctor, "RENDEZVOUS_PORT", taken.getsockname()[1])
        (found,) = [f for f in doctor.network() if f.name == "ports"]
        assert found.verdict == "note" and "--standalone" in found.todo


def test_a_variable_that_restarts_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, verdict in (("1", "ok"), ("0", "note")):
        monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", value)
        assert verdicts(doctor.network())["restarts"] == verdict


def test_a_full_and_a_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "LITTLE_DISK_BYTES", 1 << 62)
    (found,) = doctor.disks()
    assert found.verdict == "note" and "81 GB for 7B" in found.todo
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    (found,) = doctor.disks()
    assert found.verdict == "problem" and str(tmp_path) in found.text


def test_a_check_that_fails_is_a_finding_and_lines_stay_short(
    monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    def fails() -> Iterable[Finding]:
        raise OSError("/proc is not mounted\n" + "x" * rng.randrange(200))

    monkeypatch.setattr(doctor, "CHECKS", [fails, lambda: [Finding("ok", "CPU", "there")]])
    found = list(doctor.examine())
    assert [f.verdict for f in found] == ["note", "ok"]
    text = doctor.shown(found[0])
    assert max(map(len, text.splitlines())) <= 80 and "/proc is not mounted" in text
    assert len(text.splitlines()[0].split()) >= 3


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="fast"):
        doctor.main(["--fast"])
