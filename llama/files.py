"""Files that exist whole or not at all: atomic files and folders, hashes, strict readers.

Everything the project writes goes through here, because a killed process, a full disk or a cut
download must never leave something that looks complete. A plain zstd or gzip reader returns the
part of a truncated file without a word; the readers here fail and name the file and the byte.
"""

import errno
import fcntl
import gzip
import hashlib
import math
import os
import platform
import re
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar

import jsonargparse
import orjson
import yaml
import zstandard

from llama import faults
from llama.cli import UserError, as_user_error

CHUNK_BYTES = 1 << 16
# One chunk of a hostile zstd frame may grow 30,000 times, of a gzip member 1,000 times.
ZSTD_CHUNK_BYTES = 1 << 12
ZSTD_LEVEL = 3
# A zstd frame may ask for a window of 2 GiB; ours need 8 MiB, downloaded ones rarely more than 128.
ZSTD_MAX_WINDOW_BYTES = 1 << 27
# Of a file, with what its anchors stand for.
YAML_MAX_VALUES = 100_000
DOCUMENT_SUFFIXES = (".jsonl.zst", ".jsonl.gz", ".jsonl")
# What a corpus run keeps beside its documents, in the same formats.
NO_DOCUMENTS = ("journal.jsonl", "quarantine.jsonl.zst")
# What a shared disk says while its server restarts, or it is mounted again.
PASSING = (errno.EIO, errno.ESTALE, errno.EROFS, errno.EBUSY, errno.ETIMEDOUT, errno.ENOTCONN)
RETRY_AFTER_S = (0.5, 2.0, 8.0)
T = TypeVar("T")


def sha256(path: str | Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: str | Path) -> None:
    """Make a file's content, or renames and new names inside a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def locked(folder: Path, problem: str) -> IO[bytes]:
    """A file that keeps a second process out of a folder, made if need be, until it is closed.

    The kernel closes it when the process dies. Raises `UserError` with `problem` where one is in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # opened for writing: network file systems lock no other way
    file = open(folder / ".lock", "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(problem) from None
    except OSError as error:
        # as on Lustre mounted without flock
        print(f"WARNING: {folder} cannot be locked ({error.strerror}): start it only once")
    return file


def free_bytes(path: str | Path) -> int:
    """Free bytes on the disk that holds `path`, or would hold it once created."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def retried(action: Callable[[], T]) -> T:
    """What `action` returns; it is done again after an error of the disk that may pass.

    It must begin from the beginning each time: an fsync that has failed once succeeds the second
    time although the data is lost.
    """
    for pause_s in RETRY_AFTER_S:
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(pause_s)
    return action()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[Any]]:
    """Open a part file that becomes `path` when the block ends, and vanishes if it raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # machines that share a disk may have threads of one number
    part = path.with_name(f"{path.name}.part-{platform.node()}-{threading.get_native_id()}")
    try:
        with open(part, "wb") as file:
            faults.point("file.opened", name=path.name)
            yield file
            file.flush()
            faults.point("file.written", name=path.name)
            os.fsync(file.fileno())
            faults.point("file.synced", name=path.name)
        os.rename(part, path)
        faults.point("file.renamed", name=path.name)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replace `path` by `data` in one rename, trying again where the disk is away for a moment."""

    def write() -> None:
        with atomic_file(path) as file:
            file.write(data.encode() if isinstance(data, str) else data)

    retried(write)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` at the end, and vanishes if the block raises."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already: it is never overwritten, remove or rename it")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    part.mkdir()
    try:
        yield part
        for each in (*sorted(part.rglob("*")), part):
            fsync(each)
        os.rename(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    fsync(path.parent)


def readable(path: str | Path) -> AbstractContextManager[None]:
    """What the system says against reading a file is the user's error, with its name."""
    what = f"{path} cannot be read"
    return as_user_error(what, OSError, show=lambda error: error.strerror or str(error))


def read_json(path: str | Path) -> Any:
    """Parse a JSON file; a missing or broken one is the user's error with its name."""
    with readable(path):
        data = Path(path).read_bytes()
    with as_user_error(f"{path} is not valid JSON", orjson.JSONDecodeError):
        return orjson.loads(data)


def json_object(where: object, value: Any) -> dict[str, Any]:
    """A value of a JSON file that must be an object."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object")
    return value


def read_object(path: str | Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    return json_object(path, read_json(path))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, indented, atomically."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    write_atomic(path, orjson.dumps(value, option=options))


class _StrictYaml(yaml.SafeLoader):
    """YAML in which a key given twice is an error instead of a silent last-one-wins, and so are
    anchors that stand for themselves or, nested, for more values than anybody has written.
    """

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        self.sizes: dict[yaml.Node, float] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.check_event(yaml.AliasEvent)  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        if node and not alias:
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            every = chain(*parts) if isinstance(node, yaml.MappingNode) else parts
            # what is not finished yet is this node itself
            self.sizes[node] = 1 + sum(self.sizes.get(part, math.inf) for part in every)
            if self.sizes[node] > YAML_MAX_VALUES:
                line = node.start_mark.line + 1
                raise UserError(f"{self.name}:{line} repeats values without end by its anchors")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)  # type: ignore[no-untyped-call]
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"{self.name}:{line} gives the key {key!r} twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_read: Callable[[str], Any] = jsonargparse.get_loader("yaml")


def _strictly(text: str) -> Any:
    value = yaml.load(text, _StrictYaml)
    if isinstance(value, dict) and (other := value.get("config")):
        raise UserError(f"config: {other} stands in a YAML: give it as a --config of its own")
    return _read(text)


# what jsonargparse reads by itself too: values of options, and files as in `--optim mine.yaml`
jsonargparse.set_loader("yaml", _strictly, (yaml.YAMLError, UserError))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys of a YAML file; an unreadable file or a key given twice is a `UserError`."""
    try:
        with readable(path), open(path, encoding="utf-8") as file:
            value = yaml.load(file, _StrictYaml)
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply") from error
    # a list as a key, a thirteenth month, a number of 5,000 digits
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = re.sub(r"\s+", " ", str(error))
        raise UserError(f"{path} is not readable YAML: {reason}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no keys: expected lines such as `name: value`")
    return value


def read_chunks(path: str | Path) -> Iterator[bytes]:
    """Decompressed chunks of a .zst, .gz or plain file; a frame that does not end is an error.

    Raises `UserError` with the file and the byte of the compressed input where reading stopped.
    """
    suffix = Path(path).suffix
    with readable(path), as_user_error(f"{path} is damaged", EOFError), open(path, "rb") as file:
        if suffix not in (".zst", ".gz"):
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
            return
        try:
            sip = ZSTD_CHUNK_BYTES if suffix == ".zst" else CHUNK_BYTES
            yield from inflated(file, suffix, sip)
        except (zstandard.ZstdError, zlib.error) as error:
            raise EOFError(f"{error} before byte {file.tell()}") from error


def inflated(file: IO[bytes], suffix: str, sip_bytes: int) -> Iterator[bytes]:
    """The frames of a .zst or members of a .gz one after the other, read `sip_bytes` at a time.

    Raises EOFError for one that is cut off, where plain readers stop silently.
    """
    frame: Any = None
    frames = 0
    while data := file.read(sip_bytes):
        while data:
            if frame is None:
                # gzip may be padded with zeros behind a member; no header begins with one
                data = data.lstrip(b"\0") if suffix == ".gz" else data
                if not data:
                    break
                frame, frames = _new_frame(suffix), frames + 1
            if chunk := frame.decompress(data):
                yield chunk
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None or not frames:
        raise EOFError(f"the last frame is cut off at byte {file.tell()}")


def _new_frame(suffix: str) -> Any:
    if suffix == ".gz":
        return zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW_BYTES).decompressobj()


