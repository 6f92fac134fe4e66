"""Kills and power cuts in the middle of saves: at random, at every named point, at every write.

What is told to be saved must be there, bit for bit, whatever happens then.
"""

import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_saves import loaded, plain, run_made_saves

from llama import faults
from llama.runtime import checkpoint, world

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(1800)]


def test_kills_at_random_moments_lose_nothing(tmp_path: Path, rng, scale, score) -> None:
    found = run_made_saves("kills", tmp_path / "run", rng.randrange(10**6), scale(40, 1000))
    score("kills", found["kills"], ">= 1000")
    score("kills.lost", found["lost"], "0")
    assert found["lost"] == 0
    # they have come in the middle of many saves, of both kinds
    assert found["saves"] >= found["kills"] and 0 < found["background"] < found["kills"]


def test_kills_at_every_named_point_lose_nothing(tmp_path: Path, rng, scale, score) -> None:
    found = run_made_saves("points", tmp_path, rng.randrange(10**6), scale(20, 1))
    score("kills.points", found["kills"], ">= 150")
    score("kills.points.lost", found["lost"], "0")
    assert found["lost"] == 0
    expected = {p for p in faults.POINTS if p.startswith(("ckpt.", "file.", "start."))}
    assert set(found["points"]) == expected


@pytest.mark.full
@pytest.mark.parametrize("how", ["torch_save", "dcp_save"])
def test_saving_in_place_does_lose(how: str, tmp_path: Path, rng, score) -> None:
    found = run_made_saves(how, tmp_path, rng.randrange(10**6), 150)
    score(f"kills.{how}", round(100 * found["lost"] / found["kills"]))
    assert found["lost"] > 0, "the harness finds nothing where there is something to find"


# -- power cuts ------------------------------------------------------------------------------------


class Disk:
    """What a disk may hold after a power cut, from the fsyncs and renames of a process.

    A file or folder holds for certain what it held when it was last synced; beside that a file may
    hold any part of what was written since, or zeros, and a folder its new names or its old ones.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.synced = root, {}
        self.on_event = lambda: None
        self._open: list[int] = []
        fsync, rename = os.fsync, os.rename

        def recorded_fsync(handle: int) -> None:
            self.on_event()
            fsync(handle)
            # held open, so that no other file gets its number
            self._open.append(os.dup(handle))
            status = os.fstat(handle)
            if stat.S_ISDIR(status.st_mode):
                path = os.readlink(f"/proc/self/fd/{handle}")
                content = {entry.name: entry.inode() for entry in os.scandir(path)}
            else:
                content = Path(os.readlink(f"/proc/self/fd/{handle}")).read_bytes()
            self.synced[status.st_ino] = content
            self.on_event()

        def recorded_rename(a: object, b: object, **options: object) -> None:
            self.on_event()
            rename(a, b, **options)
            self.on_event()

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(os, "rename", recorded_rename)

    def close(self) -> None:
        for handle in self._open:
            os.close(handle)

    def after_a_cut(self, place: Path, chance: random.Random) -> None:
        """Lay out below `place` one of the states the disk may be in now."""
        now: dict[int, Path] = {}
        for folder, names, files in os.walk(self.root):
            now |= {os.stat(Path(folder, name)).st_ino: Path(folder, name) for name in names}
            now |= {os.stat(Path(folder, name)).st_ino: Path(folder, name) for name in files}
        self._lay(self.root, place, now, chance)

    def _lay(self, source: Path, target: Path, now: dict[int, Path], chance) -> None:
        target.mkdir()
        current = {entry.name: entry.inode() for entry in os.scandir(source)}
        entries = chance.choice([self.synced.get(source.stat().st_ino, {}), current])
        for name, inode in entries.items():
            path = now.get(inode)
            if path and path.is_dir():
                self._lay(path, target / name, now, chance)
            elif path or isinstance(self.synced.get(inode, b""), bytes):
                (target / name).write_bytes(self._content(inode, path, chance))

    def _content(self, inode: int, path: Path | None, chance) -> bytes:
        synced = self.synced.get(inode)
        current = path.read_bytes() if path else synced or b""
        if synced == current:
            return current
        cut = chance.randrange(len(current) + 1)
        some = [current, current[:cut], current[:cut] + bytes(len(current) - cut), bytes(cut)]
        return chance.choice(some if synced is None else [*some, synced])


@pytest.fixture(scope="module")
def here() -> Iterator[world.World]:
    yield world.start()
    world.stop()


def test_a_power_cut_after_any_write_loses_nothing(
    tmp_path: Path, here, rng, scale, score, monkeypatch
) -> None:
    root = tmp_path / "disk"
    run = root / "runs" / "mine"
    root.mkdir()
    disk = Disk(root, monkeypatch)
    found = {"cuts": 0, "lost": 0, "told": 0, "younger": 0}

    def cut() -> None:
        disk.on_event = lambda: None
        for _ in range(scale(1, 12)):
            image = tmp_path / f"image{found['cuts']}"
            disk.after_a_cut(image, rng)
            checkpoint.sweep(image / "runs/mine")
            path = checkpoint.choose(image / "runs/mine", here) if found["told"] else None
            step = checkpoint.read_state(path)["step"] if path else 0
            good = step >= found["told"] and (path is None or loaded(path, here))
            found["cuts"] += 1
            found["lost"] += not good
            found["younger"] += step > found["told"]
        disk.on_event = cut

    disk.on_event = cut
    for step in range(1, scale(5, 9)):
        assert checkpoint.save(run, step, plain(step), {"step": step}, here, keep=2) is None
        found["told"] = step
        cut()
    disk.on_event = lambda: None
    disk.close()
    print(found)
    score("power.prefixes", found["cuts"], ">= 1000")
    score("power.lost", found["lost"], "0")
    # some came between the rename and the last word
    assert found["lost"] == 0 and found["cuts"] > 40 and found["younger"] > 0


def test_the_model_of_the_disk_loses_what_is_not_synced(
    tmp_path: Path, here, rng, monkeypatch
) -> None:
    """Without its fsyncs the same protocol loses checkpoints: the test above can fail."""
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root, monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    assert checkpoint.save(root / "run", 1, plain(1), {"step": 1}, here, keep=2) is None
    disk.close()
    lost = 0
    for number in range(40):
        image = tmp_path / f"image{number}"
        disk.after_a_cut(image, rng)
        lost += not [p for _, p in checkpoint.steps(image / "run") if not checkpoint.damage(p)]
    assert lost > 0
