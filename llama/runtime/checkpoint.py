"""Checkpoints that are complete or do not exist.

`ckpt/step-00001200/` holds DCP tensor files, `state.json` and `manifest.json` (size and sha256 of
every other file). It is written aside, hashed, fsynced and renamed by rank 0 only when every rank
has succeeded; it is never written again, only `KEEP` may be laid beside. Loading checks every hash
first and falls back to the next older checkpoint, loudly. DCP's metadata is a pickle: it is read
with an allow-list, and everything that is no tensor lives in the JSON.
"""

import errno
import hashlib
import io
import os
import pickle
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import FileSystem

from llama import faults, files
from llama.cli import UserError, show_bytes
from llama.runtime.world import World

STEP_FOLDER = re.compile(r"step-(\d{8})")
FORMAT = 1  # of the folder and of state.json; every older one is read
NO_SPACE = "no space left on the disk"
FINAL = (NO_SPACE, "KeyboardInterrupt")  # trying again does not help
# A file that says these when it is read is spoiled; anything else has to be mended by somebody.
SPOILED = (errno.ENOENT, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
MANIFEST, STATE, METADATA, KEEP = "manifest.json", "state.json", ".metadata", "KEEP"
# what DCP has to say about its own insides; for good, since a save may run in a thread
warnings.filterwarnings("ignore", module="torch.distributed")

# What DCP's own metadata may name; anything else in the pickle is refused before it runs.
_DCP = "torch.distributed.checkpoint"
ALLOWED_GLOBALS = {
    f"{_DCP}.metadata": "Metadata MetadataIndex StorageMeta TensorStorageMetadata TensorProperties"
    " ChunkStorageMetadata _MEM_FORMAT_ENCODING",
    f"{_DCP}.filesystem": "_StorageInfo",
    "torch": "Size device",
    "torch.serialization": "_get_layout",
    "pathlib": "Path PosixPath",
    "collections": "OrderedDict",
    "builtins": "set",
}


def _member(kind: object, name: str) -> Any:
    if kind is not dcp_metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"{kind}.{name} is not allowed in checkpoint metadata")
    return dcp_metadata._MEM_FORMAT_ENCODING[name]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member  # how Python 3.11.0 to 3.11.3 write the member of an enum
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in ALLOWED_GLOBALS.get(module, "").split():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in checkpoint metadata")


class Reader(dcp.FileSystemReader):
    """DCP's reader, with the allow-list and for tensors only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        data = (Path(self.path) / METADATA).read_bytes()
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, dcp_metadata.TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{name} in {self.path} is no tensor")
        metadata.storage_meta = metadata.storage_meta or dcp_metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


# -- finding and checking --------------------------------------------------------------------------


def folder(run: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run) / "ckpt"


def path_of(run: str | Path, step: int) -> Path:
    """The checkpoint of a step, whether it exists or not."""
    return folder(run) / f"step-{step:08d}"


def steps(run: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every finished checkpoint of a run, oldest first."""
    return _numbered(folder(run), STEP_FOLDER)


def _numbered(place: Path, names: str | re.Pattern[str]) -> list[tuple[int, Path]]:
    """What there is of such names with a number in them, lowest first."""
    # a folder that may not be read is an error: it must not look like an empty one
    every = files.retried(lambda: os.listdir(place)) if place.exists() else []
    found = [(re.fullmatch(names, name), place / name) for name in every]
    return sorted((int(match[1]), path) for match, path in found if match)


def newest(run: str | Path) -> Path:
    """Newest checkpoint of a run whose files all have the size its manifest says.

    A path that is a checkpoint itself is returned as it is. Raises `UserError` where there is none.
    """
    path = Path(run)
    if STEP_FOLDER.fullmatch(path.name):
        if problem := damage(path, hashes=False):
            raise UserError(f"{path} is no complete checkpoint: {problem}")
        return path
    for _, candidate in reversed(steps(path)):
        if not damage(candidate, hashes=False):
            return candidate
    raise UserError(f"{path} holds no complete checkpoint (looked for {folder(path)}/step-*)")


