"""A suspicious step once more, in place: bad data gives the same bits again, bad hardware others.

In: what computes the loss and the gradients of a step, from weights that it leaves alone. Out: what
it gave, the second time where the first was suspicious, and a line on what that tells. Each step
waits for its loss and norm; the norm is computed twice. Recomputing a step is also what helps
against a silent error (arXiv 2604.00726).
"""

import platform
from collections.abc import Callable
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
# statistics by source, the mean loss, what gradients are still to be multiplied with
Result = tuple[Tensor, Tensor, Tensor]


def repeatable(cfg: Config, backend: str, device: torch.device) -> bool:
    """Whether the same step gives the same bits again on sound hardware."""
    return device.type == "cpu" or (cfg.kernels.deterministic and backend in REPEATABLE)


def refuse(cfg: Config, backend: str, device: torch.device) -> None:
    """Raise `UserError` where `guard.rerun` would call sound hardware broken."""
    if cfg.guard.rerun and not repeatable(cfg, backend, device):
        problem = (
            f"on a GPU guard.rerun needs kernels.deterministic, attention triton: not {backend}"
        )
        raise UserError(problem)


def checked(state: State, compute: Callable[[], Result]) -> Result:
    """What `compute()` gives, and leaves in the parameters.

    All ranks call it together. Where loss or norm is not finite or a spike it is called again, and
    what it gives then stands.
    """
    (stats, loss, factor), norm, *sums = _once(state, compute)
    if not state.guard.suspects(loss, norm):
        return stats, loss, factor
    first = f"loss {loss:.6g} and gradient norm {norm:.6g}"
    state.optimizer.zero_grad(set_to_none=True)
    (stats, loss, factor), norm, *again = _once(state, compute)
    differs = [not torch.equal(a, b) for a, b in zip(sums, again, strict=True)]
    told = state.world.gather((*differs, platform.node()))
    verdict = "the same bits: the data or the learning rate, not the hardware"
    # sums over ranks carry an error to all: who computed something else tells more
    for kind, what in ((1, "holds gradients of"), (0, "computed")):
        if odd := [f"{rank} on {row[2]}" for rank, row in enumerate(told) if row[kind]]:
            verdict = f"bad hardware: other bits are what rank {', '.join(odd)} {what}"
    state.world.say(
        f"WARNING: step {state.step + 1}, {first}, gives when computed again "
        f"loss {loss:.6g} and gradient norm {norm:.6g}, {verdict}"
    )
    return stats, loss, factor


def _once(state: State, compute: Callable[[], Result]) -> tuple[Result, Tensor, Tensor, Tensor]:
    """What `compute` gives, the gradients' norm, and checksums of what this rank did and holds.

    It did the losses and the gradient that arrives at the bottom of the model: neither was summed
    over ranks yet, and every error on the way of an activation ends in them.
    """
    model: Any = state.model
    did: list[Tensor] = []

    def note(tensor: Tensor) -> None:
        did.append(checksum(optim.local(tensor.detach()).contiguous()))

    def at_the_bottom(module: Any, inputs: Any, out: Tensor) -> None:
        out.register_hook(note)

    top = model.register_forward_hook(lambda module, inputs, out: note(out[0]))
    bottom = model.tok_embeddings.register_forward_hook(at_the_bottom)
    result = compute()
    top.remove(), bottom.remove()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    holds = torch.stack([checksum(optim.local(grad)) for grad in grads])
    return result, optim.global_norm(grads) * result[2], torch.stack(did), holds
