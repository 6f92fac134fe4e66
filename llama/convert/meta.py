"""Folders of the original code: params.json and consolidated.*.pth.

In: such a folder, its model-parallel files merged; out: its weights one by one. Or a source in and
such a folder out, with a single file of weights. Names and layout are ours (paper §2.2). Of pickles
only tensors are taken.
"""

from __future__ import annotations

import io
import pickle
import shutil
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import _open_zipfile_writer

from llama import files
from llama.cli import UserError
from llama.config import ModelConfig
from llama.convert import names
from llama.convert.source import (
    TOKENIZER,
    Shape,
    Source,
    fact,
    model_config,
    read_object,
    refuse_foreign,
    show_shape,
    widest,
)
from tokenizer.tokenizer import Tokenizer

PARAMS, WEIGHTS = "params.json", "consolidated.{:02d}.pth"
CONTEXT = 2048  # of the paper; params.json does not say
BUFFER = "rope.freqs"  # in some files; follows from the configuration
# RoPE scaling as in the code of Llama 3.1, which can set the factor and high_freq_factor only.
FIXED = {"type": "llama3", "low_freq_factor": 1, "original_max_position_embeddings": 8192}
FACTOR, HIGH = 8, 4


# -- reading ---------------------------------------------------------------------------------------


def open_folder(path: Path) -> Source:
    """The weights of a folder; its files are mapped, not read, and checked against params.json."""
    facts = read_object(path / PARAMS)
    places = weight_files(path)
    parts = [_mapped(file) for file in places]
    cfg = read_params(path / PARAMS, facts, parts)
    shapes = names.shapes(cfg)
    for file, part in zip(places, parts, strict=True):
        refuse_foreign(file, dict.fromkeys(part, ()), dict.fromkeys(shapes, ()))
    axes = {
        name: _axis(path, name, [part[name].shape for part in parts], shape)
        for name, shape in shapes.items()
    }

    def read(name: str) -> Tensor:
        axis = axes[name]
        return parts[0][name] if axis is None else torch.cat([part[name] for part in parts], axis)

    return Source(
        path=path,
        format="meta",
        cfg=cfg,
        context=CONTEXT,
        dtype=widest(path, (weight.dtype for part in parts for weight in part.values())),
        read=read,
        tokenizers=(path / TOKENIZER, path.parent / TOKENIZER),
    )


