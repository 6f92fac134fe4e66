"""The same model in transformers: a `Transformer` in, a `LlamaForCausalLM` with sdpa out.

And a training step of it, as one writes it with transformers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llama.cli import UserError
from llama.config import ModelConfig, OptimConfig
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


def step(
    model: Any, cfg: OptimConfig, micro_batch: int | None = None, autocast: bool = False
) -> Callable[[Tensor], Tensor]:
    """From windows (B, T+1) to their loss: forward, backward, clipping and fused AdamW."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, cfg.lr, cfg.betas, cfg.eps, cfg.weight_decay, fused=True)

    def one(tokens: Tensor) -> Tensor:
        total = torch.zeros((), device=tokens.device)
        for part in tokens.split(micro_batch or len(tokens)):
            # targets already shifted spare it a padded copy of them
            inputs, targets = part[:, :-1], part[:, 1:].contiguous()
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
                out = model(input_ids=inputs, labels=inputs, shift_labels=targets, use_cache=False)
            loss = out.loss * (len(part) / len(tokens))
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return one
