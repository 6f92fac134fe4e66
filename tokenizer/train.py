"""Train the tokenizer: `python -m tokenizer.train --input data/mine/documents --output ...`.

In: documents per source and the weights of a mixture. Out: a folder with tokenizer.model, a
SentencePiece BPE model with digits split and byte fallback (paper §2.1), and manifest.json, which
says what it was made from. The same documents and options give the same bytes.
"""

import hashlib
import heapq
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import sentencepiece

from llama import cli, config, files
from llama.cli import UserError
from llama.config import Count
from tokenizer.tokenizer import Tokenizer

# What is not for the user to choose.
FIXED = files.read_yaml(Path(__file__).with_name("fixed.yaml"))
# Options, the least and the most that each may be.
LIMITS: dict[str, tuple[float, float]] = {
    "vocab_size": (3 + 256 + 1, math.inf),  # unk, BOS, EOS, the bytes, and a character
    "character_coverage": (0.98, 1),
    "sample_bytes": (1, math.inf),
    "max_line_bytes": (16, 1 << 30),
}

# What the trainer says of a vocabulary that does not fit, and what that means.
MISFITS = {
    r"set it to a value <= (\d+)": "too large for this text: %s is the largest that fits",
    r"smaller than required_chars\. \d+ vs (\d+)": "too small for the characters of this text:"
    " it takes %s, or a lower character_coverage",
}

# The trainer marks uncovered characters with this one and leaves out lines that hold it.
RESERVED = "\u2585"

# A source much larger than its share is not read to its end: files in the order of a hash of their
# name, until they held this many times the share.
READ_TIMES = 4
# Text per source and language on which bytes per token are measured.
MEASURED_BYTES = 2_000_000


@dataclass
class Options:
    """What the command takes.

    Args:
        input: Folder of documents, one per source.
        output: Folder to make: tokenizer.model, manifest.json.
        mixture: YAML of source: weight; without it sources weigh as much as they hold.
        vocab_size: Pieces, exactly.
        character_coverage: Share of the text's characters that get a piece of their own.
        sample_bytes: Text to learn from.
        max_line_bytes: Longer lines are cut.
        seed: Of the choice of documents.
    """

    input: str
    output: str
    mixture: str | None = None
    vocab_size: Count = Count(32_000)
    character_coverage: float = 0.9999
    sample_bytes: Count = Count(10**9)
    max_line_bytes: Count = Count(4192)
    seed: int = 0


@dataclass
class Sample:
    """Documents of one source to learn from, in the order of a hash of their id."""

    documents: list[tuple[str, str]] = field(default_factory=list)  # text, language
    bytes: int = 0
    files_read: int = 0
    passes: float = 1.0

    def texts(self) -> Iterator[str]:
        """The texts `passes` times; the last pass may end early."""
        left = self.passes * self.bytes
        for text, _ in itertools.cycle(self.documents):
            if left <= 0:
                return
            left -= len(text.encode())
            yield text


def find_sources(folder: Path, weights: dict[str, float] | None) -> dict[str, list[Path]]:
    """Document files of the sources to learn from; `UserError` for one that has none."""
    there = files.source_folders(folder)
    found = {name: files.document_files(folder / name) for name in sorted(weights or there)}
    for name, paths in found.items():
        if not paths:
            known = " or ".join(files.DOCUMENT_SUFFIXES)
            raise UserError(f"source {name} has no documents in {folder / name} ({known})")
    if weights and (others := [name for name in there if name not in weights]):
        print(f"not in the mixture and left out: {', '.join(others)}")
    return found


