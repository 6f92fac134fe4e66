"""Speed of the tokenizer beside sentencepiece itself: `python -m benchmarks.encode`.

In: real text, by default the sources and documentation of the installed Python and its packages,
each text once. Out: MB per CPU second of both in alternation from an empty cache, their ratio, how
it grows with the text seen, several processes at once, cache and memory. The ids of both are
compared as well.
"""

import hashlib
import multiprocessing
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from benchmarks import harness
from llama import cli, files
from llama.cli import UserError
from tokenizer.tokenizer import Tokenizer
from tokenizer.train import train, training_lines

SUFFIXES = (".py", ".txt", ".md", ".rst", ".html")
# Text that one of the two encodes before it is the other's turn: short beside what other work does
# to a shared processor, long beside what one leaves of its caches to the other.
TURN_BYTES = 5_000_000
TRAIN_BYTES = 10_000_000


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
    """Both over all texts in turns: (bytes, CPU seconds of sentencepiece, of ours) per turn."""
    ours, theirs = Tokenizer(model), sentencepiece.SentencePieceProcessor(model_file=model)
    rows, tokens = [], 0
    before = harness.peak_bytes()
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
        "peak_growth_bytes": harness.peak_bytes() - before,
    }


def alone(model: str, texts: Sequence[str]) -> harness.Turn:
    """Ours by itself."""
    tokenizer = Tokenizer(model)
    return harness.timed(lambda: [tokenizer.encode_array(text) for text in texts])


def in_processes(
    work: Callable[[str, Sequence[str]], Any], model: str, shares: Sequence[Sequence[str]]
) -> list[Any]:
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


def parts(taken: Sequence[tuple[int, float, float]]) -> list[dict[str, Any]]:
    """Bytes and CPU seconds of all turns and of each half."""
    half = max(1, len(taken) // 2)
    groups = {"all": taken, "first half": taken[:half], "last half": taken[-half:]}
    sums = {
        name: [sum(column) for column in zip(*rows, strict=True)] for name, rows in groups.items()
    }
    return [
        {"text": name, "bytes": size, "sentencepiece_s": theirs_s, "ours_s": ours_s}
        for name, (size, theirs_s, ours_s) in sums.items()
    ]


def scaling(model: str, texts: Sequence[str], most: int) -> list[dict[str, float]]:
    """Ours in 1 to `most` processes, each with a share as large as the one alone has."""
    rows = []
    for n in range(1, most + 1):
        shares = [texts[i::most] for i in range(n)]
        sizes = [size_of(share) for share in shares]
        turns_ = in_processes(alone, model, shares)
        rows.append(
            {
                "processes": n,
                "bytes_per_s": sum(s / t.wall_s for s, t in zip(sizes, turns_, strict=True)),
                "bytes_per_cpu_s": sum(sizes) / sum(t.cpu_s for t in turns_),
            }
        )
    return rows


def measure(model: str, texts: list[str], most: int) -> dict[str, Any]:
    """Run everything."""
    (both,) = in_processes(compare, model, [texts])
    found = parts(both.pop("turns"))
    ratio = found[0]["sentencepiece_s"] / found[0]["ours_s"]
    return {"ratio": ratio, "parts": found, "processes": scaling(model, texts, most), **both}


def show(found: dict[str, Any]) -> str:
    def speed(part: dict[str, Any], who: str) -> str:
        return f"{part['bytes'] / 1e6 / part[f'{who}_s']:.2f}"

    whole, first = found["parts"][0], found["processes"][0]
    rows = [
        (
            part["text"],
            f"{part['bytes'] / 1e6:.1f}",
            speed(part, "sentencepiece"),
            speed(part, "ours"),
            f"{part['sentencepiece_s'] / part['ours_s']:.2f}",
        )
        for part in found["parts"]
    ]
    together = [
        (
            x["processes"],
            f"{x['bytes_per_s'] / 1e6:.2f}",
            f"{x['bytes_per_s'] / first['bytes_per_s'] / x['processes']:.0%}",
            f"{x['bytes_per_cpu_s'] / 1e6:.2f}",
        )
        for x in found["processes"]
    ]
    return "\n\n".join(
        (
            cli.table(("text", "MB", "sentencepiece MB/s", "ours MB/s", "ratio"), rows),
            f"{whole['bytes'] / found['tokens']:.2f} bytes per token, cache"
            f" {found['cache_chunks']:,} chunks in {cli.show_bytes(found['cache_bytes'])},"
            f" peak memory grew by {cli.show_bytes(found['peak_growth_bytes'])}",
            cli.table(("processes", "MB/s together", "of linear", "MB per CPU second"), together),
        )
    )


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
        found = measure(str(model), texts, args.processes)
    print(show(found))
    if args.save:
        facts = {"distinct_bytes": there, "bytes": size, **harness.versions("sentencepiece")}
        print("\nsaved in", os.path.relpath(harness.save("encode", facts | found)))


if __name__ == "__main__":
    cli.run(main)
