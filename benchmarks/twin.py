"""The same model in transformers: a `Transformer` in, a `LlamaForCausalLM` with sdpa out."""

from torch import nn

from llama.cli import UserError
from llama.config import ModelConfig
from llama.convert import names
from llama.model import Transformer


def of(model: Transformer, context: int) -> nn.Module:
    """transformers' model with the weights of ours, in its type and on its device."""
    weights = {
        names.hf(name): names.halves(name, parameter.detach(), model.cfg)
        for name, parameter in model.named_parameters()
    }
    twin = fresh(model.cfg, context)
    twin.load_state_dict(weights)
    return twin.to(model.output.weight)


def fresh(cfg: ModelConfig, context: int) -> nn.Module:
    """transformers' model with weights of its own."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("transformers is not installed: pip install transformers") from error
    config = LlamaConfig(
        hidden_size=cfg.dim,
        intermediate_size=cfg.hidden_dim,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.kv_heads,
        vocab_size=cfg.vocab_size,
        rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model
