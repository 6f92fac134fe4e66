"""A suspicious step once more, in place: bad data gives the same bits again, bad hardware others.

In: what computes the loss and the gradients of a step, from weights that it leaves alone. Out: what
it gave, the second time where the first was suspicious, and a line on what that tells. Each step
waits for its loss and norm; the norm is computed twice. Recomputing a step is also what helps
against a silent error (arXiv 2604.00726).
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llama import optim
from llama.cli import UserError
from llama.config import Config
from llama.runtime.replicas import checksum
from llama.runtime.state import State

# of the attention backends these give the same bits twice on a GPU
REPEATABLE = ("triton", "gluon", "reference")


def repeatable(cfg: Config, backend: str, device: torch.device) -> bool:
    """Whether the same step gives the same bits again on sound hardware."""
    return device.type == "cpu" or (cfg.kernels.deterministic and backend in REPEATABLE)


def refuse(cfg: Config, backend: str, device: torch.device) -> None:
    """Raise `UserError` where `guard.rerun` would call sound hardware broken."""
    if cfg.guard.rerun and not repeatable(cfg, backend, device):
        raise UserError(
            f"guard.rerun compares bits, and attention {backend} does not give the same ones twice "
            "on a GPU: --kernels.attention triton with --kernels.deterministic true does"
        )


def checked(state: State, compute: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> Any:
    """`compute()`: (statistics, loss, factor of the gradients), which are left in the parameters.

    All ranks call it together. Where loss or norm is not finite or a spike it is called again, and
    what it gives then stands.
    """
    result, own, norm = _once(state, compute)
    if not state.guard.suspects(result[1], norm):
        return result
    seen, held = f"loss {result[1]:.6g} and gradient norm {norm:.6g}", _gradients(state)
    state.optimizer.zero_grad(set_to_none=True)
    result, again, norm = _once(state, compute)
    here = state.world
    differs = not torch.equal(own, again), not torch.equal(held, _gradients(state))
    told = here.gather((*differs, platform.node()))
    # sums over ranks carry an error to all: who computed something else tells more
    for what, kind in (("computed", 0), ("holds gradients of", 1)):
        if odd := [f"{rank} on {row[2]}" for rank, row in enumerate(told) if row[kind]]:
            verdict = (
                f"loss {result[1]:.6g} and gradient norm {norm:.6g}: bad hardware, not the data; "
                f"other bits are what rank {', rank '.join(odd)} {what}"
            )
            break
    else:
        verdict = "the same bits: the data or the learning rate, not the hardware"
    here.say(f"WARNING: step {state.step + 1}, {seen}, gives when computed again {verdict}")
    return result


def _once(state: State, compute: Callable[[], Any]) -> tuple[Any, Tensor, Tensor]:
    """What `compute` gives, checksums of what this rank did for it, and the gradients' norm."""
    with _noted(state.model) as sums:
        result = compute()
    grads = [p.grad for p in state.model.parameters() if p.grad is not None]
    return result, torch.stack(sums), optim.global_norm(grads) * result[2]


@contextmanager
def _noted(model: Any) -> Iterator[list[Tensor]]:
    """Checksums of the losses and of the gradient that arrives at the bottom of the model.

    Neither was summed over ranks yet, and every error on the way of an activation ends in them.
    """
    sums: list[Tensor] = []

    def note(tensor: Tensor) -> None:
        sums.append(checksum(optim.local(tensor.detach()).contiguous()))

    def at_the_top(module: Any, inputs: Any, out: tuple[Tensor, Tensor]) -> None:
        note(out[0])

    def at_the_bottom(module: Any, inputs: Any, out: Tensor) -> None:
        out.register_hook(note)

    hooks = [
        model.register_forward_hook(at_the_top),
        model.tok_embeddings.register_forward_hook(at_the_bottom),
    ]
    yield sums
    for hook in hooks:
        hook.remove()


def _gradients(state: State) -> Tensor:
    """Checksums of the gradients that this process holds."""
    grads = (p.grad for p in state.model.parameters())
    return torch.stack([checksum(optim.local(grad)) for grad in grads if grad is not None])
