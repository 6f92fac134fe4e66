"""The command `python -m llama.convert SRC DST --to hf|native|meta|gguf`.

SRC is a run (its newest checkpoint), a checkpoint, or a folder of Hugging Face's or Meta's. DST
appears when the conversion has been checked, whole; after an error there is nothing.
"""

from llama.runtime import signals

if __name__ == "__main__":
    # first of all: a signal that comes while torch is imported is heard too
    signals.listen()

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from llama import cli, files
from llama.cli import UserError, show_count
from llama.convert import check, gguf, hf, load, meta, native
from llama.convert.source import DTYPES, Source
from llama.runtime import checkpoint
from tokenizer.tokenizer import Tokenizer


def main(argv: list[str]) -> None:
    """Convert, check, and only then give the output its name; `UserError` for what cannot be."""
    p = cli.parser("python -m llama.convert", "Weights from one format to another, checked.")
    p.add_argument("src", type=str, help="A run, a checkpoint, or a folder of HF's or Meta's.")
    p.add_argument("dst", type=Path, help="What to make: a folder, for gguf a file.")
    p.add_argument("--to", choices=["hf", "native", "meta", "gguf"], required=True, help="Of DST.")
    p.add_argument("--dtype", choices=list(DTYPES), help="Type of the weights; default: as in SRC.")
    p.add_argument("--tokenizer", type=str, help="tokenizer.model, if not found.")
    p.add_argument("--license", type=str, help="Of the weights: apache-2.0, ...")
    a = p.parse_args(argv)
    if a.dst.exists():
        raise UserError(f"{a.dst} exists already: it is never overwritten, remove or rename it")
    if a.to == "gguf":
        gguf.library()
    if a.to == "native" and a.dtype not in (None, "float32"):
        raise UserError(f"--dtype is {a.dtype}, but weights that are trained on are float32")
    if a.license and a.to not in ("hf", "gguf"):
        print(f"WARNING: --license has no effect with --to {a.to}", file=sys.stderr)
    original = load.open_source(a.src)
    tokenizer = original.open_tokenizer(a.tokenizer)
    print(
        f"{original.path}: {original.format}, {show_count(original.n_parameters)} parameters in "
        f"{original.dtype_name}, context {original.context}, tokenizer {tokenizer.path}"
    )
    dtype = torch.float32 if a.to == "native" else DTYPES.get(a.dtype, original.dtype)
    source = original.cast(dtype, gains=torch.float32 if a.to == "gguf" else None)
    # twice: they are staged
    checkpoint.refuse_small_disk(a.dst, 2 * source.n_parameters * dtype.itemsize)
    if original.format == "hf":
        print(f"{original.path} {check.hf(original, original.path)}")
    with cli.as_user_error(f"{a.dst} cannot be written", OSError, SafetensorError):
        print(write(source, tokenizer, a))
    print(f"wrote {a.dst}: {a.to}, {source.dtype_name}")


def write(source: Source, tokenizer: Tokenizer, a: Any) -> str:
    """Write and check in one go; the verdict. Whatever is raised takes the output with it."""
    if a.to == "gguf":
        with files.atomic_file(a.dst) as file:
            gguf.write(source, tokenizer, Path(file.name), a.license)
            return check.gguf(source, Path(file.name))
    with files.atomic_folder(a.dst) as part:
        if a.to == "hf":
            hf.write(source, tokenizer, part, a.license)
            return check.hf(source, part, tokenizer)
        if a.to == "meta":
            meta.write(source, tokenizer, part)
        else:
            native.write(source, tokenizer, part, a.dst)
        return check.read_back(source, load.open_source(part))


if __name__ == "__main__":
    cli.run(signals.undone(main))
