"""What the backward pass computes again instead of keeping in memory (paper §2.4).

none        nothing
manual      norms and SwiGLU's product, in a backward pass by hand (manual.py): the paper's way
selective   all but the outputs of matrix products and of attention, by torch
full        everything: a block keeps its input alone
budget      full, manual and none, block by block, so that what is kept fits a number of bytes
            (`llama.costs.modes` chooses)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from llama.parallel import manual
from llama.parallel.tensor import Seam

aten, llama = torch.ops.aten, torch.ops.llama
# What is dear to compute. Attention's operators are those that sdpa and the Triton kernels end in.
DEAR = [
    aten.mm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    llama.attention.default,
]


def apply(model: Any, modes: Sequence[str], *seams: Seam) -> None:
    """Set up every block of the model in place, each with its mode; no name changes.

    `seams` are those of tensor.py where a sequence is divided.
    """
    full = partial(checkpoint, use_reentrant=False)
    selective = partial(full, context_fn=partial(create_selective_checkpoint_contexts, DEAR))
    for block, mode in zip(model.layers, modes, strict=True):
        if mode == "manual":
            manual.apply(block, *seams)
        elif mode != "none":
            block.forward = partial(_wrapped, full if mode == "full" else selective, block.forward)


def _wrapped(wrapper: Any, forward: Any, *given: Any) -> Any:
    # torch.compile takes a frame of ours to begin with: it passes over checkpoint's own
    return wrapper(forward, *given)
