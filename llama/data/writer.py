"""Documents of one unit of input to one train and one valid shard.

In: (id, token ids, bytes of text) one after the other. Out: ``.bin .idx .ids.zst .hash`` in each
split and their lines for the manifest. A hash of the id decides the split, so the choice outlives
reruns and shard counts, and the place: within a shard, documents lie in the order of that hash, so
neighbours are unrelated and the hashes, written down, are a sorted index. The data of §2.1.
"""

import hashlib
import os
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from llama import cli, files
from llama.cli import UserError, expect
from llama.data.indexed import MAX_SEQUENCE, SUFFIXES, check_ids, dtype_for, write_index
from tokenizer.tokenizer import Tokenizer

SPLITS = ("train", "valid")
TOKENIZER = "tokenizer.model"
VALID_PER_10K = 10
MANIFEST_VERSION = 1


def id_hash(document_id: str) -> int:
    """The first 64 bits of blake2b(id): decides a document's split and its place."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True)
class Vocabulary:
    """What every shard of a set has in common."""

    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return dtype_for(self.vocab_size)


def open_tokenizer(path: str | Path) -> tuple[Path, Tokenizer, Vocabulary]:
    """The tokenizer in a folder (or the model file itself), and what shards record of it."""
    path = Path(path)
    model = path if path.is_file() else path / TOKENIZER
    if not model.is_file():
        raise UserError(f"{model} is missing: make it with python -m tokenizer.train")
    try:
        tokenizer = Tokenizer(model)
    except ValueError as error:
        raise UserError(str(error)) from error
    facts = tokenizer.sha256, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id
    return model, tokenizer, Vocabulary(*facts)


def place_tokenizer(model: Path, tokens_folder: Path) -> None:
    """Keep the tokenizer beside its shards, so that a run can turn ids into text."""
    target = tokens_folder / TOKENIZER
    if not target.exists():
        files.write_atomic(target, model.read_bytes())
    elif files.sha256(target) != files.sha256(model):
        raise UserError(
            f"{tokens_folder} was made with another tokenizer than {model}:"
            " choose another --output, or remove it"
        )


def add_arguments(p: cli.Parser) -> None:
    """How documents are divided, for the commands that make shards."""
    held_out = "held-out documents"
    p.add_argument("--valid_per_10k", type=int, default=VALID_PER_10K, help=held_out)
    p.add_argument("--shard_tokens", type=str, default="1B", help="about this many per shard")


def division(args: Any) -> tuple[int, int]:
    """(documents of 10,000 that are held out, tokens of a shard) as given, each in its range."""
    held_out, shard_tokens = args.valid_per_10k, cli.count(args.shard_tokens)
    expect(0 <= held_out < 10_000, f"--valid_per_10k is {held_out}", "0 to 9999")
    expect(shard_tokens >= 1, f"--shard_tokens is {args.shard_tokens}", "more than 0")
    return held_out, shard_tokens


class ShardWriter:
    """Collects documents beside the shards, then writes them in order; memory is O(documents)."""

    def __init__(
        self,
        folder: str | Path,
        name: str,
        vocabulary: Vocabulary,
        valid_per_10k: int = VALID_PER_10K,
        max_sequence: int = MAX_SEQUENCE,
    ) -> None:
        self.folder, self.name, self.vocabulary = Path(folder), name, vocabulary
        self.valid_per_10k, self.max_sequence = valid_per_10k, max_sequence
        self._seen: set[int] = set()
        self._hashes, self._lengths, self._text_bytes = array("Q"), array("q"), array("q")
        self._ids: list[bytes] = []

    def __enter__(self) -> "ShardWriter":
        self.folder.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            for suffix in SUFFIXES:
                (self.folder / split / (self.name + suffix)).unlink(missing_ok=True)
        self._spool_path = self.folder / f".{self.name}.spool.part-{os.getpid()}"
        self._spool = open(self._spool_path, "w+b")
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        # on a full disk closing fails again, on what was still buffered
        try:
            self._spool.close()
        finally:
            self._spool_path.unlink(missing_ok=True)

    def has(self, document_id: str) -> bool:
        return id_hash(document_id) in self._seen

    def add(self, document_id: str, tokens: NDArray[Any], text_bytes: int) -> None:
        """Take a document with a new id, BOS and EOS included."""
        key = id_hash(document_id)
        assert key not in self._seen, document_id
        check_ids(tokens, self.vocabulary.vocab_size, self._spool_path, 0)
        self._seen.add(key)
        self._hashes.append(key)
        self._lengths.append(len(tokens))
        self._text_bytes.append(text_bytes)
        self._ids.append(orjson.dumps(document_id))
        self._spool.write(tokens.astype(self.vocabulary.dtype, copy=False).tobytes())

    def finish(self) -> dict[str, dict[str, Any] | None]:
        """Write the shards; per split its line of the manifest, or None without documents."""
        hashes = np.array(self._hashes, np.uint64)
        order = np.argsort(hashes)
        valid = hashes[order] % np.uint64(10_000) < self.valid_per_10k
        return {
            "train": self._shard("train", order[~valid]),
            "valid": self._shard("valid", order[valid]),
        }

    def _shard(self, split: str, documents: NDArray[np.int64]) -> dict[str, Any] | None:
        if not len(documents):
            return None
        base = self.folder / split / self.name
        dtype = self.vocabulary.dtype
        lengths = np.array(self._lengths, np.int64)
        sizes = lengths * dtype.itemsize
        places = np.cumsum(sizes) - sizes
        with files.atomic_file(f"{base}.bin") as out:
            for place, size in zip(
                places[documents].tolist(), sizes[documents].tolist(), strict=True
            ):
                self._spool.seek(place)
                out.write(self._spool.read(size))
        with files.LineWriter(f"{base}.ids.zst") as lines:
            for document in documents.tolist():
                lines.write(self._ids[document])
        files.write_atomic(f"{base}.hash", np.array(self._hashes, "<u8")[documents].tobytes())
        write_index(Path(f"{base}.idx"), dtype, lengths[documents], self.max_sequence)
        return {
            "name": self.name,
            "documents": len(documents),
            "tokens": int(lengths[documents].sum()),
            "text_bytes": int(np.array(self._text_bytes, np.int64)[documents].sum()),
            **{key: files.sha256(f"{base}{suffix}") for suffix, key in SUFFIXES.items()},
        }


def write_manifest(
    folder: Path,
    split: str,
    vocabulary: Vocabulary,
    shards: list[dict[str, Any]],
    extra: dict[str, Any],
) -> None:
    """``manifest.json`` of one split, a line per shard; it makes the split exist."""
    fields = {
        "version": MANIFEST_VERSION,
        "source": folder.name,
        "split": split,
        **asdict(vocabulary),
        "dtype": vocabulary.dtype.name,
        **extra,
        **{key: sum(s[key] for s in shards) for key in ("documents", "tokens", "text_bytes")},
    }
    head = orjson.dumps(fields, option=orjson.OPT_INDENT_2).decode().removesuffix("\n}")
    lines = ",\n".join("    " + orjson.dumps(shard).decode() for shard in shards)
    text = f'{head},\n  "shards": [' + (f"\n{lines}\n  " if lines else "") + "]\n}\n"
    files.write_atomic(folder / split / "manifest.json", text)