def damage(path: Path, hashes: bool = True, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, in words; None when they are as they were written.

    With `parts`, only every parts-th file is read, so that ranks can divide the work. Raises
    `UserError` for one that this process may not read, or that a newer version has written.
    """
    try:
        manifest = orjson.loads(files.retried((path / MANIFEST).read_bytes))
        if (
            manifest["sha256"] != _own_hash(manifest)
            or path_of("", manifest["step"]).name != path.name
        ):
            return f"{MANIFEST} is not what was written"
        newer, listed = manifest["format"] > FORMAT, sorted(manifest["files"].items())
        for name, entry in [] if newer else listed[part::parts]:
            if "/" in name:
                return f"{name} is no file of a checkpoint"
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if hashes and files.retried(partial(files.sha256, path / name)) != entry["sha256"]:
                return f"the content of {name} has changed"
    except OSError as error:
        if error.errno not in SPOILED:
            raise UserError(f"{path} cannot be read: {error}") from error
        return f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not what was written ({type(error).__name__}: {error})"
    if newer:
        raise UserError(
            f"{path} is of format {manifest['format']}, this version reads up to {FORMAT}: "
            "go on with the version that wrote it"
        )
    return None


def _own_hash(manifest: dict[str, Any]) -> str:
    """The manifest vouches for every other file; this vouches for the manifest."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(orjson.dumps(rest, option=orjson.OPT_SORT_KEYS)).hexdigest()


# -- saving ----------------------------------------------------------------------------------------


def save(
    run: str | Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    world: World,
    keep: int,
    keep_every: int | None = None,
) -> str | None:
    """Write `step-<step>`; all ranks call it together. Returns what failed, or None.

    `prune` says which older ones stay. A failure on one rank removes the folder, leaves every older
    checkpoint alone, and is the same text on every rank: training may go on. All is written anew
    after a moment (`files.RETRY_AFTER_S`), unless that cannot help (`FINAL`).
    """
    verdict = None
    for pause_s in (0.0, *files.RETRY_AFTER_S):
        if verdict:
            world.say(f"WARNING: step {step} is not saved yet, trying again: {verdict}")
        time.sleep(pause_s)
        verdict = _save_once(run, step, tensors, state, world)
        if not verdict or any(word in verdict for word in FINAL):
            break
    if not verdict and world.leads:
        _, problem = _attempt(lambda: prune(run, keep, keep_every))
        if problem:
            world.say(f"WARNING: older checkpoints cannot be removed: {problem}")
    return verdict


def _save_once(run: str | Path, step: int, tensors: Any, state: Any, world: World) -> str | None:
    final = path_of(run, step)

    def make() -> Path:
        sweep(run)
        part = final.with_name(f".tmp-{step:08d}-{uuid.uuid4().hex[:8]}")
        part.mkdir(parents=True)
        faults.point("ckpt.folder", step=step)
        return part

    part, problem = world.broadcast(_attempt(make) if world.leads else None)
    if not problem:
        written, problem = _attempt(lambda: _write_rank(part, step, tensors, world))
        results = world.gather((written, problem))
        problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(results) if text]
        if world.leads and not problems:
            every = {name: entry for entries, _ in results for name, entry in entries.items()}
            _, problem = _attempt(lambda: _publish(part, final, step, every, state))
        # thousands of ranks tell the same of one disk
        problem = "; ".join(problems[:3]) or problem
    if world.leads and problem:
        # DCP hides a full disk behind a broken write position
        problem = f"{problem} ({show_bytes(files.free_bytes(run))} free on the disk)"
        _attempt(lambda: sweep(run))
    verdict: str | None = world.broadcast(problem)
    return verdict


def _attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None) or (None, what went wrong). DCP raises BaseExceptions of its own."""
    try:
        return action(), None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if "/gloo/transport/" in str(error):
            # another process is gone: nothing can be agreed on any more
            raise
        return None, _reason(error)


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if failures:
        # DCP wraps what each rank raised
        error = next(iter(failures.values()))[0]
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return NO_SPACE if getattr(error, "errno", 0) == errno.ENOSPC else text


def _write_rank(
    part: Path, step: int, tensors: dict[str, torch.Tensor], world: World
) -> dict[str, Any]:
    """Write this rank's tensors and hash what was written: {name: {bytes, sha256}}."""
    writer = dcp.FileSystemWriter(part, single_file_per_rank=True, sync_files=False)
    writer.fs = _Files()
    dcp.save(dict(tensors), storage_writer=writer, process_group=world.group)
    faults.point("ckpt.written", step=step)
    entries = {path.name: _entry(path) for path in part.glob(f"__{world.rank}_*")}
    faults.point("ckpt.hashed", step=step)
    return entries


