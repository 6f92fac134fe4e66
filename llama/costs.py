"""What a model costs: parameters, FLOPs and bytes of a configuration, and what chips can do.

A configuration in, integers out. A multiplication and an addition count as two FLOPs, the backward
pass as twice the forward pass, recomputation as nothing; norms, RoPE and softmax are left out.
"""

from llama.config import ModelConfig

# Dense bf16 peak by the name the driver gives a chip, from NVIDIA's data sheets (H100 and H200: 132
# SMs at 1830 MHz). Their PCIe and NVL variants have other peaks; better no number than a wrong one.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a chip as torch names it; None for one that is not in the table."""
    return PEAK_FLOPS.get(device_name)


def matmul_parameters(cfg: ModelConfig) -> int:
    """Weights that a token is multiplied with: all matrices but the embedding."""
    assert cfg.vocab_size, "the vocabulary size is known before costs are asked for"
    attention = 2 * cfg.dim * (cfg.n_heads + cfg.kv_heads) * cfg.head_dim
    feed_forward = 3 * cfg.dim * cfg.hidden_dim
    return cfg.n_layers * (attention + feed_forward) + cfg.vocab_size * cfg.dim


def parameters(cfg: ModelConfig) -> int:
    """All weights: matrices, embedding, and the gains of two norms a block and one at the end."""
    assert cfg.vocab_size, "the vocabulary size is known before costs are asked for"
    gains = (2 * cfg.n_layers + 1) * cfg.dim
    return matmul_parameters(cfg) + cfg.vocab_size * cfg.dim + gains


def flops_per_token(cfg: ModelConfig, seq_len: int) -> tuple[int, int]:
    """Training FLOPs per token, forward and backward: (causal, PaLM).

    6 per matrix weight, and for attention's two products 12·L·T·dim as in the PaLM paper (Chowdhery
    et al. 2022, appendix B), or half of that when only the causal half is counted.
    """
    matmul = 6 * matmul_parameters(cfg)
    attention = 6 * cfg.n_layers * seq_len * cfg.dim
    return matmul + attention, matmul + 2 * attention


def checkpoint_bytes(cfg: ModelConfig) -> int:
    """Size of a checkpoint: weights and both moments of AdamW in float32."""
    return 3 * 4 * parameters(cfg)


def activation_bytes_per_token(cfg: ModelConfig, element_bytes: int = 2) -> int:
    """What the blocks keep per token for the backward pass, without recompute.

    Per block: the inputs of both norms in float32 and their outputs; q, k, v and the attention's
    output; gate, up, silu(gate) and the product of the feed-forward.
    """
    kv_dim = cfg.kv_heads * cfg.head_dim
    elements = 2 * cfg.dim + 2 * cfg.dim + 2 * kv_dim + 4 * cfg.hidden_dim
    return cfg.n_layers * (4 * 2 * cfg.dim + element_bytes * elements)
