"""The command `python -m llama.convert SRC DST --to hf|native|meta|gguf`.

SRC is a run (its newest checkpoint), a checkpoint, or a folder of Hugging Face's or Meta's. DST
appears when the conversion has been checked, whole; after an error there is nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llama import cli, files
from llama.cli import UserError, show_bytes, show_count
from llama.convert import card, check, gguf, hf, load, meta, native
from llama.convert.source import DTYPES, Source
from tokenizer.tokenizer import Tokenizer

Format = Literal["hf", "native", "meta", "gguf"]
Dtype = Literal["float32", "bfloat16", "float16"]
SHARD_BYTES = 5_000_000_000  # what transformers' own exports have


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    license: str | None = None,
) -> None:
    """Convert, check, and only then give the output its name; `UserError` for what cannot be."""
    final = Path(dst)
    if final.exists():
        raise UserError(f"{final} exists already: it is never overwritten, remove or rename it")
    if to == "gguf":
        gguf.library()
    if to == "native" and dtype not in (None, "float32"):
        raise UserError(f"--dtype is {dtype}, but weights that are trained on are float32")
    original = load.open_source(src)
    target = torch.float32 if to == "native" else DTYPES[dtype] if dtype else original.dtype
    source = original.cast(target, vectors=torch.float32 if to == "gguf" else None)
    pieces = original.open_tokenizer(tokenizer)
    print(
        f"{original.path}: {original.format}, {show_count(original.n_parameters)} parameters in "
        f"{_name(original.dtype)}, context {original.context}, tokenizer {pieces.path}"
    )
    needed, free = source.n_parameters * target.itemsize, files.free_bytes(final)
    if free < needed:
        raise UserError(
            f"the disk of {final} has {show_bytes(free)} free, "
            f"the weights take {show_bytes(needed)}"
        )
    if to == "meta":
        meta.params_json(source)
    if original.format == "hf":
        print(check.understood(original))
    try:
        print(_write(source, pieces, final, to, shard_bytes, license))
    except OSError as error:
        raise UserError(f"{final} cannot be written: {error.strerror or error}") from error
    print(f"wrote {final}: {to}, {_name(target)}")


def _write(
    source: Source, pieces: Tokenizer, final: Path, to: str, shard_bytes: int, license: str | None
) -> str:
    """Write and check in one go; the verdict. Whatever is raised takes the output with it."""
    if to == "gguf":
        with files.atomic_file(final) as file:
            part = Path(file.name)
            with _watched(source) as watched:
                gguf.write(watched, pieces, part, final.stem, license or card.UNKNOWN_LICENSE)
            return check.exported_gguf(source, part)
    with files.atomic_folder(final) as part:
        with _watched(source) as watched:
            if to == "hf":
                text = card.render(source, pieces, final.name, license)
                hf.write(watched, pieces, part, shard_bytes, text)
            elif to == "meta":
                meta.write(watched, pieces, part)
            else:
                native.write(watched, pieces, part, final)
        if to == "hf":
            return check.exported(source, pieces, part)
        return check.read_back(source, load.open_source(part))


@contextmanager
def _watched(source: Source) -> Iterator[Source]:
    """The source, with a bar that moves when a weight is read."""
    with cli.Progress("writing", len(source.shapes), "weights") as bar:

        def read(name: str) -> Tensor:
            bar.update(1, name)
            return source.read(name)

        yield replace(source, read=read)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(argv: list[str]) -> None:
    """Parse, then convert."""
    p = cli.parser("python -m llama.convert", "Weights from one format to another, checked.")
    p.add_argument("src", type=str, help="A run, a checkpoint, or a folder of HF's or Meta's.")
    p.add_argument("dst", type=str, help="What to make: a folder, for gguf a file.")
    p.add_argument("--to", type=Format, required=True, help="Format of DST.")
    p.add_argument("--dtype", type=Dtype, help="Type of the weights; default: as in SRC.")
    p.add_argument("--tokenizer", type=str, default=None, help="tokenizer.model, if not found.")
    p.add_argument("--shard_bytes", type=str, default=None, help="Largest file (hf): 5B is 5 GB.")
    p.add_argument("--license", type=str, default=None, help="Of the weights: apache-2.0, ...")
    a = p.parse_args(argv)
    for name, used in (("shard_bytes", ["hf"]), ("license", ["hf", "gguf"])):
        if getattr(a, name) is not None and a.to not in used:
            print(f"WARNING: --{name} has no effect with --to {a.to}", file=sys.stderr)
    shard_bytes = cli.count(a.shard_bytes) if a.shard_bytes else SHARD_BYTES
    if shard_bytes < 1:
        raise UserError(f"--shard_bytes is {a.shard_bytes}, expected more than 0")
    convert(
        a.src,
        a.dst,
        a.to,
        dtype=a.dtype,
        tokenizer=a.tokenizer,
        shard_bytes=shard_bytes,
        license=a.license,
    )


if __name__ == "__main__":
    cli.run(main)