def weight_files(path: Path) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth and so on, none missing between them."""
    found = sorted(path.glob("consolidated.*.pth"))
    for i, file in enumerate(found):
        if file.name != WEIGHTS.format(i):
            raise UserError(f"{path} has {file.name}, but no {WEIGHTS.format(i)}")
    return found


def _mapped(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} is truncated or no file of tensors: {reason}") from error
    if not isinstance(content, dict) or not all(torch.is_tensor(w) for w in content.values()):
        raise UserError(f"{file} holds no tensors by name")
    return {name: weight for name, weight in content.items() if name != BUFFER}


def read_params(
    where: Path, facts: Mapping[str, Any], parts: Sequence[Mapping[str, Tensor]]
) -> ModelConfig:
    """Our configuration from params.json, with the defaults of the original code.

    The vocabulary may be given as -1 and the feed-forward width as multiples: both are read off the
    weights, which are split by rows there.
    """

    def rows(name: str) -> int:
        # at least 1: that the weight is missing is told later
        return sum(len(part[name]) for part in parts if name in part) or 1

    scaling: dict[str, Any] | None = None
    if facts.get("use_scaled_rope"):
        scaling = FIXED | {
            "factor": fact(where, facts, "rope_scaling_factor", FACTOR, float),
            "high_freq_factor": fact(where, facts, "rope_high_freq_factor", HIGH, float),
        }
    return model_config(
        where,
        dim=fact(where, facts, "dim"),
        n_layers=fact(where, facts, "n_layers"),
        n_heads=fact(where, facts, "n_heads"),
        n_kv_heads=fact(where, facts, "n_kv_heads", None),
        vocab_size=rows("output.weight"),
        ffn_dim=rows("layers.0.feed_forward.w1.weight"),
        norm_eps=fact(where, facts, "norm_eps", 1e-5, float),
        rope_theta=fact(where, facts, "rope_theta", 10000.0, float),
        rope_scaling=scaling,
    )


def _axis(path: Path, name: str, parts: Sequence[Shape], expected: Shape) -> int | None:
    """The axis over which files divide a weight; None for one that each of them has whole."""
    if all(shape == expected for shape in parts):
        return None
    for axis in range(len(expected)):
        if all(len(shape) == len(expected) for shape in parts):
            merged = list(parts[0])
            merged[axis] = sum(shape[axis] for shape in parts)
            if tuple(merged) == expected:
                return axis
    inside = f" in each of {len(parts)} files" if len(parts) > 1 else ""
    raise UserError(
        f"{path}: {name} is {show_shape(parts[0])}{inside}, expected {show_shape(expected)}"
    )


# -- writing ---------------------------------------------------------------------------------------


def write(source: Source, tokenizer: Tokenizer, part: Path) -> None:
    """Fill the folder `part`."""
    files.write_json(part / PARAMS, params_json(source))
    write_tensors(part / WEIGHTS.format(0), source)
    shutil.copyfile(tokenizer.path, part / TOKENIZER)


def params_json(source: Source) -> dict[str, Any]:
    """params.json; refuses RoPE scaling that the original code cannot do."""
    cfg = source.cfg
    facts: dict[str, Any] = {
        "dim": cfg.dim,
        "n_layers": cfg.n_layers,
        "n_heads": cfg.n_heads,
        "n_kv_heads": cfg.kv_heads,
        "vocab_size": cfg.vocab_size,
        "norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        **feed_forward(cfg),
    }
    if scaling := cfg.rope_scaling:
        for key, value in FIXED.items():
            if scaling.get(key) != value:
                raise UserError(
                    f"{source.path}: Meta's params.json cannot hold rope_scaling "
                    f"{key} {scaling.get(key)}, only {value}"
                )
        facts["use_scaled_rope"] = True
        facts["rope_scaling_factor"] = scaling["factor"]
        facts["rope_high_freq_factor"] = scaling["high_freq_factor"]
    return facts


def feed_forward(cfg: ModelConfig) -> dict[str, Any]:
    """What makes the original code choose our F: 8/3 dim, times a factor, up to a multiple."""
    if cfg.hidden_dim == ModelConfig(dim=cfg.dim).hidden_dim:
        return {"multiple_of": 256}
    natural = int(8 * cfg.dim / 3)
    if natural <= cfg.hidden_dim:
        return {"multiple_of": cfg.hidden_dim}
    return {
        "multiple_of": cfg.hidden_dim,
        "ffn_dim_multiplier": cfg.hidden_dim / (natural + 1),
    }


@dataclass(frozen=True)
class _Storage:
    """Stands in a pickle for values that are written later."""

    key: str
    dtype: torch.dtype
    size: int


@dataclass(frozen=True)
class _Later:
    """A tensor of such values."""

    storage: _Storage
    shape: Shape

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self.shape, device="meta").stride()
        arguments: tuple[Any, ...] = (self.storage, 0, self.shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, item: object) -> tuple[Any, ...] | None:
        if not isinstance(item, _Storage):
            return None
        kinds = {
            torch.float32: torch.FloatStorage,
            torch.bfloat16: torch.BFloat16Storage,
            torch.float16: torch.HalfStorage,
        }
        return "storage", kinds[item.dtype], item.key, "cpu", item.size


def write_tensors(path: Path, source: Source) -> None:
    """The file that torch.save writes, tensor by tensor: torch.save wants all of them in memory."""
    later = {}
    for i, (name, shape) in enumerate(source.shapes.items()):
        size = torch.Size(shape).numel()
        later[name] = _Later(_Storage(str(i), source.dtype, size), shape)
    head = io.BytesIO()
    _Pickler(head, protocol=2).dump(later)
    with _open_zipfile_writer(str(path)) as file:
        file.write_record("data.pkl", head.getvalue(), len(head.getvalue()))
        file.write_record("byteorder", sys.byteorder, len(sys.byteorder))
        for name, tensor in later.items():
            # a weight read from a mapped file shares its storage with the whole file
            storage = source.read(name).clone().untyped_storage()
            file.write_record(f"data/{tensor.storage.key}", storage, storage.nbytes())
