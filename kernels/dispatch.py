"""Which functions compute an operation: a tensor in, those of eager.py or of a Triton file out.

Triton runs on GPUs. There its functions are custom operators, which torch.compile and selective
recompute see as one node each; eager.py tells them what comes out. Everything else is plain torch.
"""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, infer_schema

from kernels import eager

# While torch compiles for a GPU these run as their formula in reference.py: inductor makes SwiGLU's
# product again in the backward pass instead of keeping it. The others stay custom operators: on an
# H200 the backward pass of RMSNorm moves 3.8 TB/s by cuDNN, 1.7 by inductor (cudnn-frontend's
# benchmark/norms), and RoPE's table is complex, which inductor cannot do. On CPUs it gets all.
LEFT_TO_INDUCTOR = ("swiglu",)

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Triton's interpreter runs the kernels on CPU tensors, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def on_triton(x: Tensor) -> bool:
    return bool(_CUSTOM_OPS) and (x.is_cuda or INTERPRETED) and x.dtype in TRITON_DTYPES


def formula(name: str, x: Tensor) -> bool:
    return torch.compiler.is_compiling() and (name in LEFT_TO_INDUCTOR or not on_triton(x))


def function(name: str, x: Tensor) -> Callable[..., Any]:
    """The function of this name for tensors like x."""
    return _CUSTOM_OPS[name] if on_triton(x) else getattr(eager, name)


def _custom_op(name: str, file: str, schema: str | None = None) -> Callable[..., Any]:
    """The Triton function as an operator of torch; the file is imported at its first call."""
    twin = getattr(eager, name)

    def run(*args: Any) -> Any:
        return _tensors(getattr(import_module(f"kernels.{file}"), name)(*args), args[0])

    def fake(*args: Any) -> Any:
        found = _tensors(twin(*args), args[0])
        if isinstance(found, Tensor):
            return found.new_empty(found.shape)
        return tuple(x.new_empty(x.shape) for x in found)

    schema = schema or infer_schema(twin, mutates_args=())
    operator = custom_op(f"llama::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


def _tensors(found: Any, x: Tensor) -> Any:
    """An operator returns nothing but tensors: empty ones for None."""
    if isinstance(found, Tensor):
        return found
    return tuple(x.new_empty(0) if item is None else item for item in found)


_FILES = {"rms_norm": "rmsnorm", "add_rms_norm": "rmsnorm", "swiglu": "swiglu", "rope": "rope"}
_CUSTOM_OPS: dict[str, Callable[..., Any]] = {}
if find_spec("triton"):
    for _name, _file in _FILES.items():
        for _way in (f"{_name}_forward", f"{_name}_backward"):
            _CUSTOM_OPS[_way] = _custom_op(_way, _file)
    _AGAIN = "swiglu_backward_with_product"
    _CUSTOM_OPS[_AGAIN] = _custom_op(_AGAIN, "swiglu")
    _LOSS = "linear_cross_entropy_forward"
    _CUSTOM_OPS[_LOSS] = _custom_op(
        _LOSS,
        "cross_entropy",
        "(Tensor x, Tensor weight, Tensor targets, bool gradients, float z_loss)"
        " -> (Tensor, Tensor, Tensor)",
    )
