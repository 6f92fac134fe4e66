"""One GGUF file, for llama.cpp and what builds on it.

In: a source and its tokenizer. Out: the file, with the model of paper §2.2 as architecture "llama",
whose RoPE turns neighbouring features as ours does, and SentencePiece's pieces and scores. The
package `gguf`, of the extra `convert`, is imported when a file is written.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

from kernels import reference
from llama.cli import UserError
from llama.convert import names
from llama.convert.source import Source
from tokenizer.tokenizer import Tokenizer

FILE_TYPES = {
    torch.float32: "ALL_F32",
    torch.bfloat16: "MOSTLY_BF16",
    torch.float16: "MOSTLY_F16",
}
TENSOR_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def library() -> Any:
    """The package `gguf`, or a `UserError` that says how to get it."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            '--to gguf needs the package gguf: pip install "llama-pretraining[convert]"'
        )
    return importlib.import_module("gguf")


def write(source: Source, tokenizer: Tokenizer, path: Path, name: str, license: str) -> None:
    """Write the file, tensor by tensor. The gains of the norms are read as float32."""
    gguf = library()
    writer = gguf.GGUFWriter(path, "llama")
    _add_model(gguf, writer, source, name, license)
    _add_tokenizer(gguf, writer, tokenizer)
    factors = rope_factors(source)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for each, shape in source.shapes.items():
        dtype = torch.float32 if len(shape) == 1 else source.dtype
        size = torch.Size(shape).numel() * dtype.itemsize
        kind = gguf.GGMLQuantizationType[TENSOR_TYPES[dtype]]
        writer.add_tensor_info(names.gguf(each), shape, np.dtype(np.uint16), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for each in source.shapes:
        weight = source.read(each).contiguous()
        writer.write_tensor_data(weight.view(-1).view(torch.uint8).numpy())
    writer.close()


def _add_model(gguf: Any, writer: Any, source: Source, name: str, license: str) -> None:
    cfg = source.cfg
    writer.add_name(name)
    writer.add_license(license)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[source.dtype]])
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(source.context)
    writer.add_embedding_length(cfg.dim)
    writer.add_block_count(cfg.n_layers)
    writer.add_feed_forward_length(cfg.hidden_dim)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    if cfg.rope_scaling and cfg.rope_scaling["type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(cfg.rope_scaling["factor"]))


def rope_factors(source: Source) -> np.ndarray | None:
    """What Llama 3's scaling divides the speed of each pair by, which GGUF keeps as a tensor."""
    cfg = source.cfg
    if not cfg.rope_scaling or cfg.rope_scaling["type"] == "linear":
        return None
    plain = reference.rope_frequencies(cfg.head_dim, cfg.rope_theta)
    scaled = reference.rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    return (plain / scaled).numpy()


def _add_tokenizer(gguf: Any, writer: Any, tokenizer: Tokenizer) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    ids = range(tokenizer.vocab_size)

    def kind(i: int) -> Any:
        kinds = gguf.TokenType
        if model.is_unknown(i):
            return kinds.UNKNOWN
        if model.is_control(i):
            return kinds.CONTROL
        if model.is_unused(i):
            return kinds.UNUSED
        return kinds.BYTE if model.is_byte(i) else kinds.NORMAL

    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([model.id_to_piece(i).encode() for i in ids])
    writer.add_token_scores([model.get_score(i) for i in ids])
    writer.add_token_types([kind(i) for i in ids])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    prefixed = model.encode_as_pieces("a")[0].startswith("\u2581")
    writer.add_add_space_prefix(prefixed)
