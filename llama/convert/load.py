"""Weights of any format, recognised: opened for conversion, or loaded into a model in training.

In: a run, a checkpoint, or a folder of Hugging Face's or Meta's. Out: a `Source`; or a sharded
model's parameters, filled. Fine-tuning as in §4 of the paper starts here.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from llama.cli import UserError, as_user_error, show_count
from llama.convert import hf, meta, native
from llama.convert.source import Source, fitting
from llama.runtime import checkpoint
from llama.runtime.world import World


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
        meta.weight_files(path)
        return "meta"
    if (path / hf.CONFIG).exists():
        hf.weight_files(path)
        return "hf"
    raise UserError(
        f"{path} is of no known format: expected a run (ckpt/), a checkpoint (step-*), Hugging "
        f"Face's {hf.CONFIG} with {hf.WEIGHTS}, or Meta's {meta.PARAMS} with "
        f"{meta.WEIGHTS.format(0)}"
    )


def open_source(path: str | Path, part: int = 0, parts: int = 1) -> Source:
    """The weights of a folder, names and shapes checked; hashes too, of every parts-th file."""
    kind, path = recognise(path), Path(path)
    if kind == "native":
        return native.open_checkpoint(path, part, parts)
    return hf.open_folder(path) if kind == "hf" else meta.open_folder(path)


def load_weights(
    path: str | Path, tensors: Mapping[str, Tensor], here: World, tokenizer_sha256: str
) -> str:
    """Fill `tensors`, named as in `model.named_parameters()`, plain or sharded, from any format.

    All ranks call it together; each holds one whole tensor at a time, of a checkpoint of ours not
    even that. What does not fit is the same `UserError` on every rank. Returns a line that says
    what was loaded.
    """
    with as_user_error("train.init_from", UserError):
        source = here.together(lambda: _opened(path, tensors, here, tokenizer_sha256))
    if source.format == "native":
        named = {native.PREFIX + name: tensor.detach() for name, tensor in tensors.items()}
        checkpoint.load(source.path, named, here)
    size = show_count(source.n_parameters)
    return f"initial weights from {source.path} ({source.format}, {size} parameters)"


def _opened(
    path: str | Path, tensors: Mapping[str, Tensor], here: World, tokenizer_sha256: str
) -> Source:
    """The source, if it has these tensors and this tokenizer; ranks divide the hashing.

    All but a checkpoint of ours has filled the tensors then.
    """
    source = open_source(path, here.rank, here.size)
    with torch.device("meta"):
        found = {name: torch.empty(shape) for name, shape in source.shapes.items()}
    fitting(source.path, found, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if source.tokenizer_sha256 not in (None, tokenizer_sha256):
        raise UserError(
            f"{source.path} was trained with another tokenizer (sha256 "
            f"{str(source.tokenizer_sha256)[:12]}) than the data ({tokenizer_sha256[:12]})"
        )
    if source.format != "native":
        _fill(source, tensors)
    return source


@torch.no_grad()
def _fill(source: Source, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        weight = source.read(name)
        if isinstance(tensor, DTensor):
            # every rank has the whole tensor and keeps its shard: nothing is sent
            mesh, placements = tensor.device_mesh, tensor.placements
            weight = weight.to(tensor.device, tensor.dtype)
            shard = distribute_tensor(weight, mesh, placements, src_data_rank=None)
            tensor.to_local().copy_(shard.to_local())
        else:
            tensor.copy_(weight)
