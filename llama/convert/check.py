"""Whether what was written computes what was read.

In: a source and what a conversion made of it. Out: a line for the user, or a `UserError` with the
largest difference. Our own model runs on the source with one block in memory at a time. A folder of
Hugging Face's is run by transformers where that is installed, in another process and folder,
because it would take our package `kernels` for one of its own; else, and for GGUF, by a forward
pass that shares no code with the model (llama/convert/independent.py).
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kernels import reference
from llama import files
from llama.cli import UserError
from llama.convert import independent, pieces
from llama.convert.source import Source
from llama.model import RMSNorm, TransformerBlock
from tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent.parent
JUDGE = Path(__file__).parent / "judge.py"
RUN = "import runpy, sys; runpy.run_path(sys.argv[1])['main'](*sys.argv[2:])"
NO_TRANSFORMERS = 3  # exit code of judge.py
ROWS, TOKENS, TEXTS = 2, 48, 500
# Of the largest logit: round-off stays far below, a wrong row or epsilon does not.
TOLERANCE = 1e-4


@torch.no_grad()
def logits(source: Source, tokens: Tensor) -> Tensor:
    """(B, T, V) of our own model in float32, reading the weights block by block."""
    cfg = source.cfg
    speed = reference.rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    table = reference.rope_table(tokens.shape[1], speed)
    h = source.read("tok_embeddings.weight")[tokens].float()
    block = TransformerBlock(cfg, "reference")
    for i in range(cfg.n_layers):
        for name, parameter in block.named_parameters():
            parameter.copy_(source.read(f"layers.{i}.{name}"))
        h = block(h, table)
    norm = RMSNorm(cfg.dim, cfg.norm_eps)
    norm.weight.copy_(source.read("norm.weight"))
    return torch.nn.functional.linear(norm(h), source.read("output.weight").float())


def sample(source: Source) -> Tensor:
    """Token ids (B, T) to compare on, the same ones each time."""
    assert source.cfg.vocab_size
    shape = ROWS, min(TOKENS, source.context)
    return torch.randint(source.cfg.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def compare(ours: Tensor, theirs: Tensor, what: str) -> str:
    """How far apart logits are; a `UserError` where that is more than round-off."""
    largest = (ours - theirs).abs().max().item() / max(1.0, ours.abs().max().item())
    if not largest <= TOLERANCE:
        raise UserError(
            f"{what} computes something else: logits differ by {largest:.2e} of the largest one, "
            f"expected less than {TOLERANCE:.0e}; nothing was kept"
        )
    return f"logits differ by {largest:.1e} of the largest one"


# -- what was read and what was written ------------------------------------------------------------


def understood(source: Source) -> str:
    """A folder of Hugging Face's that was read: we compute what others compute from it."""
    tokens = sample(source)
    judge, theirs, _ = judged(source, source.path, tokens, [])
    found = compare(logits(source, tokens), theirs, f"{source.path} as this project reads it")
    return f"{source.path} checked by {judge}: {found}"


def exported(source: Source, tokenizer: Tokenizer, folder: Path) -> str:
    """A folder of Hugging Face's that was written: logits, and ids of awkward texts."""
    tokens = sample(source)
    texts = pieces.fuzz(tokenizer, TEXTS, random.Random(0))
    judge, theirs, ids = judged(source, folder, tokens, texts)
    line = compare(logits(source, tokens), theirs, f"the export of {source.path}")
    for text, found in zip(texts, ids, strict=True):
        expected = [tokenizer.bos_id, *tokenizer.encode(text)]
        if found != expected:
            raise UserError(
                f"{tokenizer.path} cannot be written as {pieces.FILE}: {text[:20]!r} has the ids "
                f"{expected[:8]}, exported {found[:8]}; nothing was kept"
            )
    return f"checked by {judge}: {line}; the same ids for {len(texts)} texts"


def exported_gguf(source: Source, file: Path) -> str:
    """A GGUF file that was written."""
    tokens = sample(source)
    theirs = independent.logits_gguf(file, tokens)
    line = compare(logits(source, tokens), theirs, f"the GGUF file of {source.path}")
    return f"checked by a second implementation: {line}"


def read_back(source: Source, written: Source) -> str:
    """A checkpoint or a folder of Meta's that was written: settings, and every bit of weights."""
    # F may be given or follow from dim, and so may the number of key/value heads
    expected, found = (
        asdict(replace(s.cfg, ffn_dim=s.cfg.hidden_dim, n_kv_heads=s.cfg.kv_heads))
        for s in (source, written)
    )
    if expected != found:
        raise UserError(f"{source.path}: written as {expected}, read back as {found}")
    for name in source.shapes:
        ours, theirs = source.read(name), written.read(name)
        if not torch.equal(ours, theirs):
            largest = (ours.float() - theirs.float()).abs().max().item()
            raise UserError(
                f"{source.path}: {name} read back differs by {largest:.2e}; nothing was kept"
            )
    return f"checked: {len(source.shapes)} weights were read back bit for bit"


# -- transformers, or what stands in for it --------------------------------------------------------


def judged(
    source: Source, folder: Path, tokens: Tensor, texts: Sequence[str]
) -> tuple[str, Tensor, list[list[int]]]:
    """(who, logits, ids of texts) for a folder of Hugging Face's with the shapes of `source`."""
    why = "not installed"
    if importlib.util.find_spec("transformers"):
        why = "too large for it in memory"
        # half, because it may hold weights twice while it loads them
        if 4 * source.n_parameters < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
            why = "not importable"
            if answer := ask_transformers(folder, tokens, texts):
                return answer
    ids = pieces.encode(folder, texts) if texts else []
    judge = f"a second implementation (transformers: {why})"
    return judge, independent.logits_hf(folder, tokens), ids


def ask_transformers(
    folder: Path, tokens: Tensor, texts: Sequence[str]
) -> tuple[str, Tensor, list[list[int]]] | None:
    """What transformers makes of a folder; None where it cannot be imported.

    The process starts in a folder of its own and without ours on its path.
    """
    kept = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [path for path in kept if path and Path(path).resolve() != ROOT]
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as place:
        question, answer = Path(place) / "question.json", Path(place) / "answer.json"
        files.write_json(question, {"tokens": tokens.tolist(), "texts": list(texts)})
        child = subprocess.run(
            # -P and run_path: neither that folder nor the script's, with its gguf.py, is searched
            [sys.executable, "-P", "-c", RUN, JUDGE, folder.absolute(), question, answer],
            cwd=place,
            env={**os.environ, **offline},
            capture_output=True,
            text=True,
        )
        if child.returncode == NO_TRANSFORMERS:
            return None
        if child.returncode:
            last = (child.stderr.strip().splitlines() or [""])[-1]
            raise UserError(f"transformers cannot run {folder.name}: {last}; nothing was kept")
        told = files.read_json(answer)
        theirs = load_file(answer.with_suffix(".safetensors"))["logits"]
    return f"transformers {told['version']}", theirs, told["ids"]
