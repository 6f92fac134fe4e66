"""Checkpoints of ours: their weights one by one, and new ones made from foreign weights.

In: a run (its newest complete checkpoint) or a checkpoint, every byte verified first. Out: its
weights; or, the other way, a folder with `ckpt/step-00000000` and `tokenizer/tokenizer.model` that
`train.init_from` and `python -m llama.generate` take.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from llama import config
from llama.cli import UserError
from llama.config import Config, DataConfig
from llama.convert.source import (
    TOKENIZER,
    Source,
    model_config,
    refuse_foreign,
    widest,
)
from llama.runtime import checkpoint
from tokenizer.tokenizer import Tokenizer

PREFIX = "model."


def open_checkpoint(path: Path) -> Source:
    """The weights of a run's newest complete checkpoint, or of a checkpoint; hashes are checked."""
    place = checkpoint.newest(path)
    if problem := checkpoint.damage(place):
        raise UserError(f"{place} is damaged: {problem}")
    return describe(place)


def describe(place: Path) -> Source:
    """The same for a checkpoint that has been verified already."""
    state = checkpoint.read_state(place)
    try:
        saved, tokenizer_sha256 = state["config"], state["fingerprints"]["tokenizer"]
        data, context = Path(saved["data"]["path"]), int(saved["data"]["seq_len"])
        model = dict(saved["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place} does not record how it was trained: {error!r}") from error
    cfg = model_config(place / checkpoint.STATE, **model)
    reader = _Reader(place)
    try:
        listed = reader.read_metadata().state_dict_metadata
    except (OSError, pickle.UnpicklingError, AttributeError, EOFError) as error:
        raise UserError(f"{place} has no readable list of tensors: {error}") from error
    weights = {
        name.removeprefix(PREFIX): entry
        for name, entry in listed.items()
        if name.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata)
    }
    source = Source(
        path=place,
        format="native",
        cfg=cfg,
        context=context,
        dtype=widest(place, (entry.properties.dtype for entry in weights.values())),
        read=lambda name: _read(reader, name, weights[name]),
        # beside the shards; where the quickstart makes it; where a converted folder has it
        tokenizers=tuple(
            folder / TOKENIZER
            for folder in (data, data.parent / "tokenizer", place.parent.parent / "tokenizer")
        ),
        tokenizer_sha256=tokenizer_sha256,
        state=state,
    )
    refuse_foreign(place, {name: tuple(w.size) for name, w in weights.items()}, source.shapes)
    return source


class _Reader(checkpoint._Reader):
    """Reads the list of tensors once, not again for each of them."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


def _read(reader: _Reader, name: str, entry: TensorStorageMetadata) -> Tensor:
    weight = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({PREFIX + name: weight}, storage_reader=reader, no_dist=True)
    return weight


class _OneByOne(dcp.DefaultSavePlanner):
    """Plans with tensors of the meta device and reads each when it is its turn to be written."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.source.read(index.fqn.removeprefix(PREFIX))


def write(source: Source, tokenizer: Tokenizer, part: Path, final: Path) -> None:
    """Fill the folder `part`, which will be called `final`, with a checkpoint of step 0."""
    (part / "tokenizer").mkdir()
    shutil.copyfile(tokenizer.path, part / "tokenizer" / TOKENIZER)
    tensors = {
        PREFIX + name: torch.empty(shape, dtype=source.dtype, device="meta")
        for name, shape in source.shapes.items()
    }
    unfinished = part / "ckpt" / "unfinished"
    unfinished.mkdir(parents=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            writer = dcp.FileSystemWriter(unfinished, single_file_per_rank=True)
            dcp.save(tensors, storage_writer=writer, planner=_OneByOne(source), no_dist=True)
    except CheckpointException as error:
        # what was raised while reading or writing, by rank, with its traceback
        raise error.failures[0][0] from error
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
    written = {path.name: checkpoint._entry(path) for path in unfinished.glob("__*")}
    checkpoint._publish(unfinished, unfinished.with_name("step-00000000"), 0, written, state)
