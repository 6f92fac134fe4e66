"""A second decoder, written from the file formats alone, to judge conversions by.

In: a folder of Hugging Face's or a GGUF file, and token ids. Out: logits in float32. It follows
paper §2.2, with RoPE's pairs where the format has them, and shares no code with the model, the
kernels or the table of names: an error there must not repeat here. One weight is in memory at a
time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from llama.convert.gguf import library


@dataclass(frozen=True)
class Decoder:
    """What a file says of its model. `get` brings a weight by Hugging Face's name, as float32."""

    layers: int
    heads: int
    kv_heads: int
    epsilon: float
    speed: Tensor  # angle per position of each pair of a head, (D/2,)
    get: Callable[[str], Tensor]
    neighbours: bool = False  # whether features 2i and 2i + 1 are a pair, or i and i + D/2

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) ids to (B, T, V)."""
        angles = torch.arange(tokens.shape[1]).double()[:, None] * self.speed.double()
        cos, sin = angles.cos().float(), angles.sin().float()  # (T, D/2)
        x = self.get("model.embed_tokens.weight")[tokens]
        for i in range(self.layers):
            x = x + self._attention(f"model.layers.{i}.", x, cos, sin)
            y = self._norm(x, f"model.layers.{i}.post_attention_layernorm")
            gate, up = (y @ self.get(f"model.layers.{i}.mlp.{w}_proj.weight").T for w in GATE_UP)
            gate = gate / (1 + torch.exp(-gate))
            x = x + (gate * up) @ self.get(f"model.layers.{i}.mlp.down_proj.weight").T
        return self._norm(x, "model.norm") @ self.get("lm_head.weight").T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean_square = (x * x).mean(-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.epsilon) * self.get(f"{name}.weight")

    def _attention(self, block: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self._norm(x, block + "input_layernorm")
        q, k, v = (y @ self.get(f"{block}self_attn.{w}_proj.weight").T for w in "qkv")
        q, k, v = (z.unflatten(-1, (-1, 2 * cos.shape[1])).transpose(1, 2) for z in (q, k, v))

        def turn(z: Tensor) -> Tensor:
            pairs = z.unflatten(-1, (-1, 2)) if self.neighbours else z.unflatten(-1, (2, -1)).mT
            a, b = pairs.unbind(-1)
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
            return (turned if self.neighbours else turned.mT).flatten(-2)

        q, k = turn(q), turn(k)  # (B, H or K, T, D)
        group = self.heads // self.kv_heads
        heads = []
        for h in range(self.heads):
            scores = q[:, h] @ k[:, h // group].transpose(1, 2) / math.sqrt(q.shape[-1])
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, h // group])
        return torch.cat(heads, -1) @ self.get(block + "self_attn.o_proj.weight").T


GATE_UP = ("gate", "up")


def logits_hf(folder: Path, tokens: Tensor) -> Tensor:
    """Logits from config.json and safetensors."""
    facts = json.loads((folder / "config.json").read_bytes())
    places: dict[str, Path] = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as weights:
            places |= dict.fromkeys(weights.keys(), file)

    def get(name: str) -> Tensor:
        if name == "lm_head.weight" and facts.get("tie_word_embeddings"):
            name = "model.embed_tokens.weight"
        with safe_open(places[name], "pt") as weights:
            return weights.get_tensor(name).float()

    heads = facts["num_attention_heads"]
    rope = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or facts.get("rope_theta") or 10000.0
    width = facts["hidden_size"] // heads
    return Decoder(
        layers=facts["num_hidden_layers"],
        heads=heads,
        kv_heads=facts.get("num_key_value_heads") or heads,
        epsilon=facts.get("rms_norm_eps", 1e-6),
        speed=_slowed(theta ** -(torch.arange(width // 2).double() * 2 / width), rope),
        get=get,
    ).logits(tokens)


def _slowed(speed: Tensor, rope: dict[str, Any]) -> Tensor:
    """RoPE scaling as transformers documents it: linear, or by wavelength for Llama 3."""
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "linear":
        return speed / rope["factor"]
    if kind != "llama3":
        return speed
    old, low, high = (
        rope[key]
        for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    slowed = []
    for each in speed.tolist():
        wavelength = 2 * math.pi / each
        if wavelength < old / high:
            slowed.append(each)
        elif wavelength > old / low:
            slowed.append(each / rope["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            slowed.append((1 - smooth) * each / rope["factor"] + smooth * each)
    return torch.tensor(slowed, dtype=torch.float64)


def logits_gguf(file: Path, tokens: Tensor) -> Tensor:
    """Logits from a GGUF file, with the names of the package gguf."""
    gguf = library()
    reader = gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def fact(key: str, default: Any = None) -> Any:
        field = reader.fields.get(f"llama.{key}")
        return field.contents() if field else default

    layers, heads = fact("block_count"), fact("attention.head_count")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)

    def get(name: str) -> Tensor:
        tensor = stored[known.get_name(name, try_suffixes=(".weight",))]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(values, np.float32))

    width = fact("rope.dimension_count")
    speed = fact("rope.freq_base") ** -(torch.arange(width // 2).double() * 2 / width)
    if fact("rope.scaling.type") == "linear":
        speed = speed / fact("rope.scaling.factor")
    if "rope_freqs.weight" in stored:
        speed = speed / torch.from_numpy(np.array(stored["rope_freqs.weight"].data)).double()
    return Decoder(
        layers=layers,
        heads=heads,
        kv_heads=fact("attention.head_count_kv"),
        epsilon=fact("attention.layer_norm_rms_epsilon"),
        speed=speed,
        get=get,
        neighbours=True,
    ).logits(tokens)
