"""Weights of any format, recognised: opened for conversion, or loaded into a model in training.

In: a run, a checkpoint, or a folder of Hugging Face's or Meta's. Out: a `Source`; or a sharded
model's parameters, filled. Fine-tuning as in §4 of the paper starts here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from llama.cli import UserError, show_count
from llama.convert import hf, meta, native
from llama.convert.source import Source, refuse_foreign
from llama.runtime import checkpoint
from llama.runtime.world import World

Result = TypeVar("Result")


def recognise(path: str | Path) -> str:
    """native, hf or meta; a `UserError` for everything else."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".gguf":
        raise UserError(f"{path} is a GGUF file: these are written, not read")
    if path.is_file():
        raise UserError(f"{path} is a file: name the folder that holds the weights")
    if checkpoint.folder(path).is_dir() or checkpoint.STEP_FOLDER.fullmatch(path.name):
        checkpoint.newest(path)
        return "native"
    if (path / meta.PARAMS).exists():
        if meta.weight_files(path):
            return "meta"
        raise UserError(f"{path} has {meta.PARAMS}, but no {meta.WEIGHTS.format(0)}")
    if (path / hf.CONFIG).exists():
        if (path / hf.INDEX).exists() or (path / hf.WEIGHTS).exists():
            return "hf"
        raise UserError(f"{path} has {hf.CONFIG}, but neither {hf.WEIGHTS} nor {hf.INDEX}")
    raise UserError(
        f"{path} is of no known format: expected a run (ckpt/), a checkpoint (step-*), Hugging "
        f"Face's {hf.CONFIG} with {hf.WEIGHTS}, or Meta's {meta.PARAMS} with "
        f"{meta.WEIGHTS.format(0)}"
    )


OPEN = {"native": native.open_checkpoint, "hf": hf.open_folder, "meta": meta.open_folder}


def open_source(path: str | Path) -> Source:
    """The weights of a folder, names and shapes checked, hashes too where there are some."""
    return OPEN[recognise(path)](Path(path))


def load_weights(
    path: str | Path, tensors: Mapping[str, Tensor], here: World, tokenizer_sha256: str
) -> str:
    """Fill `tensors`, named as in `model.named_parameters()`, plain or sharded, from any format.

    All ranks call it together; each holds one whole tensor at a time, of a checkpoint of ours not
    even that. What does not fit is the same `UserError` on every rank. Returns a line that says
    what was loaded.
    """
    kind, place = _together(here, lambda: recognise(path)), Path(path)
    if kind == "native":
        place = checkpoint.newest(path)
        _together(here, lambda: _verify(place, here))
    source = _together(here, lambda: _fitting(kind, place, tensors, tokenizer_sha256))
    if kind == "native":
        named = {native.PREFIX + name: tensor.detach() for name, tensor in tensors.items()}
        checkpoint.load(place, named, here)
    else:
        _together(here, lambda: _fill(source, tensors))
    size = show_count(source.n_parameters)
    return f"initial weights from {place} ({kind}, {size} parameters)"


def _together(here: World, action: Callable[[], Result]) -> Result:
    """What `action` returns here, unless it failed on some rank: then all ranks raise."""
    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    for verdict in here.gather(problem):
        if verdict:
            raise UserError(f"train.init_from: {verdict}")
    return cast(Result, result)


def _verify(place: Path, here: World) -> None:
    """Hash this rank's share of a checkpoint's files."""
    if problem := checkpoint.damage(place, part=here.rank, parts=here.size):
        raise UserError(f"{place} is damaged: {problem}")


def _fitting(
    kind: str, place: Path, tensors: Mapping[str, Tensor], tokenizer_sha256: str
) -> Source:
    """The opened source, if it has these tensors and this tokenizer."""
    source = native.describe(place) if kind == "native" else OPEN[kind](place)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    refuse_foreign(source.path, source.shapes, shapes)
    if source.tokenizer_sha256 not in (None, tokenizer_sha256):
        raise UserError(
            f"{source.path} was trained with another tokenizer (sha256 "
            f"{str(source.tokenizer_sha256)[:12]}) than the data ({tokenizer_sha256[:12]})"
        )
    return source


@torch.no_grad()
def _fill(source: Source, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        weight = source.read(name)
        if isinstance(tensor, DTensor):
            weight = weight.to(tensor.device, tensor.dtype)
            # every rank has the whole tensor and keeps its shard: nothing is sent
            shard = distribute_tensor(
                weight, tensor.device_mesh, tensor.placements, src_data_rank=None
            )
            tensor.to_local().copy_(shard.to_local())
        else:
            tensor.copy_(weight)
