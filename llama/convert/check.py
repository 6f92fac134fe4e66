"""Whether what was written computes what was read.

In: a source and what a conversion made of it. Out: a line for the user, or a `UserError` with the
largest difference. Our own model runs on the source, with a block in memory at a time. A folder of
Hugging Face's is run by transformers where that is installed, and else, like GGUF, by a decoder
that shares no code with the model (llama/convert/judges.py). The rest is read back.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import reference
from llama.cli import UserError
from llama.convert import judges, pieces
from llama.convert.source import Source
from llama.model import RMSNorm, TransformerBlock
from tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent.parent
ROWS, TOKENS = 2, 48
# Of the largest logit: round-off stays far below, a wrong row or epsilon does not.
TOLERANCE = 1e-4
Answer = tuple[str, Tensor, list[list[int]]]  # who, logits, ids of the texts


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


def hf(source: Source, folder: Path, tokenizer: Tokenizer | None = None) -> str:
    """A folder of Hugging Face's: the one that was read, or one that was written with a tokenizer.

    Others compute from it what we do, and its tokenizer gives the ids of awkward texts.
    """
    tokens = sample(source)
    texts = pieces.awkward(tokenizer) if tokenizer else []
    judge, theirs, ids = judged(source, folder, tokens, texts)
    what = f"the export of {source.path}" if tokenizer else f"{folder} as this project reads it"
    line = f"checked by {judge}: {compare(logits(source, tokens), theirs, what)}"
    if tokenizer is None:
        return line
    for text, found in zip(texts, ids, strict=True):
        expected = [tokenizer.bos_id, *tokenizer.encode(text)]
        if found != expected:
            raise UserError(
                f"{tokenizer.path} cannot be written as {pieces.FILE}: {text[:20]!r} has the ids "
                f"{expected[:8]}, exported {found[:8]}; nothing was kept"
            )
    return f"{line}; the same ids for {len(texts)} texts"


def gguf(source: Source, file: Path) -> str:
    """A GGUF file that was written."""
    tokens = sample(source)
    theirs = judges.logits_gguf(file, tokens)
    line = compare(logits(source, tokens), theirs, f"the GGUF file of {source.path}")
    return f"checked by a second implementation: {line}"


def read_back(source: Source, written: Source) -> str:
    """A checkpoint or a folder of Meta's that was written: settings, and every bit of weights."""
    if source.cfg != written.cfg:
        raise UserError(f"{source.path}: written as {source.cfg}, read back as {written.cfg}")
    for name in source.shapes:
        ours, theirs = source.read(name), written.read(name)
        if not torch.equal(ours, theirs):
            largest = (ours.float() - theirs.float()).abs().max().item()
            raise UserError(
                f"{source.path}: {name} read back differs by {largest:.2e}; nothing was kept"
            )
    return f"checked: {len(source.shapes)} weights were read back bit for bit"


def judged(source: Source, folder: Path, tokens: Tensor, texts: Sequence[str]) -> Answer:
    """What others make of a folder of Hugging Face's with the shapes of `source`."""
    # half, because transformers may hold weights twice while it loads them
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    fits = 4 * source.n_parameters < memory
    if fits and (answer := ask_transformers(folder, tokens, texts)):
        return answer
    ids = pieces.encode(folder, texts) if texts else []
    why = "cannot be imported" if fits else "needs more memory"
    judge = f"a second implementation (transformers {why})"
    return judge, judges.logits_hf(folder, tokens), ids


def ask_transformers(folder: Path, tokens: Tensor, texts: Sequence[str]) -> Answer | None:
    """What transformers makes of a folder; None where it cannot be imported.

    Its process does not see ours: it would take our package `kernels` for one that it looks for.
    """
    kept = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [path for path in kept if path and Path(path).resolve() != ROOT]
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "answer.pt"
        child = subprocess.run(
            # -P: nor is the script's folder searched, with its gguf.py
            [sys.executable, "-P", judges.__file__, folder.absolute(), answer],
            input=json.dumps({"tokens": tokens.tolist(), "texts": list(texts)}),
            cwd=place,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
        )
        if child.returncode == judges.NO_TRANSFORMERS:
            return None
        if child.returncode:
            last = (child.stderr.strip().splitlines() or [""])[-1]
            raise UserError(f"transformers cannot run {folder.name}: {last}; nothing was kept")
        told = torch.load(answer, weights_only=True)
    return f"transformers {told['version']}", told["logits"], told["ids"]
