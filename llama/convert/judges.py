"""Two judges of a conversion, neither of which runs our code: transformers, and a second decoder.

In: a folder of Hugging Face's or a GGUF file, and token ids. Out: logits in float32. The decoder is
written from paper §2.2 and the file formats alone: an error in the model, the kernels or the table
of names must not repeat here. It has one weight in memory at a time. As a script, which
llama/convert/check.py runs in a process of its own, this file asks transformers.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

NO_TRANSFORMERS = 3  # exit code


@torch.no_grad()
def decode(
    tokens: Tensor,
    facts: Mapping[str, Any],
    get: Callable[[str], Tensor],
    factors: Tensor | float = 1.0,
) -> Tensor:
    """(B, T) ids to (B, T, V).

    `facts` has the keys of config.json, `get` brings a weight by Hugging Face's name, as float32;
    the speed of RoPE's pairs, features i and i + D/2 of a head, is divided by `factors` (D/2,).
    """
    speed = rope_speed(facts) / factors
    angles = torch.arange(tokens.shape[1])[:, None] * speed
    cos, sin = angles.cos().float(), angles.sin().float()  # (T, D/2)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], get(name + ".weight"), facts.get("rms_norm_eps", 1e-6))

    def project(x: Tensor, name: str) -> Tensor:
        return x @ get(name + ".weight").T

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2 * len(speed))).transpose(1, 2)  # (B, H or K, T, D)

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    x = get("model.embed_tokens.weight")[tokens]
    for i in range(facts["num_hidden_layers"]):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        y = norm(x, f"model.layers.{i}.input_layernorm")
        q, k, v = (by_head(project(y, f"{attention}.{each}_proj")) for each in "qkv")
        q, k = turn(q), turn(k)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + project(seen.transpose(1, 2).flatten(2), f"{attention}.o_proj")
        y = norm(x, f"model.layers.{i}.post_attention_layernorm")
        y = F.silu(project(y, f"{mlp}.gate_proj")) * project(y, f"{mlp}.up_proj")
        x = x + project(y, f"{mlp}.down_proj")
    return project(norm(x, "model.norm"), "lm_head")


def rope_speed(facts: Mapping[str, Any]) -> Tensor:
    """Angle per position of each pair (D/2,); scaled as transformers documents it, if at all."""
    width = facts["hidden_size"] // facts["num_attention_heads"]
    rope = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or facts.get("rope_theta") or 10000.0
    speed = theta ** -(torch.arange(width // 2).double() * 2 / width)
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "linear":
        return speed / rope["factor"]
    if kind == "llama3":
        turns = rope["original_max_position_embeddings"] * speed / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * speed + (1 - kept) * speed / rope["factor"]
    return speed


def logits_hf(folder: Path, tokens: Tensor) -> Tensor:
    """Logits from config.json and safetensors."""
    facts = json.loads((folder / "config.json").read_bytes())
    places: dict[str, Any] = {}
    for file in folder.glob("model*.safetensors"):
        weights = safe_open(file, "pt")
        places |= dict.fromkeys(weights.keys(), weights)

    def get(name: str) -> Tensor:
        if name == "lm_head.weight" and facts.get("tie_word_embeddings"):
            name = "model.embed_tokens.weight"
        return places[name].get_tensor(name).float()

    return decode(tokens, facts, get)


def logits_gguf(file: Path, tokens: Tensor) -> Tensor:
    """Logits from a GGUF file, with the names of the package gguf."""
    import gguf

    reader = gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def fact(key: str) -> Any:
        field = reader.get_field(f"llama.{key}")
        return field.contents() if field else None

    facts = {
        "num_hidden_layers": fact("block_count"),
        "hidden_size": fact("embedding_length"),
        "num_attention_heads": fact("attention.head_count"),
        "rms_norm_eps": fact("attention.layer_norm_rms_epsilon"),
        "rope_theta": fact("rope.freq_base"),
        "rope_scaling": {"type": fact("rope.scaling.type"), "factor": fact("rope.scaling.factor")},
    }
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, facts["num_hidden_layers"])
    half = fact("rope.dimension_count") // 2

    def values(name: str) -> Tensor:
        return torch.tensor(gguf.dequantize(stored[name].data, stored[name].tensor_type))

    def get(name: str) -> Tensor:
        weight = values(known.get_name(name, try_suffixes=(".weight",)))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # here features 2i and 2i + 1 are a pair
            weight = weight.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
        return weight

    slowed = "rope_freqs.weight"
    return decode(tokens, facts, get, values(slowed) if slowed in stored else 1.0)


@torch.no_grad()
def ask_transformers(folder: str, answer: str) -> None:
    """From {tokens, texts} as JSON on standard input to {version, logits, ids} in `answer`."""
    try:
        import transformers

        load = transformers.AutoModelForCausalLM.from_pretrained
    except Exception as error:  # a broken package raises anything
        print(error, file=sys.stderr)
        sys.exit(NO_TRANSFORMERS)
    asked = json.load(sys.stdin)
    # a checkpoint in another type is widened, not rounded
    model = load(folder, torch_dtype=torch.float32).eval()
    logits = model(torch.tensor(asked["tokens"]), use_cache=False).logits.float()
    ids = []
    if asked["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text).input_ids for text in asked["texts"]]
    torch.save({"version": transformers.__version__, "logits": logits, "ids": ids}, answer)


if __name__ == "__main__":
    ask_transformers(*sys.argv[1:])
