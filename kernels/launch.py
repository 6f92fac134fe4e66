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
    """A launch as check.py compiles it: every `*_ptr` points to `dtype`, the rest are sizes.

    `types` are those of the other arguments; `:16` stands for a multiple of 16.
    """
    signature = {
        argument: types.get(argument, f"*{dtype}:16" if argument.endswith("_ptr") else "i32:16")
        for argument in kernel.arg_names
        if argument not in constants
    }
    return {
        "name": " ".join((kernel.__name__, dtype, name)).strip(),
        "kernel": kernel,
        "signature": signature,
        "constants": constants,
        "warps": num_warps,
        "stages": 3,
        "products": False,
        "spills": False,
    }
