"""What the launchers of the Triton kernels share: a kernel and its arguments in, a launch out.

Like the Triton files, it is imported without torch by the compile gate (check.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Attention's statistics of rows lie in memory in multiples of this, its highest tile.
STATISTICS_ROWS = 128


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Run as many programs, on the device of the first tensor; none for an empty tensor."""
    import torch

    if programs:
        with torch.cuda.device_of(args[0]):
            kernel[(programs,)](*args, **constants)


def rows(x: Tensor) -> Tensor:
    """(..., C) as (N, C), with the rows apart by any stride: a view wherever there can be one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def empty32(x: Tensor, *shape: int) -> Tensor:
    """Float32 beside x."""
    import torch

    return x.new_empty(shape, dtype=torch.float32)


def n_processors(x: Tensor) -> int:
    """Streaming multiprocessors of the device of `x`; 1 under the interpreter."""
    import torch

    if not x.is_cuda:
        return 1
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def case(
    kernel: Any, name: str, dtype: str, types: dict[str, str], /, num_warps: int, **constants: Any
) -> dict[str, Any]:
    """A launch whose pointers, `*_ptr`, are to `dtype` and whose other arguments are sizes.

    `types` are those of the exceptions; see `compilation`.
    """
    usual = {x: f"*{dtype}:16" if x.endswith("_ptr") else "i32:16" for x in kernel.arg_names}
    name = " ".join((kernel.__name__, dtype, name)).strip()
    return compilation(kernel, name, usual | types, constants, num_warps, 3)


def compilation(
    kernel: Any, name: str, types: dict[str, Any], constants: dict[str, Any], warps: int,
    stages: int, **expected: Any,
) -> dict[str, Any]:  # fmt: skip
    """A launch as check.py compiles it, of the types and constants that the kernel takes.

    `:16` behind a type stands for a multiple of 16. `expected` says what the gate lets pass.
    """
    constants = {x: constants[x] for x in kernel.arg_names if x in constants}
    signature = {x: types[x] for x in kernel.arg_names if x not in constants}
    given = {"name": name, "kernel": kernel, "signature": signature, "constants": constants}
    given |= {"warps": warps, "stages": stages, "products": False, "spills": False}
    return given | expected
