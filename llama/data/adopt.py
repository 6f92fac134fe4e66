"""An existing Megatron .bin/.idx as a source: ``python -m llama.data.shards adopt``.

In: a pair of files made with the run's tokenizer. Out: a source as if tokenised here. It is always
written anew: documents get BOS and EOS where they lack them, a validation split by the hash of
``<file name>:<document number>``, and the order of that hash.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama import cli
from llama.cli import UserError
from llama.corpus.journal import only_one
from llama.data import writer
from llama.data.indexed import Index, check_ids, read_index
from llama.data.writer import SPLITS, ShardWriter, Vocabulary

SCANNED_AT_ONCE = 1 << 24


def open_pair(prefix: Path, vocab_size: int) -> tuple[Index, Path]:
    """The index and the tokens beside it; every id is looked at before anything is written."""
    index, path = read_index(Path(f"{prefix}.idx")), Path(f"{prefix}.bin")
    expected = int(index.starts[-1]) * index.dtype.itemsize
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise UserError(f"{path} has {size} bytes, but its index describes {expected}")
    for first in range(0, int(index.starts[-1]), SCANNED_AT_ONCE):
        check_ids(_read(path, index, first, SCANNED_AT_ONCE), vocab_size, path, first)
    return index, path


def _read(path: Path, index: Index, first: int, count: int) -> NDArray[Any]:
    return np.fromfile(path, index.dtype, count, offset=first * index.dtype.itemsize)


def adopt(
    prefix: Path, tokenizer: str, output: Path, valid_per_10k: int, shard_tokens: int
) -> Counter[str]:
    """Rewrite ``prefix.bin`` and ``prefix.idx``; returns counts of what was read and changed."""
    model, _, vocabulary = writer.open_tokenizer(tokenizer)
    index, path = open_pair(prefix, vocabulary.vocab_size)
    if (output / "train" / "manifest.json").exists():
        raise UserError(f"{output} is a finished source: remove it or choose another --output")
    counts = Counter({"documents": len(index.starts) - 1})
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    with only_one(output):
        writer.place_tokenizer(model, output.parent)
        # a document belongs to the shard in whose share of the tokens it begins
        units = index.starts[:-1] // shard_tokens
        for unit in np.unique(units).tolist():
            with ShardWriter(output, f"{unit:05d}", vocabulary, valid_per_10k) as made:
                for document in np.flatnonzero(units == unit).tolist():
                    first, end = index.starts[document : document + 2].tolist()
                    tokens = _read(path, index, first, end - first)
                    if len(tokens):
                        tokens = _wrapped(tokens, vocabulary, counts)
                        made.add(f"{prefix.name}:{document}", tokens, 0)
                    else:
                        counts["empty"] += 1
                for split, shard in made.finish().items():
                    shards[split] += [shard] if shard else []
        if not shards["train"]:
            raise UserError(f"{path}: its {counts['documents']} documents leave none to train on")
        for split in reversed(SPLITS):
            writer.write_manifest(
                output, split, vocabulary, shards[split], {"adopted": dict(counts)}
            )
    return counts


def _wrapped(tokens: NDArray[Any], vocabulary: Vocabulary, counts: Counter[str]) -> NDArray[Any]:
    """The document between one BOS and one EOS."""
    bos, eos = vocabulary.bos_id, vocabulary.eos_id
    head, tail = [bos] * int(tokens[0] != bos), [eos] * int(tokens[-1] != eos)
    inside = int((tokens[:-1] == eos).sum())
    counts.update(bos_added=len(head), eos_added=len(tail), eos_inside=inside)
    return np.concatenate([head, tokens, tail]).astype(vocabulary.dtype)


def main(argv: list[str]) -> None:
    p = cli.parser("python -m llama.data.shards adopt", "A Megatron .bin/.idx as a source.")
    p.add_argument("--input", type=str, required=True, help="the files without .bin and .idx")
    p.add_argument("--tokenizer", type=str, required=True, help="folder of tokenizer.model")
    p.add_argument("--output", type=str, required=True, help="the source's folder in tokens/")
    writer.add_arguments(p)
    args = p.parse_args(argv)
    how = writer.division(args)
    counts = adopt(Path(args.input), args.tokenizer, Path(args.output), *how)
    print(f"{counts['documents']} documents, {counts['empty']} of them empty and left out")
    print(f"BOS added to {counts['bos_added']}, EOS to {counts['eos_added']}")
    if counts["eos_inside"]:
        print(f"{counts['eos_inside']} EOS inside documents stay and count as borders of documents")
