"""Folders of the original code: params.json and consolidated.*.pth.

In: such a folder, its model-parallel files merged; out: its weights one by one. Or a source in and
such a folder out, with a single file of weights. Names and layout are ours (paper §2.2). Of pickles
only tensors are taken.
"""

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import files
from llama.cli import UserError
from llama.config import ModelConfig
from llama.convert import names
from llama.convert.source import TOKENIZER, Source, fitting, model_config, numbers
from tokenizer.tokenizer import Tokenizer

PARAMS, WEIGHTS = "params.json", "consolidated.{:02d}.pth"
CONTEXT = 2048  # of the paper; params.json does not say
BUFFER = "rope.freqs"  # in some files; follows from the configuration
KEYS = {key: key for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta")}
# RoPE scaling as in the code of Llama 3.1, which can set the factor and high_freq_factor only.
FIXED = {"type": "llama3", "low_freq_factor": 1, "original_max_position_embeddings": 8192}
SCALING_KEYS = {"factor": "rope_scaling_factor", "high_freq_factor": "rope_high_freq_factor"}


def open_folder(path: Path) -> Source:
    """The weights of a folder, which are mapped, not read, and checked against params.json."""
    # what the files hold of each weight
    parts: dict[str, list[Tensor]] = {}
    for file in weight_files(path):
        for name, weight in _mapped(file).items():
            parts.setdefault(name, []).append(weight)
    where = path / PARAMS
    cfg = read_params(where, files.read_object(where), parts)
    shapes = names.shapes(cfg)

    def read(name: str, device: str = "cpu") -> Tensor:
        each, expected = [part.to(device) for part in parts[name]], shapes.get(name, ())
        axis = divided_axis(each, expected)
        if axis is not None:
            return torch.cat(each, axis)
        # all the same, or an odd one that is refused
        return next((part for part in each if part.shape != expected), each[0])

    dtype = fitting(path, {name: read(name, "meta") for name in parts}, shapes)
    return Source(path, "meta", cfg, CONTEXT, dtype, read, tokenizers=(path, path.parent))


def weight_files(path: Path) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth and so on, none missing between them."""
    found = sorted(path.glob("consolidated.*.pth"))
    if not found:
        raise UserError(f"{path} has {PARAMS}, but no {WEIGHTS.format(0)}")
    for i, file in enumerate(found):
        if file.name != WEIGHTS.format(i):
            raise UserError(f"{path} has {file.name}, but no {WEIGHTS.format(i)}")
    return found


def _mapped(file: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type for member in archive.infolist()):
                raise ValueError("torch.save compresses nothing")
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch's reader raises whatever a pickle makes it run into
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} is truncated or no file of tensors: {reason}") from error
    if not isinstance(content, dict) or not all(map(_is_plain, content, content.values())):
        raise UserError(f"{file} holds no plain tensors by name")
    return {name: weight for name, weight in content.items() if name != BUFFER}


def _is_plain(name: Any, weight: Any) -> bool:
    """Whether it is a named tensor that can be read: with data, neither sparse nor quantised."""
    if not isinstance(name, str) or not torch.is_tensor(weight) or weight.is_quantized:
        return False
    return weight.layout == torch.strided and weight.device.type == "cpu"


def divided_axis(parts: Sequence[Tensor], expected: tuple[int, ...]) -> int | None:
    """The axis over which files divide a weight; None for one that each of them has whole."""
    shapes = {tuple(part.shape) for part in parts}
    for axis, size in enumerate(expected):
        if shapes == {(*expected[:axis], size / len(parts), *expected[axis + 1 :])}:
            return axis
    return None


def read_params(
    where: Path, facts: Mapping[str, Any], parts: Mapping[str, Sequence[Tensor]]
) -> ModelConfig:
    """Our configuration from params.json, with the defaults of the original code.

    The vocabulary may be given as -1 and the feed-forward width as multiples: both are read off the
    weights, which are split by rows there.
    """

    def rows(name: str) -> int:
        # at least 1: that the weight is missing is told later
        return sum(map(len, parts.get(name, ()))) or 1

    scaling: dict[str, Any] | None = None
    if facts.get("use_scaled_rope"):
        scaling = FIXED | numbers(where, facts, SCALING_KEYS, factor=8.0, high_freq_factor=4.0)
    return model_config(
        where,
        vocab_size=rows("output.weight"),
        ffn_dim=rows("layers.0.feed_forward.w1.weight"),
        rope_scaling=scaling,
        **numbers(where, facts, KEYS, n_kv_heads=None, norm_eps=1e-5, rope_theta=10000.0),
    )


def write(source: Source, tokenizer: Tokenizer, part: Path) -> None:
    """Fill the folder `part`."""
    files.write_json(part / PARAMS, params_json(source))
    try:
        with source.staged(part) as weights:
            torch.save(weights, part / WEIGHTS.format(0))
    except RuntimeError as error:
        # a full disk reaches us as a broken write position
        raise OSError("the disk is full or failing") from error
    shutil.copyfile(tokenizer.path, part / TOKENIZER)


def params_json(source: Source) -> dict[str, Any]:
    """params.json; refuses RoPE scaling that the original code cannot do."""
    cfg = source.cfg
    facts = {key: getattr(cfg, key) for key in (*KEYS, "vocab_size")} | feed_forward(cfg)
    if scaling := cfg.rope_scaling:
        for key, value in FIXED.items():
            if scaling.get(key) != value:
                raise UserError(
                    f"{source.path}: Meta's params.json cannot hold rope_scaling "
                    f"{key} {scaling.get(key)}, only {value}"
                )
        facts["use_scaled_rope"] = True
        facts |= {theirs: scaling[ours] for ours, theirs in SCALING_KEYS.items()}
    return facts


def feed_forward(cfg: ModelConfig) -> dict[str, Any]:
    """What makes the original code choose our F: 8/3 dim, times a factor, up to a multiple."""
    if cfg.hidden_dim == ModelConfig(dim=cfg.dim).hidden_dim:
        return {"multiple_of": 256}
    # the product is cut to a whole number: half a feature more than F is F
    return {"multiple_of": 1, "ffn_dim_multiplier": (cfg.hidden_dim + 0.5) / int(8 * cfg.dim / 3)}
