"""Speed of the tokenizer beside sentencepiece itself: `python -m benchmarks.encode`.

In: real text, by default the sources and documentation of the installed Python and its packages,
each text once. Out: MB per CPU second of both in alternation from an empty cache, their ratio, how
it grows with the text seen, several processes at once, cache and memory. The ids of both are
compared as well.
"""

import hashlib
import multiprocessing
import os
import platform
import re
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from llama import cli, files
from llama.cli import UserError
from tokenizer.tokenizer import Tokenizer
from tokenizer.train import train, training_lines

SUFFIXES = (".py", ".txt", ".md", ".rst", ".html")
# Text that one of the two encodes before it is the other's turn: short beside what other work does
# to a shared processor, long beside what one leaves of its caches to the other.
TURN_BYTES = 5_000_000
TRAIN_BYTES = 10_000_000
GOAL = 4.0


def gather(folders: Sequence[Path], limit_bytes: int) -> tuple[list[str], int]:
    """Distinct texts in the order of their hashes up to the limit; and bytes of all there were."""
    found: dict[bytes, tuple[str, int]] = {}
    paths = {path.resolve() for f in folders for path in f.rglob("*") if path.is_file()}
    for path in sorted(paths):
        for data in _texts(path):
            try:
                found[hashlib.blake2b(data).digest()] = data.decode(), len(data)
            except UnicodeDecodeError:
                continue
    chosen, size = [], 0
    for _, (text, bytes_) in sorted(found.items()):
        if size >= limit_bytes:
            break
        chosen.append(text)
        size += bytes_
    return chosen, sum(bytes_ for _, bytes_ in found.values())


def _texts(path: Path) -> Iterator[bytes]:
    if path.name.endswith(files.DOCUMENT_SUFFIXES) and path.name not in files.NO_DOCUMENTS:
        yield from (document["text"].encode() for document in files.read_documents(path))
    elif path.suffix in SUFFIXES:
        yield path.read_bytes()