def sample(
    paths: Sequence[Path], source: str, budget: float, seed: int, progress: cli.Progress
) -> Sample:
    """The documents of a source whose hashes are smallest, just as many as fill the budget."""
    heap: list[tuple[int, str, str, str, int]] = []
    result, seen = Sample(), 0
    for path in sorted(paths, key=lambda path: _hash(seed, source, path.name)):
        if seen >= READ_TIMES * budget:
            break
        result.files_read += 1
        progress.update(1, source)
        for document in files.read_documents(path):
            text, meta = document["text"], document.get("meta") or {}
            language = str(meta.get("lang") or meta.get("language") or "-")
            size = len(text.encode())
            rank = -_hash(seed, source, document["id"])
            heapq.heappush(heap, (rank, document["id"], text, language, size))
            result.bytes += size
            seen += size
            while result.bytes - heap[0][-1] >= budget:
                result.bytes -= heapq.heappop(heap)[-1]
    result.documents = [(text, language) for _, _, text, language, _ in sorted(heap, reverse=True)]
    if not result.bytes:
        raise UserError(f"source {source} holds no text")
    return result


def _hash(*parts: object) -> int:
    joined = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest())


def balance(samples: dict[str, Sample], weights: dict[str, float], sample_bytes: int) -> None:
    """Set the passes over each source so that their bytes stand in the proportion of the weights.

    All together are no more than was asked for, and no more than there is: sources with more than
    their share give a part, those with less are read again.
    """
    total = min(sample_bytes, sum(s.bytes for s in samples.values()))
    for name, s in samples.items():
        s.passes = total * weights[name] / s.bytes


def training_lines(text: str, max_bytes: int) -> tuple[list[str], int]:
    """The lines of a text as the trainer takes them, and how many had to be cut for that.

    Newlines are never in them, so that no piece holds one and the newline stays a byte piece.
    """
    cut = text.count(RESERVED)
    lines: list[str] = []
    for line in text.replace(RESERVED, "\n").split("\n"):
        if 4 * len(line) > max_bytes and len(data := line.encode()) > max_bytes:
            cut += 1
            lines += _cut(data, max_bytes)
        elif line:
            lines.append(line)
    return lines, cut


def _cut(data: bytes, max_bytes: int) -> Iterator[str]:
    while len(data) > max_bytes:
        # the trainer puts a space before each line: it stands for the one at which we cut
        space = data.rfind(b" ", 1, max_bytes + 1)
        head = data[:space] if space > 0 else data[:max_bytes].decode(errors="ignore").encode()
        yield head.decode()
        data = data[len(head) + (space > 0) :]
    if data:
        yield data.decode()


def train(lines: Iterable[str], vocab_size: int, coverage: float, max_line_bytes: int) -> bytes:
    """A SentencePiece model; `UserError` with the nearest size that works if this one does not."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            character_coverage=coverage,
            max_sentence_length=max_line_bytes,
            minloglevel=2,
            **FIXED,
        )
    except RuntimeError as error:
        for reason, meaning in MISFITS.items():
            if found := re.search(reason, str(error)):
                raise UserError(f"vocab_size {vocab_size} is {meaning % found[1]}") from error
        raise
    return model.getvalue()


def bytes_per_token(tokenizer: Tokenizer, documents: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Language -> bytes per token, on the first texts of each."""
    texts, tokens = Counter[str](), Counter[str]()
    for text, language in documents:
        if text and texts[language] < MEASURED_BYTES:
            texts[language] += len(text.encode())
            tokens[language] += len(tokenizer.encode_array(text))
    return {name: texts[name] / tokens[name] for name in sorted(texts)}


def report(manifest: dict[str, Any]) -> str:
    """The tables a training ends with."""
    sampled, measured = [], []
    for name, s in manifest["sources"].items():
        text, passes = cli.show_bytes(s["bytes"]), f"{s['passes']:.2f}"
        sampled.append((name, f"{s['weight']:.4f}", f"{s['documents']:,}", text, passes))
        measured += [(name, lang, f"{x:.2f}") for lang, x in s["bytes_per_token"].items()]
    tables = (
        cli.table(("source", "weight", "documents", "text", "passes"), sampled),
        cli.table(("source", "language", "bytes/token"), measured),
        f"{manifest['lines']:,} lines; {manifest['lines_cut']:,} were too long and are cut",
    )
    return "\n\n".join(tables)


