"""AdamW and its learning rate (paper §2.3): gradients in, parameters changed in place.

The optimizer is torch's, so its state is where every torch tool looks for it. `step` adds what a
long run needs without ever waiting for the device: the norm of the global gradient, clipping, and a
step with a non-finite loss or gradient that changes nothing on any process.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.profiler import record_function

from llama.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(cfg: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of a step, counted from 0, in a run of `steps`.

    Rises linearly to `cfg.lr` in the last warm-up step, then falls to exactly
    `cfg.lr * cfg.min_lr_ratio` in the last step of the run.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    # share of the way down, 0 in the last step of the warm-up and 1 in the last step of the run
    done = (step - cfg.warmup_steps + 1) / max(steps - cfg.warmup_steps, 1)
    if cfg.schedule == "cosine":
        left = (1 + math.cos(math.pi * done)) / 2
    elif cfg.schedule == "linear":
        left = 1 - done
    else:
        decay_steps = min(math.ceil(cfg.decay_ratio * steps), steps - cfg.warmup_steps)
        left = min(1, (steps - 1 - step) / max(decay_steps, 1))
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left)


def build(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over a model that holds its final parameters, with the moments already in place.

    All matrices decay, embeddings included; the gains of the norms do not.
    """
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
    for p in parameters:
        moments = {name: torch.zeros_like(p) for name in MOMENTS}
        count = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": count, **moments}
    return optimizer


@torch.no_grad()
@record_function("optimizer")
def step(
    optimizer: torch.optim.Optimizer,
    lr: float,
    clip: float,
    grad_factor: Tensor | float = 1.0,
    loss: Tensor | None = None,
    judge: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One update with gradients times `grad_factor`, clipped to norm `clip`.

    Returns the norm before clipping and 1.0 where it or the `loss` is not finite, else 0.0: then
    parameters, moments and step counts keep their bits. `loss` must be the same on all processes.
    A `judge` is given the norm and decides in their place.
    """
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"] if p.grad is not None]
    norm = global_norm([p.grad for p in parameters]) * grad_factor
    finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
    # the fused kernel divides gradients by this while it reads them anyway
    grad_scale = ((norm + 1e-6) / clip).clamp(min=1.0) / grad_factor
    found_inf = judge(norm) if judge else 1.0 - finite.float()
    for group in groups:
        params = [p for p in group["params"] if p.grad is not None]
        states, (beta1, beta2) = [optimizer.state[p] for p in params], group["betas"]
        # on local shards: the update is elementwise, DTensor would only add its dispatch
        weights, grads = [local(p) for p in params], [local(p.grad) for p in params]
        means, squares = ([local(state[name]) for state in states] for name in MOMENTS)
        adamw(
            weights, grads, means, squares, [], [state["step"] for state in states],
            fused=True, grad_scale=grad_scale.float(), found_inf=found_inf, amsgrad=False,
            maximize=False, beta1=beta1, beta2=beta2, lr=lr, eps=group["eps"],
            weight_decay=group["weight_decay"],
        )  # fmt: skip
    return norm, found_inf


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(grads: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together, float32, the same on all processes.

    Squares are summed over the mesh dimensions that shard a tensor; replicas count once.
    """
    by_sharding: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for grad in grads:
        sharding: tuple[Any, ...] = ()
        if isinstance(grad, DTensor):
            assert not any(p.is_partial() for p in grad.placements), "gradient not yet reduced"
            dims = tuple(i for i, p in enumerate(grad.placements) if not p.is_replicate())
            sharding = (grad.device_mesh, dims)
        by_sharding[sharding].append(local(grad))
    totals = []
    for sharding, tensors in by_sharding.items():
        if tensors[0].device.type == "cpu":
            # one float32 sum over a tensor is 1.4 % off at (32000, 4096), one over rows 2e-7
            tensors = [torch.linalg.vector_norm(t, dim=-1, dtype=torch.float32) for t in tensors]
        norms = torch._foreach_norm(tensors, 2.0, dtype=torch.float32)
        squares = torch.stack(norms).square().sum()
        if sharding:
            mesh, dims = sharding
            for dim in dims:
                dist.all_reduce(squares, group=mesh.get_group(dim))
        totals.append(squares)
    return torch.stack(totals).sum().sqrt()


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Both moments of every parameter by name, sharded like it: what a checkpoint stores."""
    return {
        f"{moment}.{name}": optimizer.state[p][moment]
        for name, p in model.named_parameters()
        for moment in MOMENTS
    }


def step_count(optimizer: torch.optim.Optimizer) -> int:
    """Updates made so far; skipped steps do not count. Waits for the device."""
    # at once: each alone would wait for the device
    counts = set(torch.stack([state["step"] for state in optimizer.state.values()]).int().tolist())
    assert len(counts) == 1, f"parameters have seen different numbers of updates: {counts}"
    return counts.pop()


def set_step_count(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Continue from this many updates, which set the bias correction of the moments."""
    for state in optimizer.state.values():
        state["step"].fill_(count)
