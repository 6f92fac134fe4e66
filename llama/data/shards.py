"""Token shards: the byte layout of Megatron-LM's IndexedDataset, and reading it without surprises.

In: ``<tokens>/<source>/{train,valid}/`` with ``manifest.json`` and, per shard, ``.bin`` (tokens),
``.idx`` (documents), ``.ids.zst`` and ``.hash`` (which document lies where). Out: a ``Source`` that
reads any stretch of the concatenation of its shards by pread, so that a file that shrinks under a
run is an error with name and offset, not a signal. The data of §2.1.
"""

import itertools
import os
import re
import resource
import threading
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama import cli, files
from llama.cli import UserError
from llama.data.indexed import DTYPES, SUFFIXES, Dtype, check_ids, read_index

USAGE = "python -m llama.data.shards {check,adopt}, each with --help"
ALIKE = ("tokenizer_sha256", "vocab_size", "dtype", "bos_id", "eos_id")  # in sources of one run
READ_AT_OPEN = 1 << 25  # a source of fewer tokens is read whole when opened, others at both ends


@dataclass(frozen=True)
class Shard:
    """A line of the manifest; ``start`` is its first token in the concatenation."""

    name: str
    documents: int
    tokens: int
    start: int
    hashes: dict[str, str]


class Source:
    """One split of one source, opened and checked; see ``open_sources``."""

    def __init__(self, name: str, split: str, folder: str | Path) -> None:
        self.name, self.split, self.folder = name, split, Path(folder)
        path = self.folder / "manifest.json"
        manifest = files.read_json(path)
        self.manifest_sha256 = files.sha256(path)
        what = f"{path} is no manifest of token shards"
        with cli.as_user_error(what, KeyError, TypeError, ValueError, show=repr):
            self.dtype: Dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
            self.tokenizer_sha256 = str(manifest["tokenizer_sha256"])
            self.vocab_size, self.bos_id, self.eos_id = (
                int(manifest[key]) for key in ("vocab_size", "bos_id", "eos_id")
            )
            self.shards = _manifest_shards(manifest["shards"])
        if self.dtype not in DTYPES.values():
            raise UserError(f"{path}: dtype {self.dtype} is neither uint16 nor int32")
        self._starts = [shard.start for shard in self.shards]
        self.n_tokens = sum(shard.tokens for shard in self.shards)
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()
        for k in range(len(self.shards)):
            self._check_sizes(k)
            self._check_some_ids(k)
            self.close()  # checking thousands of shards must not keep a file of each open

    def path(self, shard: int, suffix: str = ".bin") -> Path:
        return self.folder / (self.shards[shard].name + suffix)

    def n_windows(self, seq_len: int) -> int:
        """Windows of T+1 tokens, the last of each shared with the next one."""
        return max(0, (self.n_tokens - 1) // seq_len)

    def shard_at(self, offset: int) -> int:
        """The shard that holds a token of the concatenation."""
        return bisect_right(self._starts, offset) - 1

    def read(self, offset: int, count: int) -> NDArray[Any]:
        """Tokens [offset, offset + count) of the concatenation; safe to call from threads.

        Raises ``UserError`` with file and byte when the file ends early or cannot be read.
        """
        assert 0 <= offset and offset + count <= self.n_tokens, (offset, count, self.n_tokens)
        k = self.shard_at(offset)
        shard = self.shards[k]
        inside = min(count, shard.start + shard.tokens - offset)
        tokens = self._read_shard(k, offset - shard.start, inside)
        if inside == count:
            return tokens
        return np.concatenate([tokens, self.read(offset + inside, count - inside)])

    def check_ids(self, tokens: NDArray[Any], offset: int) -> None:
        """Refuse ids outside the vocabulary among tokens read at ``offset``."""
        while len(tokens):
            k = self.shard_at(offset)
            first = offset - self.shards[k].start
            inside = min(len(tokens), self.shards[k].tokens - first)
            check_ids(tokens[:inside], self.vocab_size, self.path(k), first)
            tokens, offset = tokens[inside:], offset + inside

    def _read_shard(self, k: int, first: int, count: int) -> NDArray[Any]:
        byte, size = first * self.dtype.itemsize, count * self.dtype.itemsize
        try:
            handle = self._file(k)
            data, ends = os.pread(handle, size, byte), os.fstat(handle).st_size
        except OSError as error:
            raise UserError(f"{self.path(k)}: byte {byte}: {error.strerror}") from error
        if len(data) < size:
            raise UserError(
                f"{self.path(k)} ends at byte {ends}, but tokens up to byte {byte + size} were"
                " there when it was opened"
            )
        return np.frombuffer(data, self.dtype)

    def _file(self, k: int) -> int:
        """Opened once: thousands of ranks opening a file for each window would be one too many for
        the metadata server of a cluster.
        """
        with self._lock:
            if k not in self._files:
                self._files[k] = os.open(self.path(k), os.O_RDONLY)
            return self._files[k]

    def close(self) -> None:
        with self._lock:
            for handle in self._files.values():
                os.close(handle)
            self._files.clear()

    def _check_sizes(self, k: int) -> None:
        """The sizes that the manifest, the index and its last sequence give are one."""
        shard, path, place = self.shards[k], self.path(k), self.path(k, ".idx")
        expected = shard.tokens * self.dtype.itemsize
        with files.readable(path):
            size = path.stat().st_size
        index = read_index(place, whole=False)
        if size != expected:
            raise UserError(
                f"{path} ends at byte {size}, but its manifest counts {shard.tokens} tokens of"
                f" {self.dtype.itemsize} bytes: {expected}"
            )
        documents = len(index.documents) - 1
        if index.dtype != self.dtype or documents != shard.documents:
            raise UserError(
                f"{place} holds {documents} documents of {index.dtype}, its manifest counts"
                f" {shard.documents} of {self.dtype}"
            )
        ends = index.pointers[-1:] + index.lengths[-1:] * self.dtype.itemsize
        if ends.tolist() != [size]:
            raise UserError(f"{place}: its last sequence does not end at byte {size} of {path}")

    def _check_some_ids(self, k: int) -> None:
        """Constant work for a large source."""
        tokens = self.shards[k].tokens
        some = min(tokens, 4096) if self.n_tokens > READ_AT_OPEN else tokens
        for first in sorted({0, tokens - some}):
            check_ids(self._read_shard(k, first, some), self.vocab_size, self.path(k), first)


def _manifest_shards(lines: list[dict[str, Any]]) -> list[Shard]:
    found: list[Shard] = []
    start = 0
    for line in lines:
        hashes = {suffix: str(line[key]) for suffix, key in SUFFIXES.items()}
        tokens = int(line["tokens"])
        if not re.fullmatch(r"[^/\0]+", str(line["name"])):
            raise ValueError(f"{line['name']!r} is no name of a shard")
        if tokens <= 0:
            raise ValueError(f"shard {line['name']} of {tokens} tokens")
        found.append(Shard(str(line["name"]), int(line["documents"]), tokens, start, hashes))
        start += tokens
    return found


def open_sources(
    tokens_folder: str | Path, names: Iterable[str], split: str = "train"
) -> dict[str, Source]:
    """The named sources of a tokens folder, all made with one tokenizer.

    Raises ``UserError`` for a missing source, a damaged file (with name and byte), and for sources
    that differ in tokenizer, vocabulary or dtype.
    """
    folder = Path(tokens_folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of token shards")
    sources: dict[str, Source] = {}
    for name in names:
        path = folder / name / split
        if not (path / "manifest.json").is_file():
            finished = sorted(p.parts[-3] for p in folder.glob(f"*/{split}/manifest.json"))
            has = ", ".join(finished) or "-"
            raise UserError(f"{path} holds no finished source; {folder} has: {has}")
        sources[name] = Source(name, split, path)
    opened = list(sources.values())
    _allow_open_files(sum(len(source.shards) for source in opened))
    for key, other in itertools.product(ALIKE, opened[1:]):
        ours, theirs = getattr(opened[0], key), getattr(other, key)
        if ours != theirs:
            raise UserError(
                f"{folder}: sources differ in {key}:"
                f" {ours} in {opened[0].name}, {theirs} in {other.name}"
            )
    model = folder / "tokenizer.model"
    if opened and model.is_file():
        digest, recorded = files.sha256(model), opened[0].tokenizer_sha256
        if digest != recorded:
            raise UserError(
                f"{model} (sha256 {digest[:12]}) is not the tokenizer that the shards beside it"
                f" were made with ({recorded[:12]})"
            )
    return sources


def _allow_open_files(n: int) -> None:
    """Every shard keeps a file open; large sets pass the usual soft limit of 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = n + 1024 if hard == resource.RLIM_INFINITY else min(n + 1024, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def check(folder: Path) -> tuple[int, list[str]]:
    """Read and hash every file under a folder of shards; returns their number and what is wrong."""
    manifests = sorted(folder.rglob("manifest.json"))
    if not manifests:
        raise UserError(f"{folder} holds no manifest.json of token shards")
    n = 0
    wrong: list[str] = []
    with cli.Progress("check", len(manifests), "splits") as progress:
        for path in manifests:
            try:
                source = Source(path.parent.parent.name, path.parent.name, path.parent)
            except UserError as error:
                wrong.append(str(error))
                continue
            for k in range(len(source.shards)):
                n += len(SUFFIXES)
                wrong += wrong_hashes(source, k) or _check_content(source, k)
            source.close()
            progress.update()
    return n, wrong


def wrong_hashes(source: Source, k: int) -> list[str]:
    """Files of one shard that are missing, or not as the manifest has them."""
    wrong = []
    for suffix, expected in source.shards[k].hashes.items():
        path = source.path(k, suffix)
        if not path.is_file():
            wrong.append(f"{path} is missing")
        elif files.sha256(path) != expected:
            wrong.append(f"{path} is damaged: its sha256 is not the one in its manifest")
    return wrong


def _check_content(source: Source, k: int) -> list[str]:
    """Ids and borders of documents, in case the files were made wrong and hashed as such."""
    shard = source.shards[k]
    try:
        starts = read_index(source.path(k, ".idx")).starts
        for first in range(0, shard.tokens, READ_AT_OPEN):
            offset, count = shard.start + first, min(READ_AT_OPEN, shard.tokens - first)
            source.check_ids(source.read(offset, count), offset)
    except UserError as error:
        return [str(error)]
    for begin, end in itertools.pairwise(starts.tolist()):
        first, last = (int(source.read(shard.start + at, 1)[0]) for at in (begin, end - 1))
        if (first, last) != (source.bos_id, source.eos_id):
            at = begin * source.dtype.itemsize
            return [f"{source.path(k)}: the document at byte {at} is not between BOS and EOS"]
    return []


def main(argv: list[str]) -> None:
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command == "adopt":
        # imported here: training reads shards and has no use for a tokenizer
        from llama.data import adopt

        adopt.main(rest)
    elif command == "check":
        p = cli.parser("python -m llama.data.shards check", "Reads and hashes every shard.")
        p.add_argument("folder", type=str, help="tokens, a source of them, or a split of a source")
        folder = p.parse_args(rest).folder
        n, wrong = check(Path(folder))
        for line in wrong:
            print(line)
        if wrong:
            raise UserError(f"{len(wrong)} faults in the shards under {folder}")
        print(f"{n} files under {folder} are whole")
    elif command in ("-h", "--help"):
        print(USAGE)
    else:
        raise UserError(f"{command!r} is no command of: {USAGE}")


if __name__ == "__main__":
    cli.run(main)
