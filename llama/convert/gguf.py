"""One GGUF file, for llama.cpp and what builds on it.

In: a source and its tokenizer. Out: the file, with the model of paper §2.2 as architecture "llama",
whose RoPE turns neighbouring features as ours does, and SentencePiece's pieces and scores. The
package `gguf`, of the extra `convert`, is imported when a file is written.
"""

from pathlib import Path
from typing import Any

import torch

from kernels import reference
from llama.cli import needed
from llama.convert import names
from llama.convert.source import Source
from tokenizer.tokenizer import Tokenizer

TENSOR_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def library() -> Any:
    """The package `gguf`, or a `UserError` that says how to get it."""
    return needed("gguf", "--to gguf", "'llama-pretraining[convert]'")


def write(source: Source, tokenizer: Tokenizer, path: Path, license: str | None) -> None:
    """Write the file. The gains of the norms are read as float32."""
    gguf = library()
    writer = gguf.GGUFWriter(path, "llama")
    if license:
        writer.add_license(license)
    _add_model(gguf, writer, source)
    _add_tokenizer(writer, tokenizer)
    with source.staged(path.parent) as weights:
        for name, weight in weights.items():
            kind = gguf.GGMLQuantizationType[TENSOR_TYPES[weight.dtype]]
            writer.add_tensor(names.gguf(name), weight.view(torch.uint8).numpy(), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add_model(gguf: Any, writer: Any, source: Source) -> None:
    cfg, kind = source.cfg, TENSOR_TYPES[source.dtype]
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
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
    elif cfg.rope_scaling:
        # GGUF keeps what Llama 3's scaling divides the speed of each pair by
        plain = reference.rope_frequencies(cfg.head_dim, cfg.rope_theta)
        slowed = reference.rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        writer.add_tensor("rope_freqs.weight", (plain / slowed).numpy())


def _add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    # the numbers of the kinds of pieces are SentencePiece's
    pieces = tokenizer.spec.pieces
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece.encode() for piece in pieces])
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_types([piece.type for piece in pieces])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(tokenizer.adds_space)
