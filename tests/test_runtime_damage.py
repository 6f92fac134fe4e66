"""What lies on a disk is spoiled, hostile or too much for it: found, refused; nothing is lost."""

import builtins
import functools
import importlib
import io
import json
import operator
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from made_saves import loaded, plain, run_made_saves
from test_repo import ROOT
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from llama import faults, files
from llama.cli import UserError
from llama.runtime import checkpoint, world

pytestmark = pytest.mark.faults
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def here() -> Iterator[world.World]:
    yield world.start()
    world.stop()


def _save(run: Path, step: int, here: world.World, keep: int = 3) -> str | None:
    return checkpoint.save(run, step, plain(step), {"step": step}, here, keep)


def _left(run: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.folder(run).iterdir())


# -- corruption ------------------------------------------------------------------------------------

KINDS = ("flip", "zeros", "cut", "grow", "delete", "swap", "empty")


def _spoil(path: Path, others: list[Path], kind: str, rng: random.Random) -> bool:
    """Spoil one file; False where this kind leaves it as it is."""
    data = path.read_bytes()
    new = bytearray(data)
    start = rng.randrange(len(data))
    if kind == "flip":
        new[start] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        new[start : start + 4096] = bytes(len(new[start : start + 4096]))
    elif kind == "cut":
        del new[start:]
    elif kind == "empty":
        new.clear()
    elif kind == "grow":
        new += rng.randbytes(rng.randint(1, 5000))
    elif kind == "swap":
        other = rng.choice(others)
        new = bytearray(other.read_bytes())
        other.write_bytes(data)
    if kind == "delete":
        path.unlink()
    else:
        path.write_bytes(new)
    return kind == "delete" or bytes(new) != data


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2 of a run, saved by two processes."""
    place = tmp_path_factory.mktemp("two") / "run"
    run_made_saves("two", place, 0, 0)
    return place


@pytest.mark.slow
def test_every_corruption_is_found_and_the_older_one_taken(
    tmp_path: Path, of_two: Path, here, rng, scale, score, capsys
) -> None:
    found, struck = {"corruption": 0, "corruption.missed": 0}, set()
    while found["corruption"] < scale(80, 1000):
        run = tmp_path / "run"
        shutil.copytree(of_two, run)
        old, new = (checkpoint.path_of(run, step) for step in (1, 2))
        kind, victim = rng.choice(KINDS), rng.choice(sorted(new.iterdir()))
        # swapped with the same file of the other step, or with another of its own
        others = [p for p in new.iterdir() if p != victim]
        copies = tmp_path / "other"
        shutil.copytree(old, copies)
        others += [copies / victim.name]
        if _spoil(victim, others, kind, rng):
            found["corruption"] += 1
            struck.add((kind, victim.name))
            path = checkpoint.choose(run, here)
            said = capsys.readouterr().out
            # a swap inside the folder may be told of the other file
            named = victim.name in said or kind == "swap"
            good = path == old and loaded(old, here) and (new.parent / "corrupt-0").is_dir()
            if not (good and named and "WARNING" in said):
                found["corruption.missed"] += 1
                print(f"missed: {kind} of {victim.name}: {said}")
        shutil.rmtree(run)
        shutil.rmtree(copies)
    score("corruption", found["corruption"], ">= 500")
    score("corruption.missed", found["corruption.missed"], "0")
    assert found["corruption.missed"] == 0
    assert {kind for kind, _ in struck} == set(KINDS) and len({name for _, name in struck}) == 5


@pytest.mark.full
@pytest.mark.parametrize("how", ["torch_save", "dcp_save"])
def test_other_formats_take_spoiled_numbers(how: str, tmp_path: Path, rng, score) -> None:
    """The same flips and zeroed blocks, in the tensors of a file without hashes."""
    tensors, path = plain(1, rows=400), tmp_path / "last"
    missed = 0
    for number in range(60):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
        read = {name: torch.zeros_like(t) for name, t in tensors.items()}
        if how == "torch_save":
            torch.save(tensors, path)
            victim = path
        else:
            dcp.save(dict(tensors), checkpoint_id=path, no_dist=True)
            victim = path / "__0_0.distcp"
        if not _spoil(victim, [], "flip" if number % 2 else "zeros", rng):
            continue
        try:
            if how == "torch_save":
                read = torch.load(path, weights_only=True)
            else:
                dcp.load(read, checkpoint_id=path, no_dist=True)
            missed += 1
        except BaseException as error:  # DCP's errors are no Exceptions
            print(f"{type(error).__name__}: {error}"[:200])
    score(f"corruption.{how}", round(100 * missed / 60))
    assert missed > 30


def test_junk_beside_checkpoints_is_passed_over(tmp_path: Path, here) -> None:
    for step in (1, 2):
        assert _save(tmp_path, step, here) is None
    place = checkpoint.folder(tmp_path)
    (place / "step-00000009").write_text("a file")
    (place / "step-00000008").mkdir()
    (place / "step-00000007").symlink_to(place / "nowhere")
    shutil.copytree(place / "step-00000002", place / "step-00000006")
    (place / "step-00000005").mkdir()
    (place / "step-00000005" / "manifest.json").write_text("[" * 100_000)
    for name in ("step-3", "step-999999999999", "step-00000002 (copy)", "LATEST", "notes"):
        shutil.copytree(place / "step-00000002", place / name)
    assert checkpoint.newest(tmp_path) == place / "step-00000002"
    path = checkpoint.choose(tmp_path, here)
    assert path == place / "step-00000002" and loaded(path, here)
    assert len(list(place.glob("corrupt-*"))) == 5


# -- disks that fail -------------------------------------------------------------------------------


def test_an_error_at_any_point_leaves_the_older_ones_and_training_goes_on(
    tmp_path: Path, here, monkeypatch, rng, scale, score, capsys
) -> None:
    lost, tried = 0, 0
    monkeypatch.setattr(files, "RETRY_AFTER_S", (0.0,))
    actions = ("eio", "enospc", "erofs", "estale", "emfile", "edquot", "raise")
    points = [p for p in faults.POINTS if p.startswith(("ckpt.", "file."))]
    for point in sorted(set(points) - {"ckpt.staged", "ckpt.protected"}):
        for action in rng.sample(actions, scale(2, len(actions))):
            run = tmp_path / f"{point}-{action}"
            for step in (1, 2):
                assert _save(run, step, here, keep=2) is None
            (checkpoint.path_of(run, 3) / "x").mkdir(parents=True)  # something in the way
            faults.armed.cache_clear()
            monkeypatch.setenv(faults.VARIABLE, f"{point}:action={action}")
            problem = _save(run, 3, here, keep=2)
            said = capsys.readouterr()
            monkeypatch.delenv(faults.VARIABLE)
            assert f"FAULT {point} " in said.err
            tried += 1
            if point in ("ckpt.trashed", "ckpt.pruned"):
                assert problem is None and "older checkpoints cannot be removed" in said.out
            elif point == "ckpt.aside" and action != "enospc":
                # nothing is in the way any more when it is tried again
                assert problem is None and "not saved yet, trying again" in said.out
            else:
                assert problem and "free on the disk" in problem, (point, action)
            if action == "enospc" and problem:
                assert "no space left on the disk" in problem
            shutil.rmtree(checkpoint.path_of(run, 3) / "x", ignore_errors=True)
            names = [p for _, p in checkpoint.steps(run) if not checkpoint.damage(p)]
            lost += len(names) < 2 or not loaded(names[-1], here)
            assert not list(checkpoint.folder(run).glob(".tmp-*"))
            assert _save(run, 4, here, keep=2) is None
            lost += not loaded(checkpoint.newest(run), here)
            shutil.rmtree(run)
    score("disk.full", tried, ">= 100")
    score("disk.full.lost", lost, "0")
    assert lost == 0


FULL = """
import os, resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
from made_saves import loaded, plain, run_made_saves
from llama.runtime import checkpoint, world

