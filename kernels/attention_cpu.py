"""Causal attention on a CPU by torch's own kernel, called block by block.

(B, H, T, D) queries and (B, K, T, D) keys and values in, (B, H, T, D) out. The kernel takes 512
keys at once: what the mask hides among them is computed all the same. In blocks of queries, each
with the keys up to its end, an eighth to a fifth of the time goes (T = 512: 79 ms to 65 ms, forward
and backward).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

# FlashAttentionKernel.cpp in torch works on 32 queries at once, on 64 where it gets 192 and on 256
# where it gets 768: then few blocks of our own are slower.
BLOCK = 192
FEWEST_QUERIES, TOO_MANY_QUERIES = 256, 768


def worth_blocks(n_queries: int) -> bool:
    """Whether blocks are faster; by comparison, as torch.compile may not know the number."""
    return FEWEST_QUERIES <= n_queries < TOO_MANY_QUERIES


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax(q kᵀ / sqrt(D)) v, with the same T in all three."""
    # the kernel takes the features of a head as neighbours, whatever the strides say
    return _CausalBlocks.apply(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)))


def _blocks(q: Tensor) -> list[tuple[slice, slice, Tensor | None]]:
    """Rows of every block of queries, the keys it sees, and the mask that the kernel needs.

    From the last to the first: the last sees all keys, so its gradients are where others are added.
    """
    blocks = []
    for end in range(q.shape[2], 0, -BLOCK):
        start = max(end - BLOCK, 0)
        # the first block's mask is the kernel's own
        mask = q.new_full((end - start, end), -torch.inf).triu_(start + 1) if start else None
        blocks.append((slice(start, end), slice(end), mask))
    return blocks


class _CausalBlocks(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = torch.empty_like(q), []
        for rows, keys, mask in _blocks(q):
            out[:, :, rows], log_sum = kernel(
                q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, mask is None, attn_mask=mask
            )
            sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, k, v, out, *sums = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), k, v
        for (rows, keys, mask), log_sum in zip(_blocks(q), sums, strict=True):
            of_queries = (x[:, :, rows] for x in (grad, q))
            of_keys = (x[:, :, keys] for x in (k, v))
            grad_q[:, :, rows], to_k, to_v = kernel(
                *of_queries, *of_keys, out[:, :, rows], log_sum, 0.0, mask is None, attn_mask=mask
            )
            if grad_k is k:
                # the first block taken, the last one, sees all keys
                grad_k, grad_v = to_k, to_v
            else:
                grad_k[:, :, keys] += to_k
                grad_v[:, :, keys] += to_v
        return grad_q, grad_k, grad_v
