"""Documents to token shards: ``python -m llama.data.tokenize --input DOCUMENTS --output TOKENS``.

In: a folder of documents per source. Out: per source a train and a valid split of shards with their
manifests, the same bytes whatever the number of processes and however often it was killed. The data
of §2.1; a document is encoded as a whole and wrapped in BOS and EOS.

A unit is a group of input files and becomes one shard. Its files appear by rename, then a line in
the source's journal says so; a rerun redoes what has no such line. The manifests come last.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from llama import cli, files
from llama.cli import UserError
from llama.data.units import (
    JOURNAL,
    Journal,
    Unit,
    duplicates,
    hold,
    only_one,
    plan_hash,
    plan_units,
    refuse_other_plan,
    source_names,
    wait_for_workers,
)
from llama.data.writer import (
    SPLITS,
    TOKENIZER,
    VALID_PER_10K,
    ShardWriter,
    Vocabulary,
    check_options,
    id_hash,
    open_tokenizer,
    place_tokenizer,
    write_manifest,
)
from tokenizer.tokenizer import Tokenizer

LISTED_PER_UNIT = 1000
SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class Job:
    """What is the same for every unit."""

    documents: str
    tokens: str
    model: str
    vocabulary: Vocabulary
    valid_per_10k: int
    shard_tokens: int

    @property
    def plan(self) -> dict[str, Any]:
        """The options that the bytes of a shard follow from."""
        return {
            "tokenizer_sha256": self.vocabulary.tokenizer_sha256,
            "valid_per_10k": self.valid_per_10k,
            "shard_tokens": self.shard_tokens,
        }


def run_unit(job: Job, tokenizer: Tokenizer, unit: Unit) -> dict[str, Any]:
    """Make the shards of a unit; returns what the journal records of it."""
    read, reasons = 0, Counter[str]()
    listed: list[dict[str, Any]] = []
    bos, eos = np.array([[tokenizer.bos_id], [tokenizer.eos_id]], job.vocabulary.dtype)
    replaced_before = tokenizer.replaced_chars
    folder = Path(job.tokens) / unit.source
    with ShardWriter(folder, unit.name, job.vocabulary, job.valid_per_10k) as writer:
        for name in unit.inputs:
            path = Path(job.documents) / unit.source / name
            for number, line in enumerate(files.read_lines(path), 1):
                read += 1
                document = parse(line)
                if isinstance(document, str):
                    reason = document
                elif writer.has(document[0]) or id_hash(document[0]) in unit.left_out:
                    reason = "duplicate id"
                else:
                    reason = ""
                    ids = tokenizer.encode_array(document[1])
                    tokens = np.concatenate([bos, ids, eos])
                    writer.add(document[0], tokens, len(document[1].encode()))
                if reason:
                    reasons[reason] += 1
                    if len(listed) < LISTED_PER_UNIT:
                        listed.append({"file": name, "line": number, "reason": reason})
        shards = writer.finish()
    return {
        "unit": unit.name,
        "read": read,
        "skipped": dict(sorted(reasons.items())),
        "listed": listed,
        "left_out": sorted(unit.left_out),
        "replaced_chars": tokenizer.replaced_chars - replaced_before,
        "shards": shards,
    }


def parse(line: bytes) -> tuple[str, str] | str:
    """(id, text) of a document, or why it is none."""
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        return "not JSON"
    if not isinstance(document, dict):
        return "not an object"
    if not isinstance(document.get("id"), str) or not document["id"]:
        return "no id"
    if not isinstance(document.get("text"), str) or not document["text"]:
        return "no text"
    return document["id"], document["text"]


def finish(
    folder: Path, job: Job, plan: dict[str, Any], records: Sequence[dict[str, Any]], limit: float
) -> None:
    """Write the manifests, unless too many documents were skipped."""
    read = sum(record["read"] for record in records)
    reasons = Counter[str]()
    for record in records:
        reasons.update(record["skipped"])
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
    extra = {
        "read": read,
        "skipped": dict(sorted(reasons.items())),
        "replaced_chars": replaced,
        "plan": plan,
    }
    for split in ("valid", "train"):
        shards = [r["shards"][split] for r in records if r["shards"][split] is not None]
        (folder / split).mkdir(exist_ok=True)
        write_manifest(folder, split, job.vocabulary, shards, extra)
    (folder / JOURNAL).unlink()


_worker: tuple[Tokenizer, int]


def _start_worker(model: Path, parent: int) -> None:
    """Load the tokenizer once per process, and leave when the parent is gone."""
    global _worker
    _worker = Tokenizer(model), hold(model)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_worker(job: Job, unit: Unit) -> dict[str, Any]:
    return run_unit(job, _worker[0], unit)


def work(job: Job, units: Sequence[Unit], workers: int) -> Iterator[tuple[Unit, dict[str, Any]]]:
    """Units with their records, as they are finished."""
    workers = min(workers, len(units))
    if workers <= 1:
        tokenizer = Tokenizer(job.model)
        yield from ((unit, run_unit(job, tokenizer, unit)) for unit in units)
        return
    start = Path(job.tokens) / TOKENIZER, os.getpid()
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, start) as pool:
        waiting = {pool.submit(_in_worker, job, unit): unit for unit in units}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?): the same command goes on from here,"
                " with fewer --workers if need be"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def tokenize(job: Job, workers: int, limit: float) -> None:
    """Make every source of the input that is not finished yet."""
    tokens, documents = Path(job.tokens), Path(job.documents)
    wait_for_workers(tokens / TOKENIZER)
    for part in tokens.rglob("*.part-*"):
        part.unlink()
    place_tokenizer(Path(job.model), tokens)
    plans: dict[str, tuple[list[Unit], dict[str, Any], Journal]] = {}
    for name in source_names(documents):
        units = plan_units(documents / name, job.shard_tokens)
        plan = job.plan | {"inputs": plan_hash(units)}
        manifest = tokens / name / "train" / "manifest.json"
        if manifest.exists() and not (tokens / name / JOURNAL).exists():
            refuse_other_plan(tokens / name, files.read_json(manifest).get("plan", {}), plan)
            continue
        (tokens / name).mkdir(exist_ok=True)
        journal = Journal(tokens / name, plan, job.vocabulary.dtype.itemsize)
        plans[name] = units, plan, journal
    todo = [u for units, _, journal in plans.values() for u in units if u.name not in journal.done]
    while plans:
        with cli.Progress("tokenize", sum(u.input_bytes for u in todo), "bytes") as progress:
            for unit, record in work(job, todo, workers):
                plans[unit.source][2].add(record)
                progress.update(unit.input_bytes, unit.source)
        todo = []
        for name, (units, _, journal) in plans.items():
            todo += duplicates(tokens / name, units, journal.done)
        if not todo:
            break
    for name, (units, plan, journal) in plans.items():
        finish(tokens / name, job, plan, [journal.done[u.name] for u in units], limit)


def summary(tokens: Path, names: Sequence[str]) -> str:
    rows = []
    for name in names:
        train, valid = (files.read_json(tokens / name / s / "manifest.json") for s in SPLITS)
        pieces = sum(m["tokens"] - 2 * m["documents"] for m in (train, valid))
        rows.append(
            (
                name,
                f"{train['documents']:,}",
                f"{train['tokens']:,}",
                f"{(train['text_bytes'] + valid['text_bytes']) / max(1, pieces):.2f}",
                f"{valid['documents']:,}",
            )
        )
    return cli.table(("source", "documents", "tokens", "bytes/token", "valid documents"), rows)


def main(argv: list[str]) -> None:
    p = cli.parser("python -m llama.data.tokenize", "Documents to token shards, source by source.")
    p.add_argument("--input", type=str, required=True, help="folder of documents, one per source")
    p.add_argument("--tokenizer", type=str, required=True, help="folder of tokenizer.model")
    p.add_argument("--output", type=str, required=True, help="folder of token shards to make")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    p.add_argument("--valid_per_10k", type=int, default=VALID_PER_10K, help="held-out documents")
    p.add_argument("--shard_tokens", type=str, default="1B", help="about this many per shard")
    p.add_argument("--skip_limit", type=float, default=0.01, help="share of bad documents allowed")
    args = p.parse_args(argv)
    check_options(args.valid_per_10k, args.shard_tokens)
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}, expected 1 or more")
    if not 0 <= args.skip_limit <= 1:
        raise UserError(f"--skip_limit is {args.skip_limit}, expected a share from 0 to 1")
    names = source_names(Path(args.input))
    model, _, vocabulary = open_tokenizer(args.tokenizer)
    job = Job(
        args.input,
        args.output,
        str(model),
        vocabulary,
        args.valid_per_10k,
        cli.count(args.shard_tokens),
    )
    try:
        with only_one(Path(args.output)):
            tokenize(job, args.workers, args.skip_limit)
    except OSError as error:
        where = error.filename or args.output
        raise UserError(
            f"{where}: {error.strerror}; mend that and the same command goes on from here"
        ) from error
    print(summary(Path(args.output), names))


if __name__ == "__main__":
    cli.run(main)
