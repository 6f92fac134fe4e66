"""What finished runs have left in a folder: for every source its stages, from raw to clean.

In: the --output of `run`, `dedup` or `all`. Out: per source the stages in the order in which its
documents went through them, each with its counts, its documents and the list of what it dropped.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from llama import files
from llama.cli import UserError
from llama.corpus import engine, journal, unit
from llama.corpus.graph import SOURCES
from llama.corpus.shuffle import STAGES, WORK

# So much is read of the lists of what a stage has dropped.
LIST_BYTES = 1 << 28
READING = "reading"


@dataclass(frozen=True)
class Stage:
    """A folder that a run has finished, with its stats.json; its name tells the recipe or step."""

    folder: Path
    stats: dict[str, Any]

    @property
    def name(self) -> str:
        same = self.stats["options"].get("same", "text")
        return self.stats["recipe"] + (f" by {same}" if same != "text" else "")

    @property
    def total(self) -> dict[str, dict[str, int]]:
        return defaultdict(dict, self.stats["total"])

    @property
    def steps(self) -> list[str]:
        """As they are named in the lists, in their order."""
        return sorted(self.total["steps"], key=lambda step: int(step.partition(" ")[0]))

    @property
    def shards(self) -> list[Path]:
        return [self.folder / made["name"] for made in self.stats["outputs"]]

    @property
    def lists(self) -> list[Path]:
        """Of what was dropped, one for every shard."""
        names = (path.name.partition(".")[0] for path in self.shards)
        return [self.folder / unit.DROPPED.format(name) for name in names]

    def header(self) -> dict[str, Any]:
        """The plan: recipe, options and the inputs with their sizes."""
        return dict(orjson.loads(next(files.read_lines(self.folder / journal.NAME))))

    def inputs(self) -> dict[str, dict[str, Any]]:
        """What was read, with bytes and hash; the hash of a folder is not known."""
        header, *records = map(orjson.loads, files.read_lines(self.folder / journal.NAME))
        hashed = {n: s for record in records for n, s in record.get("inputs", {}).items()}
        known = {n: {"bytes": s, "sha256": None} for n, s in header["inputs"].items()}
        return {name: hashed.get(name, entry) for name, entry in known.items()}

    def ended(self) -> Iterator[dict[str, Any]]:
        """What the lists say of documents that ended here, as far as they are read."""
        return map(orjson.loads, spread(self.lists, LIST_BYTES))


def sources(clean: Path) -> dict[str, list[Stage]]:
    """Stages of every source, those of the paper first."""
    if (clean / engine.STATS).is_file():
        stages = _stages(clean)
        return {stages[0].stats["options"].get("source") or clean.resolve().name: stages}
    places = [clean / STAGES / "recipe", *_numbered(clean / STAGES), clean]
    names = {path.parent.name for place in places for path in place.glob(f"*/{engine.STATS}")}
    if not names:
        raise UserError(f"{clean} holds no finished run of llama.corpus: no {engine.STATS}")
    order = [n for n in SOURCES if n in names] + sorted(names - {*SOURCES})
    return {name: [s for place in places for s in _stages(place / name)] for name in order}


def unfinished(clean: Path) -> list[str]:
    """Folders of stages that were begun and have no counts yet."""
    begun = {path.parent for path in clean.rglob(journal.NAME) if WORK not in path.parts}
    return sorted(str(f.relative_to(clean)) for f in begun if not (f / engine.STATS).is_file())


def _stages(folder: Path) -> list[Stage]:
    paths = (path / engine.STATS for path in [*_numbered(folder / STAGES), folder])
    return [Stage(path.parent, files.read_json(path)) for path in paths if path.is_file()]


def _numbered(folder: Path) -> list[Path]:
    """0, 1, ... or 1-exact, 2-minhash, ..."""
    found = {path: path.name.partition("-")[0] for path in folder.glob("*")}
    return sorted((p for p, n in found.items() if n.isdigit()), key=lambda p: int(found[p]))


def spread(paths: Sequence[Path], n_bytes: int) -> Iterator[bytes]:
    """The first lines of every file, n_bytes of them in all."""
    for path in paths:
        room = n_bytes // len(paths)
        for line in files.read_lines(path):
            yield line
            room -= len(line)
            if room <= 0:
                break
