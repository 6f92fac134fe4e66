"""Folders of Hugging Face's `LlamaForCausalLM`: config.json, sharded safetensors, a tokenizer.

In: such a folder, made by transformers 4 or 5; out: its weights one by one. Or a source in and such
a folder out, with the keys that both versions read. The model is that of paper §2.2, with the two
halves of a head as RoPE's pairs (llama/convert/names.py).
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama import files
from llama.cli import UserError
from llama.config import ModelConfig
from llama.convert import names, pieces
from llama.convert.source import (
    TOKENIZER,
    Shape,
    Source,
    as_object,
    fact,
    model_config,
    read_object,
    refuse_foreign,
    widest,
)
from tokenizer.tokenizer import Tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
# What older versions wrote beside the weights, computed from the configuration.
BUFFER = re.compile(r".*rotary_emb\.inv_freq")
# What LlamaForCausalLM can be and this model cannot: key, and the value that is fine.
ONLY = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}


# -- reading ---------------------------------------------------------------------------------------


def open_folder(path: Path) -> Source:
    """The weights of a folder; names and shapes are checked against its configuration."""
    facts = read_object(path / CONFIG)
    cfg = read_config(path / CONFIG, facts)
    # name: (file, name in the file, shape, type)
    found: dict[str, tuple[Path, str, Shape, str]] = {}
    for file in weight_files(path):
        with _opened(file) as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                if not BUFFER.fullmatch(name):
                    part = weights.get_slice(name)
                    found[name] = (file, name, tuple(part.get_shape()), part.get_dtype())
    if facts.get("tie_word_embeddings") and names.hf("tok_embeddings.weight") in found:
        found[names.hf("output.weight")] = found[names.hf("tok_embeddings.weight")]
    expected = {names.hf(name): shape for name, shape in names.shapes(cfg).items()}
    refuse_foreign(path, {name: shape for name, (_, _, shape, _) in found.items()}, expected)

    for name, (_, _, _, code) in found.items():
        if code not in DTYPES:
            raise UserError(f"{path}: {name} is of type {code}, expected {', '.join(DTYPES)}")

    def read(name: str) -> Tensor:
        file, key, _, _ = found[names.hf(name)]
        with _opened(file) as weights:
            return names.neighbours(name, weights.get_tensor(key), cfg)

    return Source(
        path=path,
        format="hf",
        cfg=cfg,
        context=int(fact(path / CONFIG, facts, "max_position_embeddings", 2048)),
        dtype=widest(path, (DTYPES[code] for *_, code in found.values())),
        read=read,
        tokenizers=(path / TOKENIZER,),
    )


def read_config(where: Path, facts: Mapping[str, Any]) -> ModelConfig:
    """Our configuration from config.json, with the defaults of transformers' LlamaConfig."""
    for key, fine in ONLY.items():
        if facts.get(key, fine) != fine:
            raise UserError(f"{where}: {key} is {facts[key]!r}, only {fine!r} can be read")
    heads = fact(where, facts, "num_attention_heads")
    dim = fact(where, facts, "hidden_size")
    if fact(where, facts, "head_dim", dim / heads if heads else 0) * heads != dim:
        raise UserError(f"{where}: head_dim {facts['head_dim']} times {heads} heads is not {dim}")
    # transformers 5 keeps all of RoPE under one key
    found = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    rope = as_object(f"{where}: rope_parameters", found)
    theta = fact(where, facts, "rope_theta", 10000.0, float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {key: rope[key] for key in rope if key not in ("rope_type", "type", "rope_theta")}
    return model_config(
        where,
        dim=dim,
        n_layers=fact(where, facts, "num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=fact(where, facts, "num_key_value_heads", None),
        vocab_size=fact(where, facts, "vocab_size"),
        ffn_dim=fact(where, facts, "intermediate_size"),
        norm_eps=fact(where, facts, "rms_norm_eps", 1e-6, float),
        rope_theta=fact(where, rope, "rope_theta", theta, float),
        rope_scaling=None if kind == "default" else {"type": kind, **scaling},
    )


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or the only one."""
    if not (path / INDEX).exists():
        return [path / WEIGHTS]
    listed = as_object(f"{path / INDEX}: weight_map", read_object(path / INDEX).get("weight_map"))
    found = [path / name for name in sorted(set(listed.values()))]
    for file in found:
        if not file.is_file():
            raise UserError(f"{file} is missing, {path / INDEX} names it")
    return found


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as weights:
            yield weights
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is truncated or no safetensors file: {error}") from error


# -- writing ---------------------------------------------------------------------------------------


def write(source: Source, tokenizer: Tokenizer, part: Path, shard_bytes: int, card: str) -> None:
    """Fill the folder `part`; no file of weights is larger than `shard_bytes`, if it can be."""
    write_weights(source, part, shard_bytes)
    files.write_json(part / CONFIG, config_json(source, tokenizer))
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    files.write_json(part / "generation_config.json", {"_from_model_config": True, **ends})
    pieces.write(tokenizer, part, source.context)
    shutil.copyfile(tokenizer.path, part / TOKENIZER)
    files.write_atomic(part / "README.md", card)


def config_json(source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json: RoPE and the type of the weights under the keys of transformers 4 and 5."""
    cfg, dtype = source.cfg, str(source.dtype).removeprefix("torch.")
    scaling = None
    if cfg.rope_scaling:
        scaling = {"rope_type": cfg.rope_scaling["type"], **cfg.rope_scaling}
    rope = {"rope_theta": cfg.rope_theta, **(scaling or {"rope_type": "default"})}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.hidden_dim,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": source.context,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {key: value for key, value in rope.items() if key != "type"},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def write_weights(source: Source, part: Path, shard_bytes: int) -> None:
    """model.safetensors, or numbered files and their index."""
    shards: list[list[str]] = [[]]
    filled, total = 0, 0
    for name, shape in source.shapes.items():
        size = math.prod(shape) * source.dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    if len(shards) == 1:
        write_safetensors(part / WEIGHTS, source, shards[0])
        return
    index: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(part / file, source, shard)
        index |= {names.hf(name): file for name in shard}
    files.write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def write_safetensors(path: Path, source: Source, listed: Sequence[str]) -> None:
    """One file, tensor by tensor: the library's own writer wants all of them in memory.

    The format: the header's length in 8 bytes, the header in JSON, the values one after the other.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in listed:
        shape = source.shapes[name]
        begin, end = end, end + math.prod(shape) * source.dtype.itemsize
        header[names.hf(name)] = {
            "dtype": codes[source.dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    head = orjson.dumps(header)
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in listed:
            weight = names.halves(name, source.read(name), source.cfg).contiguous()
            file.write(weight.view(-1).view(torch.uint8).numpy().data)
