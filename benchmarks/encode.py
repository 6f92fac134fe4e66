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
from dataclasses import dataclass
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
TURN_BYTES = 1_000_000  # text that one of the two encodes before it is the other's turn
TRAIN_BYTES = 10_000_000
GOAL = 4.0


@dataclass
class Text:
    kind: str  # its file's suffix
    text: str
    bytes: int


def gather(folders: Sequence[Path], limit_bytes: int) -> tuple[list[Text], int]:
    """Distinct texts in the order of their hashes up to the limit; and bytes of all there were."""
    found: dict[bytes, Text] = {}
    paths = {path.resolve() for f in folders for path in f.rglob("*") if path.is_file()}
    for path in sorted(paths):
        for kind, data in _texts(path):
            try:
                text = data.decode()
            except UnicodeDecodeError:
                continue
            found[hashlib.blake2b(data).digest()] = Text(kind, text, len(data))
    chosen, size = [], 0
    for _, text_ in sorted(found.items()):
        if size >= limit_bytes:
            break
        chosen.append(text_)
        size += text_.bytes
    return chosen, sum(text.bytes for text in found.values())


def _texts(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.name.endswith((".jsonl.zst", ".jsonl.gz")):
        yield from ((".jsonl", d["text"].encode()) for d in files.read_documents(path))
    elif path.suffix in SUFFIXES:
        yield path.suffix, path.read_bytes()


def turns(texts: Sequence[Text]) -> Iterator[list[Text]]:
    """Texts of one kind, about `TURN_BYTES` at a time."""
    waiting: dict[str, list[Text]] = {}
    for text in texts:
        turn = waiting.setdefault(text.kind, [])
        turn.append(text)
        if sum(t.bytes for t in turn) >= TURN_BYTES:
            yield waiting.pop(text.kind)
    yield from waiting.values()


def compare(model: str, texts: Sequence[Text]) -> dict[str, Any]:
    """Both over all texts in turns: per turn its kind, bytes and the CPU seconds of each."""
    ours, theirs = Tokenizer(model), sentencepiece.SentencePieceProcessor(model_file=model)
    rows, tokens = [], 0
    before = _peak_bytes()
    for turn in turns(texts):
        began = time.process_time()
        expected = [theirs.encode(t.text) for t in turn]
        middle = time.process_time()
        got = [ours.encode_array(t.text) for t in turn]
        end = time.process_time()
        for a, b in zip(got, expected, strict=True):
            assert np.array_equal(a, b), "the ids differ from sentencepiece's"
            tokens += len(b)
        rows.append((turn[0].kind, sum(t.bytes for t in turn), middle - began, end - middle))
    cache = ours._cache
    return {
        "turns": rows,
        "tokens": tokens,
        "cache_chunks": len(cache) + len(cache.old),
        "cache_bytes": sum(
            sys.getsizeof(part) for d in (cache, cache.old) for kv in d.items() for part in kv
        )
        + sys.getsizeof(cache)
        + sys.getsizeof(cache.old),
        "peak_growth_bytes": _peak_bytes() - before,
    }


def alone(model: str, texts: Sequence[Text]) -> dict[str, Any]:
    """Ours by itself: seconds for all texts, from an empty cache."""
    tokenizer = Tokenizer(model)
    began = time.perf_counter()
    for text in texts:
        tokenizer.encode_array(text.text)
    return {"seconds": time.perf_counter() - began}


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_processes(
    work: Callable[[str, Sequence[Text]], dict[str, Any]],
    model: str,
    shares: Sequence[Sequence[Text]],
) -> list[dict[str, Any]]:
    """Call `work` on each share in a process of its own, all at once."""

    def child(share: Sequence[Text], end: Connection) -> None:
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


def rows_by_kind(result: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """(what, bytes, seconds of sentencepiece, seconds of ours): all, each kind, and quarters."""
    taken = result["turns"]
    by_kind = {kind: [r for r in taken if r[0] == kind] for kind in sorted({r[0] for r in taken})}
    groups = [("all", taken)]
    if len(by_kind) > 1:
        # what is less than one turn says nothing
        groups += [(k, rows) for k, rows in by_kind.items() if rows[0][1] >= TURN_BYTES]
    fourth = max(1, len(taken) // 4)
    groups += [("first quarter", taken[:fourth]), ("last quarter", taken[-fourth:])]
    return [(name, *(sum(r[i] for r in rows) for i in (1, 2, 3))) for name, rows in groups]  # type: ignore[misc]


def machine() -> str:
    """The processor's name and number of cores, as a folder name."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        name = found[1]
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {os.cpu_count()} cores".lower()).strip("-")


def measure(model: str, texts: list[Text], most: int) -> dict[str, Any]:
    """Run everything and print it."""
    (both,) = in_processes(compare, model, [texts])
    rows = rows_by_kind(both)
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
    linear = []
    for n in range(1, most + 1):
        # each process gets as much as the one alone: the first n of `most` equal shares
        shares = [texts[i::most] for i in range(n)]
        results = in_processes(alone, model, shares)
        speeds = [
            sum(t.bytes for t in share) / r["seconds"]
            for share, r in zip(shares, results, strict=True)
        ]
        linear.append({"processes": n, "bytes_per_s": sum(speeds)})
    first = linear[0]["bytes_per_s"]
    print(
        cli.table(
            ("processes", "MB/s together", "of linear"),
            [
                (
                    x["processes"],
                    f"{x['bytes_per_s'] / 1e6:.2f}",
                    f"{x['bytes_per_s'] / first / x['processes']:.0%}",
                )
                for x in linear
            ],
        )
    )
    keys = ("text", "bytes", "sentencepiece_s", "ours_s")
    return {
        "ratio": theirs_s / ours_s,
        "parts": [dict(zip(keys, row, strict=True)) for row in rows],
        "processes": linear,
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
    size = sum(t.bytes for t in texts)
    print(f"{there / 1e6:.0f} MB of distinct text found, {size / 1e6:.1f} MB encoded once each")
    step = max(1, size // TRAIN_BYTES)
    lines = [line for t in texts[::step] for line in training_lines(t.text, 4192)[0]]
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
