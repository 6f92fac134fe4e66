"""Documents to token shards: ``python -m llama.data.tokenize --input DOCUMENTS --output TOKENS``.

In: a folder of documents per source. Out: per source a train and a valid split of shards with their
manifests, the same bytes whatever it ran on and however often it was killed. The data of §2.1; a
document is encoded as a whole and wrapped in BOS and EOS.

A unit is a group of input files and becomes one shard; each source is a stage of the corpus's
runner. The manifests come last.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from llama import cli, files
from llama.cli import UserError, expect
from llama.corpus import executors, runner
from llama.corpus.executors import Executor
from llama.corpus.journal import NAME as JOURNAL
from llama.corpus.journal import Record, only_one, stamp
from llama.corpus.plan import header, packed
from llama.corpus.pool import At
from llama.corpus.runner import Stage, Task, check_inputs
from llama.data import writer
from llama.data.indexed import SUFFIXES
from llama.data.writer import SPLITS, ShardWriter, Vocabulary, id_hash
from tokenizer.tokenizer import Tokenizer

# Bytes of a documents file per token, roughly; only the size of a shard follows from it.
BYTES_PER_TOKEN = {".zst": 1.6, ".gz": 1.6, ".jsonl": 4.5}
LISTED_PER_UNIT = 1000
SKIPPED = "skipped.jsonl"
# What the input of a finished source was.
INPUTS = ".inputs.json"


class Inputs(NamedTuple):
    """Files of a unit, with their sizes; documents whose ids have these hashes are left out."""

    files: tuple[tuple[str, int], ...]
    left_out: frozenset[int] = frozenset()


def source_names(documents: Path) -> list[str]:
    """Folders of the input, each a source that holds documents."""
    names = files.source_folders(documents)
    for name in names:
        if not files.document_files(documents / name):
            known = " or ".join(files.DOCUMENT_SUFFIXES)
            raise UserError(f"{documents / name} holds no {known}")
    return names


def plan_units(folder: Path, shard_tokens: int) -> list[Task]:
    """Input files of a source, sorted, in groups of about ``shard_tokens`` tokens."""
    paths = files.document_files(folder)
    found = sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)

    def tokens(file: tuple[str, int]) -> float:
        return file[1] / BYTES_PER_TOKEN[Path(file[0]).suffix]

    return [
        Task(f"{i:05d}", sum(size for _, size in group), Inputs(tuple(group)))
        for i, group in enumerate(packed(found, tokens, shard_tokens))
    ]


# A worker does many units with one model.
_load = lru_cache(Tokenizer)


@dataclass(frozen=True)
class Source:
    """The work of a source: its documents, where its shards go, and how they are made."""

    documents: Path
    tokens: Path
    model: Path
    vocabulary: Vocabulary
    valid_per_10k: int
    shard_tokens: int

    @property
    def options(self) -> dict[str, Any]:
        """What the bytes of a shard follow from, the input apart."""
        return {
            "tokenizer_sha256": self.vocabulary.tokenizer_sha256,
            "valid_per_10k": self.valid_per_10k,
            "shard_tokens": self.shard_tokens,
        }

    def stage(self) -> Stage:
        units = plan_units(self.documents, self.shard_tokens)
        inputs = {name: size for unit in units for name, size in unit.what.files}
        plan = header("tokenize", self.options, inputs)
        more, read = self.duplicates, self.inputs
        return Stage("tokenize", self.tokens, plan, units, self, more=more, inputs=read)

    def inputs(self, unit: Any) -> dict[str, Path]:
        return {name: self.documents / name for name, _ in unit.what.files}

    def __call__(self, unit: Task, at: At) -> Record:
        """Make the shards of a unit; returns what the journal records of it."""
        read, reasons = 0, Counter[str]()
        listed: list[dict[str, Any]] = []
        tokenizer = _load(self.model)
        bos, eos = np.array([[tokenizer.bos_id], [tokenizer.eos_id]], self.vocabulary.dtype)
        replaced_before = tokenizer.replaced_chars
        with ShardWriter(self.tokens, unit.name, self.vocabulary, self.valid_per_10k) as made:
            for name, _ in unit.what.files:
                for number, line in enumerate(files.read_lines(self.documents / name), 1):
                    read += 1
                    id, text, reason = parse(line)
                    if not reason and (made.has(id) or id_hash(id) in unit.what.left_out):
                        reason = "duplicate id"
                    if not reason:
                        tokens = np.concatenate([bos, tokenizer.encode_array(text), eos])
                        made.add(id, tokens, len(text.encode()))
                        continue
                    reasons[reason] += 1
                    if len(listed) < LISTED_PER_UNIT:
                        listed.append({"file": name, "line": number, "reason": reason})
            shards = made.finish()
        digests = {
            f"{split}/{unit.name}{suffix}": shard[key]
            for split, shard in shards.items()
            if shard
            for suffix, key in SUFFIXES.items()
        }
        return {
            "unit": unit.name,
            "files": {name: stamp(self.tokens / name, digest) for name, digest in digests.items()},
            "read": read,
            "skipped": dict(sorted(reasons.items())),
            "listed": listed,
            "left_out": sorted(unit.what.left_out),
            "replaced_chars": tokenizer.replaced_chars - replaced_before,
            "shards": shards,
        }

    def duplicates(self, records: Mapping[str, Record]) -> list[Task]:
        """Units that hold an id which an earlier unit holds too, to be made again without it."""
        units = plan_units(self.documents, self.shard_tokens)
        hashes, owners = [np.empty(0, "<u8")], [np.empty(0, np.int64)]
        for i, unit in enumerate(units):
            for name in records[unit.name]["files"]:
                if name.endswith(".hash"):
                    hashes.append(np.fromfile(self.tokens / name, "<u8"))
                    owners.append(np.full(len(hashes[-1]), i))
        keys, owner = np.concatenate(hashes), np.concatenate(owners)
        order = np.lexsort((owner, keys))
        again = order[1:][keys[order][1:] == keys[order][:-1]]
        left_out: dict[int, set[int]] = {}
        for i, key in zip(owner[again].tolist(), keys[again].tolist(), strict=True):
            left_out.setdefault(i, set(records[units[i].name]["left_out"])).add(key)
        return [
            unit._replace(what=unit.what._replace(left_out=frozenset(left_out[i])))
            for i, unit in enumerate(units)
            if i in left_out
        ]


def parse(line: bytes) -> tuple[str, str, str]:
    """(id, text, nothing) of a document, or why it is none behind nothing."""
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        return "", "", "not JSON"
    if not isinstance(document, dict):
        return "", "", "not an object"
    for key in ("id", "text"):
        if not isinstance(document.get(key), str) or not document[key]:
            return "", "", f"no {key}"
    return document["id"], document["text"], ""


def finish(source: Source, plan: Record, records: Sequence[Record], limit: float) -> None:
    """Write the manifests, unless too many documents were skipped."""
    folder = source.tokens
    read = sum(record["read"] for record in records)
    reasons = sum((Counter(record["skipped"]) for record in records), Counter[str]())
    listed = [line for record in records for line in record["listed"]]
    why = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
    if reasons:
        first = f"{folder.name}/{listed[0]['file']}:{listed[0]['line']} ({listed[0]['reason']})"
        text = (
            f"{folder.name}: {reasons.total()} of {read} documents skipped ({why}), first {first}"
        )
        if reasons.total() > limit * read:
            raise UserError(f"{text}; more than --skip_limit {limit:g} allows")
        print(f"{text}; all in {folder / SKIPPED}", file=sys.stderr)
        files.write_atomic(folder / SKIPPED, b"".join(orjson.dumps(x) + b"\n" for x in listed))
    if not any(record["shards"]["train"] for record in records):
        raise UserError(f"{folder.name}: its {read} documents leave none to train on")
    replaced = sum(record["replaced_chars"] for record in records)
    if replaced:
        print(f"{folder.name}: {replaced} characters U+2581 became spaces", file=sys.stderr)
    skipped = dict(sorted(reasons.items()))
    extra = {"read": read, "skipped": skipped, "replaced_chars": replaced, "plan": plan}
    for split in ("valid", "train"):
        shards = [r["shards"][split] for r in records if r["shards"][split] is not None]
        writer.write_manifest(folder, split, source.vocabulary, shards, extra)
    read_from = {"inputs": {k: v for record in records for k, v in record["inputs"].items()}}
    files.write_json(folder / INPUTS, read_from)
    (folder / JOURNAL).unlink()


def tokenize(sources: Sequence[Source], executor: Executor, limit: float) -> None:
    """Make every source that is not finished yet."""
    stages = []
    for source in sources:
        stage, manifest = source.stage(), source.tokens / "train" / "manifest.json"
        plan = source.options | {"inputs": stage.header["plan"]}
        if manifest.exists() and not (source.tokens / JOURNAL).exists():
            _refuse_other_plan(source.tokens, files.read_json(manifest).get("plan", {}), plan)
            if (known := source.tokens / INPUTS).exists():
                read = [source.inputs(unit) for unit in stage.jobs]
                check_inputs(source.tokens, [(files.read_json(known), paths) for paths in read])
        else:
            stages.append((source, plan, stage))
    found = runner.run([stage for _, _, stage in stages], executor) if stages else []
    for (source, plan, _), records in zip(stages, found, strict=True):
        finish(source, plan, records, limit)


def _refuse_other_plan(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if old.get(key) != value:
            what = "other input files" if key == "inputs" else f"{key} {old.get(key)}, not {value}"
            raise UserError(f"{folder} was begun with {what}: remove it or choose another --output")


def summary(tokens: Path, names: Sequence[str]) -> str:
    rows = []
    for name in names:
        train, valid = (files.read_json(tokens / name / s / "manifest.json") for s in SPLITS)
        pieces = sum(m["tokens"] - 2 * m["documents"] for m in (train, valid))
        per_token = (train["text_bytes"] + valid["text_bytes"]) / max(1, pieces)
        documents, tokens_of, held_out = train["documents"], train["tokens"], valid["documents"]
        rows.append((name, f"{documents:,}", f"{tokens_of:,}", f"{per_token:.2f}", f"{held_out:,}"))
    return cli.table(("source", "documents", "tokens", "bytes/token", "valid documents"), rows)


def main(argv: list[str]) -> None:
    p = cli.parser("python -m llama.data.tokenize", "Documents to token shards, source by source.")
    p.add_argument("--input", type=str, required=True, help="folder of documents, one per source")
    p.add_argument("--tokenizer", type=str, required=True, help="folder of tokenizer.model")
    p.add_argument("--output", type=str, required=True, help="folder of token shards to make")
    executors.add_arguments(p)
    writer.add_arguments(p)
    p.add_argument("--skip_limit", type=float, default=0.01, help="share of bad documents allowed")
    args = p.parse_args(argv)
    how = writer.division(args)
    executor = executors.from_arguments(args)
    expect(0 <= args.skip_limit <= 1, f"--skip_limit is {args.skip_limit}", "a share from 0 to 1")
    documents, tokens = Path(args.input), Path(args.output)
    names = source_names(documents)
    model, _, vocabulary = writer.open_tokenizer(args.tokenizer)
    sources = [Source(documents / name, tokens / name, model, vocabulary, *how) for name in names]
    try:
        with only_one(tokens):
            writer.place_tokenizer(model, tokens)
            tokenize(sources, executor, args.skip_limit)
    except OSError as error:
        where = error.filename or tokens
        raise UserError(
            f"{where}: {error.strerror}; mend that and the same command goes on from here"
        ) from error
    print(summary(tokens, names))


if __name__ == "__main__":
    # under its own name: jobs on other machines know no `__main__.Source`
    from llama.data.tokenize import main as command

    cli.run(command)
