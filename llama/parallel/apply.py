"""Parallelism is applied to a finished model from outside, always in this order:
tensor/sequence parallel, recompute, compile, FSDP. The model file knows nothing of it.
"""

import shutil
from dataclasses import replace

import torch
from torch import nn

from llama import costs
from llama.config import Config
from llama.parallel import context, fsdp, layout, recompute, tensor
from llama.parallel.fsdp import Place

# What compiling gains and takes on a CPU, measured on 1 core with 7M parameters: a share of a step,
# and CPU seconds to the end of the first step and of the first validation.
CPU_GAIN, CPU_START_S = 0.07, 90.0
CPU_FLOPS_PER_S_AND_CORE = 1e11


def apply(model: nn.Module, cfg: Config, place: Place, dtype: torch.dtype) -> int:
    """Parallelise a model on the meta device, in place.

    Returns the number of processes its gradients are averaged over (1 where FSDP is not needed:
    one process training in float32 is left a plain module).
    """
    mesh = place.weights
    seams: tuple[tensor.Seam, ...] = ()
    names = mesh.mesh_dim_names or ()
    if "tensor" in names:
        seams = tensor.apply(model, mesh["tensor"])
        if cfg.parallel.async_tensor:
            tensor.overlap(mesh["tensor"])
    on_gpu = mesh.device_type == "cuda"
    at = layout.resolve(cfg, mesh.size(), on_gpu)
    modes = costs.modes(cfg.model, replace(at, element_bytes=dtype.itemsize))
    if place.context is not None:
        context.apply(model, place.context, modes)
    recompute.apply(model, modes, *seams)
    plain = mesh.size() == 1 and dtype == torch.float32
    worth = on_gpu or (plain and worth_compiling(cfg))
    if cfg.train.compile is True or (cfg.train.compile == "auto" and worth):
        for block in model.layers:  # type: ignore[union-attr]
            block.compile()
    if plain:
        return 1
    data = mesh[tuple(name for name in names if name != "tensor")]
    fsdp.apply(model, data, dtype, cfg.parallel)
    return data.size()


def worth_compiling(cfg: Config) -> bool:
    """Whether a run on a CPU is long enough to gain by compiling, with a compiler at hand."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        return False
    flops, _ = costs.flops_per_token(cfg.model, cfg.data.seq_len)
    seconds = flops * cfg.train.tokens / (CPU_FLOPS_PER_S_AND_CORE * torch.get_num_threads())
    return CPU_GAIN * seconds > CPU_START_S
