"""Speed of the tokenizer beside sentencepiece itself: `python -m benchmarks.encode`.

In: real text, by default the sources and documentation of the installed Python and its packages,
each text once. Out: MB per CPU second of both in alternation from an empty cache, their ratio,
several processes at once, cache and memory. The ids of both are compared as well.
"""

import hashlib
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from benchmarks import harness
from llama import cli, files
from llama.cli import UserError
from llama.runtime import world
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


def compare(model: str, texts: Sequence[str]) -> dict[str, Any]:
    """Both over all texts in turns of about `TURN_BYTES`: CPU seconds, tokens, cache, memory."""
    ours, theirs = Tokenizer(model), sentencepiece.SentencePieceProcessor(model_file=model)
    seconds, tokens, before = np.zeros(2), 0, world.peak_bytes()
    turn = -(-len(texts) * TURN_BYTES // size_of(texts))
    for first in range(0, len(texts), turn):
        part = texts[first : first + turn]
        began = time.process_time()
        expected = [theirs.encode(text) for text in part]
        middle = time.process_time()
        got = [ours.encode_array(text) for text in part]
        seconds += middle - began, time.process_time() - middle
        for a, b in zip(got, expected, strict=True):
            assert np.array_equal(a, b), "the ids differ from sentencepiece's"
            tokens += len(b)
    assert ours.packer, "this model is encoded whole"
    return {
        "sentencepiece_s": seconds[0],
        "ours_s": seconds[1],
        "tokens": tokens,
        "cache_chunks": ours.packer.cache.cache_info().currsize,
        "peak_growth_bytes": world.peak_bytes() - before,
    }


def alone(model: str, texts: Sequence[str]) -> harness.Turn:
    """Ours by itself."""
    tokenizer = Tokenizer(model)
    return harness.timed(lambda: [tokenizer.encode_array(text) for text in texts])


def in_processes(
    work: Callable[[str, Sequence[str]], Any], model: str, shares: Sequence[Sequence[str]]
) -> list[Any]:
    """Call `work` on each share in a process of its own, all at once."""
    with ProcessPoolExecutor(len(shares)) as pool:
        return list(pool.map(work, [model] * len(shares), shares))


def scaling(model: str, texts: Sequence[str], most: int) -> list[dict[str, float]]:
    """Ours in 1 to `most` processes, each with a share as large as the one alone has."""
    rows = []
    for n in range(1, most + 1):
        shares = [texts[i::most] for i in range(n)]
        sizes, turns = [size_of(share) for share in shares], in_processes(alone, model, shares)
        speed = sum(size / turn.wall_s for size, turn in zip(sizes, turns, strict=True))
        of_cpu = sum(sizes) / sum(turn.cpu_s for turn in turns)
        rows.append({"processes": n, "bytes_per_s": speed, "bytes_per_cpu_s": of_cpu})
    return rows


def show(found: dict[str, Any]) -> str:
    mb, first = found["bytes"] / 1e6, found["processes"][0]
    speeds = (f"{mb / found[who]:.2f}" for who in ("sentencepiece_s", "ours_s"))
    together = [
        (
            x["processes"],
            f"{x['bytes_per_s'] / 1e6:.2f}",
            f"{x['bytes_per_s'] / first['bytes_per_s'] / x['processes']:.0%}",
            f"{x['bytes_per_cpu_s'] / 1e6:.2f}",
        )
        for x in found["processes"]
    ]
    header = ("MB", "sentencepiece MB/s", "ours MB/s", "ratio")
    return "\n\n".join(
        (
            cli.table(header, [(f"{mb:.1f}", *speeds, f"{found['ratio']:.2f}")]),
            f"{found['bytes'] / found['tokens']:.2f} bytes per token, {found['cache_chunks']:,}"
            f" chunks cached, peak memory grew by {cli.show_bytes(found['peak_growth_bytes'])}",
            cli.table(("processes", "MB/s together", "of linear", "MB per CPU second"), together),
        )
    )


def main(argv: list[str]) -> None:
    p = harness.parser("encode", "Speed of the tokenizer beside sentencepiece.")
    p.add_argument("--input", type=str | None, help="folder of texts instead of Python's own")
    p.add_argument("--mb", type=float, default=50.0, help="text to encode")
    p.add_argument("--vocab_size", type=int, default=32_000)
    p.add_argument("--processes", type=int, default=2, help="at most so many at once")
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
        (both,) = in_processes(compare, str(model), [texts])
        found = {"distinct_bytes": there, "bytes": size, **both}
        found["ratio"] = both["sentencepiece_s"] / both["ours_s"]
        found["processes"] = scaling(str(model), texts, args.processes)
    print(show(found))
    harness.keep(args.save, "encode", found | harness.versions("sentencepiece"))


if __name__ == "__main__":
    cli.run(main)
