"""Small documents, tokenizers and token shards that the data tests are run on."""

import io
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import sentencepiece

from llama import files
from llama.data.shards import Source, open_sources
from llama.data.writer import ShardWriter, Vocabulary, write_manifest

_WORDS = "def return the of model and token self import window if 3 14 shard order = ( ) : é ж"
WORDS = _WORDS.split()
VOCABULARY = Vocabulary("0" * 64, 32_000, 1, 2)
Documents = list[tuple[str, list[int]]]


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)) + rng.choice(["", "\n", "\n\n\t", "  "])


def make_tokenizer(folder: Path, pieces: int = 400) -> Path:
    """A folder with the model of a small tokenizer made like the real one."""
    rng = random.Random(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text(rng, 20).strip() for _ in range(300)]),
        model_writer=model,
        vocab_size=pieces,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def document(key: str, content: str, source: str = "web") -> dict[str, Any]:
    return {"id": key, "text": content, "source": source, "meta": {}}


def write_documents(path: Path, documents: Iterable[dict[str, Any] | bytes]) -> None:
    """A documents file; bytes are written as the line they are."""
    with files.LineWriter(path) as lines:
        for each in documents:
            lines.write(each if isinstance(each, bytes) else orjson.dumps(each))


def make_documents(rng: random.Random, folder: Path, source: str, files_: int, each: int) -> None:
    for k in range(files_):
        suffix = rng.choice([".jsonl.zst", ".jsonl.gz", ".jsonl"])
        write_documents(
            folder / source / f"{k:03d}{suffix}",
            [
                document(f"{source}/{k}/{i}", text(rng, rng.randrange(1, 60)), source)
                for i in range(each)
            ],
        )


def random_documents(
    rng: random.Random, name: str, n: int, longest: int = 50, pieces: int = 32_000
) -> Documents:
    """(id, tokens between BOS and EOS); some are empty between the two."""
    return [
        (f"{name}/{i}", [1, *(rng.randrange(3, pieces) for _ in range(rng.randrange(longest))), 2])
        for i in range(n)
    ]


def make_source(
    folder: Path,
    shards: Iterable[Documents],
    vocabulary: Vocabulary = VOCABULARY,
    valid_per_10k: int = 0,
    **options: Any,
) -> None:
    """Shards of one source, in train and valid."""
    made: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    for k, documents in enumerate(shards):
        with ShardWriter(folder, f"{k:05d}", vocabulary, valid_per_10k, **options) as writer:
            for key, tokens in documents:
                writer.add(key, np.array(tokens), len(tokens))
            for split, shard in writer.finish().items():
                made[split] += [shard] if shard else []
    for split, lines in made.items():
        (folder / split).mkdir(exist_ok=True)
        write_manifest(folder, split, vocabulary, lines, {})


def make_sources(
    rng: random.Random,
    folder: Path,
    sizes: Mapping[str, int],
    pieces: int = 32_000,
    **options: Any,
) -> dict[str, Source]:
    """Sources with a number of documents in two or three shards each."""
    for name, n in sizes.items():
        documents = random_documents(rng, name, n, pieces=pieces)
        cuts = sorted(rng.sample(range(1, n), 2))
        parts = [documents[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
        make_source(folder / name, parts, **options)
    return open_sources(folder, sizes)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