place, how = Path(sys.argv[1]), sys.argv[2]
here = world.start()
run = place / "run"

def save(step):
    return checkpoint.save(run, step, plain(step), {"step": step}, here, 2)

assert save(1) is None
held = []
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
if how == "bytes":
    with open(place / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
elif how == "inodes":
    try:
        for number in range(10**6):
            (place / f"filler{number}").touch()
    except OSError:
        (place / f"filler{number - 1}").unlink()
        (place / f"filler{number - 2}").unlink()
elif how == "files":
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
elif how == "size":
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, -1))
print("problem:", save(2))
for handle in held:
    os.close(handle)
if how == "bytes":
    (place / "filler").unlink()
for path in place.glob("filler*"):
    path.unlink()
if how == "size":
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
assert [step for step, _ in checkpoint.steps(run)] == [1]
assert loaded(checkpoint.choose(run, here), here)
assert save(3) is None
names = sorted(p.name for p in checkpoint.folder(run).iterdir())
assert names == ["step-00000001", "step-00000003"], names
assert loaded(checkpoint.choose(run, here), here)
print("good")
"""


# each imports torch in a process of its own
SLOW = pytest.mark.full


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, options, said",
    [
        ("bytes", "size=400k", ["0 B free on the disk"]),
        pytest.param("inodes", "nr_inodes=40", ["no space left on the disk"], marks=SLOW),
        pytest.param("files", "", ["Too many open files"], marks=SLOW),
        pytest.param("size", "", ["File too large", "free on the disk"], marks=SLOW),
    ],
)
def test_a_disk_that_is_full(how: str, options: str, said: list[str], tmp_path, score) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "disk"), how]
    (tmp_path / "disk").mkdir()
    if options:
        mount = f'mount -t tmpfs -o {options} none "$0" && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", mount, str(tmp_path / "disk"), *command]
        try_it = [*command[:6], "true"]
        if (
            shutil.which("unshare") is None
            or subprocess.run(try_it, capture_output=True).returncode
        ):
            pytest.skip("this machine lets nobody mount a small disk (unshare -rm)")
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=ROOT)
    score("disk.full", 1, ">= 100")
    score("disk.full.lost", int(done.returncode != 0), "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(word in done.stdout for word in said), done.stdout


# -- hostile content -------------------------------------------------------------------------------


class _Calls:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def _torch_file(value: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _set_by_state(payload: object, metadata: Metadata) -> Metadata:
    metadata.planner_data = payload
    return metadata


def _carriers(code: str, touch: str) -> dict[str, tuple[str, Callable[[Metadata], bytes]]]:
    """Name -> (file, its content from the real metadata): each runs code where it is trusted."""
    inner = io.BytesIO(_torch_file(_Calls(os.system, touch)))
    nested = _Calls(functools.partial(torch.load, weights_only=False), inner)
    by_name = b"cposix\nsystem\n(S'%s'\ntR." % touch.encode()
    by_attribute = b"cbuiltins\ngetattr\n(cpathlib\nPath\n(S'%s'\ntRS'touch'\ntR(tR."
    module = _Calls(importlib.import_module, "os")
    everything = {
        "os.system": lambda real: pickle.dumps(_Calls(os.system, touch)),
        "builtins.eval": lambda real: pickle.dumps(_Calls(builtins.eval, code)),
        "builtins.exec": lambda real: pickle.dumps(_Calls(builtins.exec, code)),
        "operator": lambda real: pickle.dumps(
            _Calls(operator.methodcaller("system", touch), module)
        ),
        "subprocess": lambda real: pickle.dumps(_Calls(subprocess.getoutput, touch)),
        "protocol 0": lambda real: by_name,
        "an allowed class": lambda real: by_attribute % touch.removeprefix("touch ").encode(),
        "torch.load, nested": lambda real: pickle.dumps(nested),
        "planner data": lambda real: pickle.dumps(_set_by_state(_Calls(os.system, touch), real)),
        "a key": lambda real: pickle.dumps(
            Metadata({**real.state_dict_metadata, "x": _Calls(os.system, touch)})
        ),
    }
    found = {f"metadata: {name}": (".metadata", make) for name, make in everything.items()}
    for name, options in {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}.items():
        evil = _torch_file(_Calls(os.system, touch), **options)
        found[f"tensor file: {name}"] = ("__0_0.distcp", lambda real, evil=evil: evil)
    found["bytes item"] = ("__0_0.distcp", lambda real: _torch_file(_Calls(os.system, touch)))
    return found


def _sign(path: Path) -> None:
    """Make the manifest vouch for what is there: whoever can write can do this too."""
    manifest = files.read_json(path / checkpoint.MANIFEST)
    manifest["files"] = {name: checkpoint._entry(path / name) for name in manifest["files"]}
    manifest["sha256"] = checkpoint._own_hash(manifest)
    files.write_json(path / checkpoint.MANIFEST, manifest)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, here, score) -> None:
    sentinel = tmp_path / "executed"
    code = f"open({str(sentinel)!r}, 'w')"
    carriers = _carriers(code, f"touch {sentinel}")
    executed = 0
    for name, (file, make) in carriers.items():
        run = tmp_path / "run"
        assert _save(run, 1, here) is None
        path = checkpoint.path_of(run, 1)
        real = pickle.loads((path / ".metadata").read_bytes())
        evil = make(real)
        if name == "bytes item":
            # an item that DCP would hand to torch.load without its allow-list
            first = next(iter(real.state_dict_metadata))
            real.state_dict_metadata[first] = BytesStorageMetadata()
            (path / ".metadata").write_bytes(pickle.dumps(real))
        elif name.startswith("tensor"):
            # every slice points at the planted file
            for info in real.storage_data.values():
                info.offset, info.length = 0, len(evil)
            (path / ".metadata").write_bytes(pickle.dumps(real))
        (path / file).write_bytes(evil)
        _sign(path)
        # the hashes are right, so loading itself must refuse
        assert checkpoint.choose(run, here) == path
        empty = {key: torch.zeros_like(t) for key, t in plain(0).items()}
        with pytest.raises(UserError, match="cannot be loaded into this model"):
            checkpoint.load(path, empty, here)
        if sentinel.exists():
            executed += 1
            print(f"executed: {name}")
            sentinel.unlink()
        shutil.rmtree(run)
    score("carriers", len(carriers), ">= 8")
    score("carriers.executed", executed, "0")
    assert executed == 0


def test_the_carriers_do_run_where_they_are_trusted(tmp_path: Path, here) -> None:
    sentinel = tmp_path / "executed"
    carriers = _carriers(f"open({str(sentinel)!r}, 'w')", f"touch {sentinel}")
    assert _save(tmp_path / "run", 1, here) is None
    path = checkpoint.path_of(tmp_path / "run", 1)
    for name, (_, make) in carriers.items():
        evil = make(pickle.loads((path / ".metadata").read_bytes()))
        try:
            if name.startswith("metadata"):
                pickle.loads(evil)
            else:
                torch.load(io.BytesIO(evil), weights_only=False)
        except Exception as error:  # some fail after they have run
            print(f"{name}: {error}")
        assert sentinel.exists(), name
        sentinel.unlink()


def test_hostile_json_is_an_error_that_names_the_file(tmp_path: Path, here) -> None:
    assert _save(tmp_path, 1, here) is None
    path = checkpoint.path_of(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    for content in ("[" * 10**5, "{}", "null", "[1]", '{"sha256": 1, "files": 3, "step": "x"}'):
        (path / "manifest.json").write_text(content)
        assert checkpoint.damage(path), content
    outside = {"../../../etc/hostname": {"bytes": 0, "sha256": ""}, "/dev/zero": {"bytes": 0}}
    for name, entry in outside.items():
        manifest["files"] = {name: entry}
        manifest["sha256"] = checkpoint._own_hash(manifest)
        files.write_json(path / "manifest.json", manifest)
        assert "is no file of a checkpoint" in str(checkpoint.damage(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 * 2**20
