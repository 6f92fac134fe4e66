"""Folders of Hugging Face's `LlamaForCausalLM`: config.json, safetensors, tokenizer, model card.

In: such a folder, made by transformers 4 or 5; out: its weights one by one. Or a source in and such
a folder out, with the keys that both versions read. The model is that of paper §2.2, with the two
halves of a head as RoPE's pairs (llama/convert/names.py).
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama import files
from llama.cli import UserError, as_user_error, show_count
from llama.config import ModelConfig
from llama.convert import names, pieces
from llama.convert.source import TOKENIZER, Source, fitting, model_config, numbers
from llama.data import order
from tokenizer.tokenizer import Tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# What older versions wrote beside the weights, computed from the configuration.
BUFFER = re.compile(r".*rotary_emb\.inv_freq")
KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "ffn_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
MAX_HEADER_BYTES = 10_000_000  # about 100 a weight; a million weights take a minute to list
SHARD_BYTES = 5_000_000_000  # what transformers' own exports have
# LlamaForCausalLM can be otherwise, this model cannot.
ALWAYS = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def open_folder(path: Path) -> Source:
    """The weights of a folder, which are mapped, not read, and checked against config.json."""
    where = path / CONFIG
    facts = files.read_object(where)
    cfg = read_config(where, facts)
    found: dict[str, Tensor] = {}
    for file in weight_files(path):
        found |= _mapped(file)
    if facts.get("tie_word_embeddings") and names.hf("tok_embeddings.weight") in found:
        found[names.hf("output.weight")] = found[names.hf("tok_embeddings.weight")]
    context = numbers(where, facts, {"T": "max_position_embeddings"}, T=2048)["T"]
    expected = {names.hf(name): shape for name, shape in names.shapes(cfg).items()}
    dtype = fitting(path, found, expected)

    def read(name: str) -> Tensor:
        return names.neighbours(name, found[names.hf(name)], cfg)

    return Source(path, "hf", cfg, context, dtype, read, tokenizers=(path,))


def read_config(where: Path, facts: Mapping[str, Any]) -> ModelConfig:
    """Our configuration from config.json, with the defaults of transformers' LlamaConfig."""
    for key, fine in [*ALWAYS.items(), ("quantization_config", None)]:
        if facts.get(key, fine) != fine:
            raise UserError(f"{where}: {key} is {facts[key]!r}, only {fine!r} can be read")
    # transformers 5 keeps all of RoPE under one key
    found = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    rope = files.json_object(f"{where}: rope_parameters", found)
    given = {**facts, "rope_theta": rope.get("rope_theta", facts.get("rope_theta"))}
    values = numbers(where, given, KEYS, n_kv_heads=None, norm_eps=1e-6, rope_theta=10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {key: rope[key] for key in rope if key not in ("rope_type", "type", "rope_theta")}
    values["rope_scaling"] = None if kind == "default" else {"type": kind, **scaling}
    cfg = model_config(where, **values)
    if facts.get("head_dim") not in (None, cfg.head_dim):
        raise UserError(f"{where}: head_dim is {facts['head_dim']!r}, expected {cfg.head_dim}")
    return cfg


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or the only one."""
    index, only = path / INDEX, path / WEIGHTS
    if not index.exists():
        if not only.exists():
            raise UserError(f"{path} has {CONFIG}, but neither {WEIGHTS} nor {INDEX}")
        return [only]
    listed = files.read_object(index).get("weight_map")
    names_of = files.json_object(f"{index}: weight_map", listed).values()
    if odd := [name for name in names_of if not re.fullmatch(r"[\w][\w.-]{0,200}", str(name))]:
        raise UserError(f"{index}: {str(odd[0])[:80]!r} is no name of a file beside it")
    found = {path / str(name) for name in names_of}
    for file in sorted(found):
        if not file.is_file():
            raise UserError(f"{file} is missing, {index} names it")
    return sorted(found)


def _mapped(file: Path) -> dict[str, Tensor]:
    with as_user_error(f"{file} is truncated or no safetensors file", OSError, SafetensorError):
        with open(file, "rb") as head:
            if (size := int.from_bytes(head.read(8), "little")) > MAX_HEADER_BYTES:
                raise UserError(f"{file} says that its header has {size} bytes, no model's has")
        weights = safe_open(file, "pt")
        found = [name for name in weights.keys() if not BUFFER.fullmatch(name)]
        return {name: weights.get_tensor(name) for name in found}


def write(source: Source, tokenizer: Tokenizer, part: Path, license: str | None) -> None:
    """Fill the folder `part`."""
    write_weights(source, part)
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    files.write_json(part / CONFIG, config_json(source) | ends)
    files.write_json(part / "generation_config.json", {"_from_model_config": True, **ends})
    pieces.write(tokenizer, part, source.context)
    shutil.copyfile(tokenizer.path, part / TOKENIZER)
    files.write_atomic(part / "README.md", card(source, tokenizer, license))
    for file in part.glob("*.safetensors"):
        # safetensors lets nobody but their owner read them
        shutil.copymode(part / CONFIG, file)


def write_weights(source: Source, part: Path) -> None:
    """model.safetensors, or numbered files of at most SHARD_BYTES, if they can be, and an index."""
    with source.changed(lambda name, w: names.halves(name, w, source.cfg)).staged(part) as weights:
        theirs = {names.hf(name): weight for name, weight in weights.items()}
        save_torch_state_dict(theirs, part, max_shard_size=SHARD_BYTES)


def config_json(source: Source) -> dict[str, Any]:
    """config.json: RoPE and the type of the weights under the keys of transformers 4 and 5."""
    cfg = source.cfg
    scaling = dict(cfg.rope_scaling or {"type": "default"})
    rope = {"rope_type": scaling.pop("type"), **scaling}
    return {
        "architectures": ["LlamaForCausalLM"],
        **ALWAYS,
        **{theirs: getattr(cfg, ours) for ours, theirs in KEYS.items()},
        "head_dim": cfg.head_dim,
        "max_position_embeddings": source.context,
        "rope_scaling": {**rope, **cfg.rope_scaling} if cfg.rope_scaling else None,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **rope},
        "tie_word_embeddings": False,
        "torch_dtype": source.dtype_name,
        "dtype": source.dtype_name,
    }


def card(source: Source, tokenizer: Tokenizer, license: str | None) -> str:
    """The model card: what the weights are, and their data, tokens and licence."""
    terms = "The weights may be used as far as their author and the sources' licences allow."
    if license:
        terms = f"The weights are published under: {license}."
    template = Path(__file__).with_name("card.md").read_text()
    facts = {"source": source, "tokenizer": tokenizer, "data": _data(source), "terms": terms}
    size = show_count(source.n_parameters)
    return template.format(license=license or "other", size=size, **facts)


def _data(source: Source) -> str:
    """What it was trained on, as far as the source knows: Table 1 of the paper for this run."""
    state = source.state
    if not state.get("segments"):
        origin = state.get("converted_from", {"format": source.format})["format"]
        return f"Converted from weights in the format {origin}, which does not record the data."
    saved, step = state["config"], state["step"]
    data, train, optim = saved["data"], saved["train"], saved["optim"]
    tokens = order.Order(saved["seed"], order.from_json(state["segments"])).source_tokens(step)
    rows = [
        f"| {name} | {data['mixture'].get(name, 0):.2%} | {count:,} |"
        for name, count in sorted(tokens.items(), key=lambda item: -item[1])
    ]
    lines = [
        f"{sum(tokens.values()):,} tokens in {step:,} steps of {train['batch_tokens']:,}, in "
        f"windows of {data['seq_len']:,}; {optim['name']}, learning rate up to {optim['lr']}.",
        "",
        "| source | share of the mixture | tokens trained on |",
        "|---|---:|---:|",
        *rows,
    ]
    return "\n".join(lines)
