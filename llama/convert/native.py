"""Checkpoints of ours: their weights one by one, and new ones made from foreign weights.

In: a run (its newest complete checkpoint) or a checkpoint, every byte verified first. Out: its
weights; or, the other way, a folder with `ckpt/step-00000000` and `tokenizer/tokenizer.model` that
`train.init_from` and `python -m llama.generate` take.
"""

import functools
import pickle
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from llama import config
from llama.cli import UserError, as_user_error
from llama.config import Config, DataConfig
from llama.convert import names
from llama.convert.source import TOKENIZER, Source, fitting, model_config
from llama.runtime import checkpoint, world
from tokenizer.tokenizer import Tokenizer

PREFIX = "model."


class _Reader(checkpoint.Reader):
    """Reads the list of tensors once, not again for each of them."""

    read_metadata = functools.cache(checkpoint.Reader.read_metadata)


def open_checkpoint(path: Path, part: int = 0, parts: int = 1) -> Source:
    """The weights of a run's newest complete checkpoint, or of a checkpoint.

    Hashes are checked: of every file, or of every parts-th where ranks divide the work.
    """
    place = checkpoint.newest(path)
    if problem := checkpoint.damage(place, part=part, parts=parts):
        raise UserError(f"{place} is damaged: {problem}")
    state = checkpoint.read_state(place)
    what = f"{place} does not record how it was trained"
    with as_user_error(what, KeyError, TypeError, show=repr):
        saved, sha256 = state["config"], state["fingerprints"]["tokenizer"]
        data, context = Path(saved["data"]["path"]), int(saved["data"]["seq_len"])
        cfg = model_config(place / checkpoint.STATE, **saved["model"])
    reader, kinds = _Reader(place), (OSError, pickle.UnpicklingError, AttributeError, EOFError)
    with as_user_error(f"{place} has no readable list of tensors", *kinds):
        listed = reader.read_metadata().state_dict_metadata
    with torch.device("meta"):
        weights = {
            name.removeprefix(PREFIX): torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in listed.items()
            if name.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata)
        }

    def read(name: str) -> Tensor:
        weight = torch.empty_like(weights[name], device="cpu")
        with warnings.catch_warnings(action="ignore"):
            dcp.load({PREFIX + name: weight}, storage_reader=reader, no_dist=True)
        return weight

    dtype = fitting(place, weights, names.shapes(cfg))
    # beside the shards; where the quickstart makes it; where a converted folder has it
    tokenizers = data, data.parent / "tokenizer", place.parent.parent / "tokenizer"
    return Source(place, "native", cfg, context, dtype, read, tokenizers, sha256, state)


def write(source: Source, tokenizer: Tokenizer, part: Path, final: Path) -> None:
    """Fill the folder `part`, which will be called `final`, with a checkpoint of step 0."""
    # tokens are read from, and the tokenizer found beside, the path a run records
    data = DataConfig(path=str(final / "tokenizer"), mixture={}, seq_len=source.context)
    state = {
        "format": 1,
        "step": 0,
        "tokens": 0,
        "fingerprints": {"model": asdict(source.cfg), "tokenizer": tokenizer.sha256, "data": {}},
        "config": config.to_dict(Config(name=final.name, model=source.cfg, data=data)),
        "converted_from": {"format": source.format, "name": source.path.name},
    }
    here = world.start()
    try:
        with source.staged(part) as weights:
            tensors = {PREFIX + name: weight for name, weight in weights.items()}
            if problem := checkpoint.save(part, 0, tensors, state, here, keep=1):
                raise UserError(f"{final} cannot be written: {problem}")
    finally:
        world.stop()
    (part / "tokenizer").mkdir()
    shutil.copyfile(tokenizer.path, part / "tokenizer" / TOKENIZER)