def size_of(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def turns(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts, about `TURN_BYTES` at a time."""
    turn: list[str] = []
    left = TURN_BYTES
    for text in texts:
        turn.append(text)
        left -= len(text.encode())
        if left <= 0:
            yield turn
            turn, left = [], TURN_BYTES
    if turn:
        yield turn


def compare(model: str, texts: Sequence[str]) -> dict[str, Any]:
    """Both over all texts in turns: per turn its bytes and the CPU seconds of each."""
    ours, theirs = Tokenizer(model), sentencepiece.SentencePieceProcessor(model_file=model)
    rows, tokens = [], 0
    before = _peak_bytes()
    for turn in turns(texts):
        began = time.process_time()
        expected = [theirs.encode(text) for text in turn]
        middle = time.process_time()
        got = [ours.encode_array(text) for text in turn]
        end = time.process_time()
        for a, b in zip(got, expected, strict=True):
            assert np.array_equal(a, b), "the ids differ from sentencepiece's"
            tokens += len(b)
        rows.append((size_of(turn), middle - began, end - middle))
    assert ours.packer, "this model is encoded whole"
    return {
        "turns": rows,
        "tokens": tokens,
        "cache_chunks": ours.packer.cached_chunks,
        "cache_bytes": ours.packer.cached_bytes,
        "peak_growth_bytes": _peak_bytes() - before,
    }


def alone(model: str, texts: Sequence[str]) -> dict[str, Any]:
    """Ours by itself: seconds for all texts, on the clock and of the processor."""
    tokenizer = Tokenizer(model)
    began, cpu_began = time.perf_counter(), time.process_time()
    for text in texts:
        tokenizer.encode_array(text)
    return {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_began}


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_processes(
    work: Callable[[str, Sequence[str]], dict[str, Any]],
    model: str,
    shares: Sequence[Sequence[str]],
) -> list[dict[str, Any]]:
    """Call `work` on each share in a process of its own, all at once."""

    def child(share: Sequence[str], end: Connection) -> None:
        end.send(work(model, share))

    # forked, so that the text is neither read nor sent again
    context = multiprocessing.get_context("fork")
    running = []
    for share in shares:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(share, there))
        process.start()
        there.close()
        running.append((process, here))
    results = [here.recv() for _, here in running]
    for process, _ in running:
        process.join()
    return results


def sums(taken: Sequence[tuple[int, float, float]]) -> list[tuple[str, float, float, float]]:
    """(what, bytes, seconds of sentencepiece, seconds of ours) of all turns and of each half."""
    half = max(1, len(taken) // 2)
    groups = {"all": taken, "first half": taken[:half], "last half": taken[-half:]}
    return [
        (name, sum(r[0] for r in rows), sum(r[1] for r in rows), sum(r[2] for r in rows))
        for name, rows in groups.items()
    ]


def scaling(model: str, texts: Sequence[str], most: int) -> list[dict[str, float]]:
    """Ours in 1 to `most` processes, each with a share as large as the one alone has."""
    rows = []
    for n in range(1, most + 1):
        shares = [texts[i::most] for i in range(n)]
        sizes = [size_of(share) for share in shares]
        results = in_processes(alone, model, shares)
        speeds = [size / r["wall_s"] for size, r in zip(sizes, results, strict=True)]
        rows.append(
            {
                "processes": n,
                "bytes_per_s": sum(speeds),
                "bytes_per_cpu_s": sum(sizes) / sum(r["cpu_s"] for r in results),
            }
        )
    return rows


def machine() -> str:
    """The processor's name and number of cores, as a folder name."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        name = found[1]
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {os.cpu_count()} cores".lower()).strip("-")


def measure(model: str, texts: list[str], most: int) -> dict[str, Any]:
    """Run everything and print it."""
    (both,) = in_processes(compare, model, [texts])
    rows = sums(both["turns"])
    print(
        cli.table(
            ("text", "MB", "sentencepiece MB/s", "ours MB/s", "ratio"),
            [
                (name, f"{b / 1e6:.1f}", f"{b / 1e6 / s:.2f}", f"{b / 1e6 / o:.2f}", f"{s / o:.2f}")
                for name, b, s, o in rows
            ],
        )
    )
    _, size, theirs_s, ours_s = rows[0]
    print(
        f"\nratio {theirs_s / ours_s:.2f} (goal {GOAL:g}), {size / both['tokens']:.2f} bytes per"
        f" token, cache {both['cache_chunks']:,} chunks in"
        f" {cli.show_bytes(both['cache_bytes'])}, peak memory grew by"
        f" {cli.show_bytes(both['peak_growth_bytes'])}\n"
    )
    together = scaling(model, texts, most)
    first = together[0]
    print(
        cli.table(
            ("processes", "MB/s together", "of linear", "MB per CPU second"),
            [
                (
                    x["processes"],
                    f"{x['bytes_per_s'] / 1e6:.2f}",
                    f"{x['bytes_per_s'] / first['bytes_per_s'] / x['processes']:.0%}",
                    f"{x['bytes_per_cpu_s'] / 1e6:.2f}",
                )
                for x in together
            ],
        )
    )
    keys = ("text", "bytes", "sentencepiece_s", "ours_s")
    return {
        "ratio": theirs_s / ours_s,
        "parts": [dict(zip(keys, row, strict=True)) for row in rows],
        "processes": together,
        **{
            key: both[key] for key in ("tokens", "cache_chunks", "cache_bytes", "peak_growth_bytes")
        },
    }


def main(argv: list[str]) -> None:
    p = cli.parser("python -m benchmarks.encode", "Speed of the tokenizer beside sentencepiece.")
    p.add_argument("--input", type=str | None, help="folder of texts instead of Python's own")
    p.add_argument("--mb", type=float, default=50.0, help="text to encode")
    p.add_argument("--vocab_size", type=int, default=32_000)
    p.add_argument("--processes", type=int, default=2, help="at most so many at once")
    p.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    args = p.parse_args(argv)
    paths = sysconfig.get_paths()
    folders = [Path(args.input or paths["stdlib"]), Path(args.input or paths["purelib"])]
    if not folders[0].is_dir():
        raise UserError(f"--input {args.input} is no folder")
    texts, there = gather(folders, int(args.mb * 1e6))
    if not texts:
        raise UserError(f"{folders[0]} holds no text ({', '.join(SUFFIXES)}, .jsonl.zst)")
    size = size_of(texts)
    print(f"{there / 1e6:.0f} MB of distinct text found, {size / 1e6:.1f} MB encoded once each")
    step = max(1, size // TRAIN_BYTES)
    lines = [line for text in texts[::step] for line in training_lines(text, 4192)[0]]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tokenizer.model"
        model.write_bytes(train(lines, args.vocab_size, 0.9999, 4192))
        result = measure(str(model), texts, args.processes)
    if args.save:
        target = Path(__file__).parent / "results" / machine() / "encode.json"
        versions = {"python": platform.python_version(), "sentencepiece": sentencepiece.__version__}
        files.write_json(target, {"distinct_bytes": there, "bytes": size, **versions, **result})
        print(f"\nsaved in {os.path.relpath(target)}")


if __name__ == "__main__":
    cli.run(main)