def _shares(sizes: dict[str, int]) -> dict[str, float]:
    total = sum(sizes.values())
    return {name: size / total for name, size in sizes.items()}


def make(args: Options, sources: dict[str, list[Path]], plan: dict[str, Any]) -> dict[str, Any]:
    """Train and write the folder; returns its manifest."""
    disk = {name: sum(path.stat().st_size for path in paths) for name, paths in sources.items()}
    # without a mixture, sources have the weights of their sizes
    shares = plan["mixture"] or _shares(disk)
    with cli.Progress("read", sum(map(len, sources.values())), "files") as progress:
        samples = {
            name: sample(paths, name, args.sample_bytes * shares[name], args.seed, progress)
            for name, paths in sources.items()
        }
    weights = plan["mixture"] or _shares({name: s.bytes for name, s in samples.items()})
    balance(samples, weights, args.sample_bytes)
    count: Counter[str] = Counter()

    def lines() -> Iterator[str]:
        for s in samples.values():
            for text in s.texts():
                taken, cut = training_lines(text, args.max_line_bytes)
                count.update(lines=len(taken), lines_cut=cut)
                yield from taken

    print(f"training on {cli.show_bytes(sum(s.passes * s.bytes for s in samples.values()))}")
    model = train(lines(), args.vocab_size, args.character_coverage, args.max_line_bytes)
    with files.atomic_folder(args.output) as folder:
        (folder / "tokenizer.model").write_bytes(model)
        tokenizer = Tokenizer(folder / "tokenizer.model")
        manifest = {
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "sentencepiece": sentencepiece.__version__,
            "trainer": FIXED,
            "plan": plan,
            **count,
            "sources": {
                name: {
                    "weight": weights[name],
                    "documents": len(s.documents),
                    "bytes": s.bytes,
                    "passes": round(s.passes, 4),
                    "files_read": s.files_read,
                    "files": len(sources[name]),
                    "bytes_per_token": bytes_per_token(tokenizer, s.documents),
                }
                for name, s in samples.items()
            },
        }
        files.write_json(folder / "manifest.json", manifest)
    return manifest


def _plan(
    args: Options, sources: dict[str, list[Path]], weights: dict[str, float] | None
) -> dict[str, Any]:
    """What the bytes of the model follow from: options, weights, and files by name and size."""
    listed = [
        (path.relative_to(args.input).as_posix(), path.stat().st_size)
        for paths in sources.values()
        for path in paths
    ]
    inputs = hashlib.sha256(repr(listed).encode()).hexdigest()
    where = {"input", "output", "mixture"}
    options = {key: value for key, value in vars(args).items() if key not in where}
    return {**options, "mixture": weights, "inputs": inputs}


def parse(argv: list[str]) -> Options:
    """The options, each in its range."""
    what = "Train a SentencePiece tokenizer on documents, source by source."
    p = cli.parser("python -m tokenizer.train", what)
    p.add_argument("--config", action="config", help="YAML file of these options")
    p.add_class_arguments(Options)
    for path in config.values_of(argv, "--config"):
        files.read_yaml(path)
    given = p.parse_args(argv)
    args = Options(**{part.name: getattr(given, part.name) for part in fields(Options)})
    for name, (least, most) in LIMITS.items():
        value, expected = getattr(args, name), f"{least} to {most}"
        expected = f"{least} or more" if most == math.inf else expected
        cli.expect(least <= value <= most, f"{name} is {value}", expected)
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    weights = config.read_mixture(args.mixture) if args.mixture else None
    sources = find_sources(Path(args.input), weights)
    plan = _plan(args, sources, weights)
    output = Path(args.output)
    if not output.exists():
        manifest = make(args, sources, plan)
    else:
        made = output / "manifest.json"
        manifest = files.read_json(made) if made.exists() else {}
        if manifest.get("plan") != plan:
            raise UserError(
                f"{output} was made with other options or documents:"
                " remove it or take another --output"
            )
        print(f"{output} is there already")
    print(report(manifest))


if __name__ == "__main__":
    cli.run(main)
