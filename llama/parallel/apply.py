"""Parallelism is applied to a finished model from outside, always in this order:
tensor/sequence parallel, recompute, compile, FSDP. The model file knows nothing of it.
"""

import torch
import torch.distributed as dist
from torch import nn

from llama.config import Config
from llama.parallel import fsdp, recompute


def apply(model: nn.Module, cfg: Config, device: torch.device, dtype: torch.dtype) -> int:
    """Parallelise a model on the meta device, in place.

    Returns the number of processes its gradients are averaged over (1 where FSDP is not needed:
    one process training in float32 is left a plain module).
    """
    recompute.apply(model, cfg.parallel.recompute)
    wanted = cfg.train.compile
    if wanted is True or (wanted == "auto" and device.type == "cuda"):
        for block in model.layers:  # type: ignore[union-attr]
            block.compile()
    world = dist.get_world_size()
    if world == 1 and dtype == torch.float32:
        fsdp.layout(cfg.parallel, world)
        return 1
    fsdp.apply(model, fsdp.mesh(cfg.parallel, device.type), dtype)
    return world