class _Files(FileSystem):
    """DCP's files, on the disk once closed: its own fsync comes before the buffer is written."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            faults.point("file.opened", name=Path(path).name)
            yield stream
        faults.point("file.written", name=Path(path).name)
        files.fsync(path)
        faults.point("file.synced", name=Path(path).name)

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        faults.point("file.renamed", name=Path(new_path).name)


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


def _publish(
    part: Path, final: Path, step: int, every: dict[str, Any], state: dict[str, Any]
) -> None:
    """Complete the folder and give it its name; only rank 0, only when all ranks have written."""
    files.write_json(part / STATE, state)
    faults.point("ckpt.state", step=step)
    for name in (STATE, METADATA):
        every[name] = _entry(part / name)

    def look() -> None:
        # a shared disk may be late to show what other machines have written
        if differing := set(os.listdir(part)) ^ set(every):
            text = f"the files on disk are not those written: {sorted(differing)}"
            raise OSError(errno.ESTALE, text)

    files.retried(look)
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "files": every}
    files.write_json(part / MANIFEST, manifest | {"sha256": _own_hash(manifest)})
    faults.point("ckpt.listed", step=step)
    files.fsync(part)
    faults.point("ckpt.synced", step=step)
    if final.exists() and (damage(final) or _entry(part / STATE) != _entry(final / STATE)):
        # a good one would have been resumed from, or an earlier try has come so far
        final.rename(_free_name(final.parent, "corrupt"))
        faults.point("ckpt.aside", step=step)
    if not final.exists():
        part.rename(final)
    shutil.rmtree(part, ignore_errors=True)
    faults.point("ckpt.renamed", step=step)
    for place in final.parents[:4]:
        # ckpt/, the run and runs/ may be new as well; what is above may be closed to us
        with suppress(PermissionError):
            files.fsync(place)
    faults.point("ckpt.named", step=step)


def _free_name(place: Path, word: str) -> Path:
    """The name after the highest that is taken, also by a link to nowhere."""
    taken = _numbered(place, rf"{word}-(\d+)")
    return place / f"{word}-{taken[-1][0] + 1 if taken else 0}"


def prune(run: str | Path, keep: int, keep_every: int | None = None) -> None:
    """Remove checkpoints, each by a rename first.

    The newest `keep` stay, and as many of those that `protect` has marked; those of every
    `keep_every` steps stay for good.
    """
    found = steps(run)
    marked = [path for _, path in found if (path / KEEP).exists()]
    stay = {path for _, path in found[-keep:]} | set(marked[-keep:])
    for step, path in found:
        if path not in stay and not (keep_every and step % keep_every == 0):
            trash = path.with_name(f".trash-{path.name}-{uuid.uuid4().hex[:8]}")
            path.rename(trash)
            faults.point("ckpt.trashed", step=step)
            shutil.rmtree(trash, ignore_errors=True)
            faults.point("ckpt.pruned", step=step)


def protect(path: Path, why: str) -> None:
    """Keep a checkpoint although newer ones come, also over restarts; rank 0 only."""
    # not by way of a new name, which would make the folder again that is just being removed
    (path / KEEP).write_text(why + "\n")
    faults.point("ckpt.protected")


def abandon(run: str | Path, step: int, branch: int, keep: int) -> None:
    """Rename the checkpoints after a step that were saved before this rewind, oldest first.

    Of all that were abandoned the last `keep` stay, to look into; a disk must outlive many rewinds.
    """
    for number, path in steps(run):
        # what cannot be read is found damaged when it is to be loaded
        with suppress(UserError):
            if number > step and read_state(path).get("branch", 0) < branch:
                path.rename(_free_name(path.parent, "abandoned"))
    for _, path in _numbered(folder(run), r"abandoned-(\d+)")[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def sweep(run: str | Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for pattern in (".tmp-*", ".trash-*"):
        for path in folder(run).glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


# -- loading ---------------------------------------------------------------------------------------


def choose(run: str | Path, world: World) -> Path | None:
    """Newest checkpoint whose every byte is as written; all ranks call it together.

    Files are divided over the ranks. A damaged checkpoint is said aloud and renamed `corrupt-<n>`.
    """
    candidates: list[Path] = world.broadcast([path for _, path in reversed(steps(run))])
    for path in candidates:
        problem = world.together(partial(damage, path, part=world.rank, parts=world.size))
        if not (problem := world.first(problem)):
            return path
        if world.leads:
            aside = _free_name(path.parent, "corrupt")
            path.rename(aside)
            print(f"WARNING: {path} is damaged ({problem}); moved to {aside.name}, trying the next")
    if candidates:
        raise UserError(f"every checkpoint in {folder(run)} is damaged: see the lines above")
    return None


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return files.read_object(path / STATE)


def load(path: Path, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Fill `tensors` in place, resharding as needed; all ranks call it together."""
    reader, group = Reader(path), world.group
    _, problem = _attempt(
        lambda: dcp.load(dict(tensors), storage_reader=reader, process_group=group)
    )
    if problem:
        raise UserError(f"{path} cannot be loaded into this model: {problem}")


def refuse_small_disk(run: str | Path, needed_bytes: int, keep: int = 0) -> None:
    """Refuse to start where not one more checkpoint fits; warn where `keep` and one more do not."""
    free, missing = files.free_bytes(run), max(keep + 1 - len(steps(run)), 1)
    text = f"the disk of {run} has {show_bytes(free)} free, one checkpoint takes "
    text += f"{show_bytes(needed_bytes)}"
    if free < needed_bytes:
        raise UserError(f"{text}: free some space or use another disk")
    if free < missing * needed_bytes:
        print(f"WARNING: {text}, and there will be {missing} more (checkpoint.keep {keep})")