def read_lines(path: str | Path) -> Iterator[bytes]:
    """Lines of a .zst, .gz or plain file without their newline; see `read_chunks` for errors."""
    rest: list[bytes] = []
    for chunk in read_chunks(path):
        first, *others = chunk.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    last = b"".join(rest)
    if last:
        yield last


class LineWriter:
    """Writes lines to a .zst (with checksum), .gz or plain file that appears when closed whole."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> "LineWriter":
        self._manager = atomic_file(self.path)
        self._raw = self._manager.__enter__()
        self._stream: IO[bytes]
        if self.path.suffix == ".zst":
            compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
            self._stream = compressor.stream_writer(self._raw, closefd=False)  # type: ignore[assignment]
        elif self.path.suffix == ".gz":
            # no name and no time in the header: the same lines give the same bytes
            self._stream = gzip.GzipFile("", "wb", fileobj=self._raw, mtime=0)  # type: ignore[assignment]
        else:
            self._stream = self._raw
        return self

    def write(self, line: bytes) -> None:
        """Append one line; the newline is added here."""
        self._stream.write(line + b"\n")

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None and self._stream is not self._raw:
            self._stream.close()
        self._manager.__exit__(kind, *rest)


def source_folders(documents: Path) -> list[str]:
    """Names of the folders of a command's `--input`, each a source of documents."""
    if not documents.is_dir():
        raise UserError(f"--input {documents} is no folder")
    folders = (path.name for path in documents.iterdir() if path.is_dir())
    names = sorted(name for name in folders if not name.startswith("."))
    if not names:
        raise UserError(f"--input {documents} holds no folder of documents per source")
    return names


def document_files(folder: str | Path) -> list[Path]:
    """Files of documents anywhere below a folder, by name.

    Journals and quarantines are none, nor is anything in a folder whose name begins with a dot.
    """
    found = {path for suffix in DOCUMENT_SUFFIXES for path in Path(folder).rglob(f"*{suffix}")}
    return sorted(
        path
        for path in found
        if path.name not in NO_DOCUMENTS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_documents(path: str | Path) -> Iterator[dict[str, Any]]:
    """Documents `{"id": str, "text": str, "source": str, "meta": {...}}` of one file, strictly.

    Raises `UserError` with file and line number for a line that is not such an object.
    """
    for number, line in enumerate(read_lines(path), 1):
        try:
            document = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise UserError(f"{path}:{number} is not valid JSON: {error}") from error
        if not isinstance(document, dict):
            raise UserError(f"{path}:{number} is not a JSON object")
        for key in ("id", "text"):
            if not isinstance(document.get(key), str):
                raise UserError(f"{path}:{number} has no text under the key {key!r}")
        yield document
