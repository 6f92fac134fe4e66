"""Everything a run is between two steps, saved and resumed whole.

Tensors (weights, moments) go through llama.runtime.checkpoint by name; all else is JSON. Resuming
refuses another model, tokenizer or data: training on by accident is worse than stopping.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from llama import config, optim
from llama.cli import UserError
from llama.config import Config, ModelConfig
from llama.data import order, schedule, shards
from llama.parallel.fsdp import Place
from llama.runtime import background, checkpoint
from llama.runtime.guard import Guard
from llama.runtime.stragglers import Pace
from llama.runtime.world import World


@dataclass
class State:
    """A run between two steps."""

    cfg: Config
    world: World
    run: Path
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    sources: dict[str, shards.Source]
    valid: dict[str, shards.Source]
    order: order.Order
    steps: int
    place: Place
    # processes the gradients are averaged over; windows, dtype and attention of a forward pass
    averaged_over: int
    micro_batch: int
    dtype: torch.dtype
    backend: str
    # (sum of token losses, tokens) per source since the last log line, float64
    window: torch.Tensor
    guard: Guard
    pace: Pace = field(default_factory=Pace)
    step: int = 0
    # a row of metrics whose validation a signal cut short: the next start does it
    unvalidated: dict[str, Any] | None = None
    saver: background.Saver = field(default_factory=background.Saver)
    # of steps that are recorded, until it is written
    recording: ExitStack = field(default_factory=ExitStack)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.order.tokens(self.step)

    @property
    def tokenizer_sha256(self) -> str:
        return next(iter(self.sources.values())).tokenizer_sha256

    @property
    def eos_id(self) -> int:
        return next(iter(self.sources.values())).eos_id

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint stores as tensors: weights and moments by name."""
        weights = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        return weights | optim.state_tensors(self.optimizer, self.model)

    def fingerprints(self) -> dict[str, Any]:
        """What must not change under a run: model shape, tokenizer, token shards."""
        return {
            "model": config.to_dict(self.cfg)["model"],
            "tokenizer": self.tokenizer_sha256,
            "data": {name: source.manifest_sha256 for name, source in self.sources.items()},
        }


@dataclass(frozen=True)
class Step:
    """What one step measured; tensors stay on the device until someone reads them."""

    loss: torch.Tensor
    grad_norm: torch.Tensor


def contents(state: State) -> dict[str, Any]:
    """What a checkpoint says beside its tensors."""
    return {
        "format": 1,
        "step": state.step,
        "tokens": state.tokens,
        "adam_steps": optim.step_count(state.optimizer),
        "segments": state.order.segments,
        "branch": state.guard.branch,
        "guard": state.guard.state(),
        "window": dict(zip(state.order.names, state.window.tolist(), strict=True)),
        "unvalidated": state.unvalidated,
        "rng": torch.get_rng_state().numpy().tobytes().hex(),
        "fingerprints": state.fingerprints(),
        "config": config.to_dict(state.cfg),
        "made_by": made_by(state),
    }


def made_by(state: State) -> dict[str, Any]:
    """What the bits of a step hang on besides the configuration."""
    return {
        "processes": state.world.size,
        "device": state.world.chip,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "micro_batch": state.micro_batch,
        "attention": state.backend,
    }


@record_function("save")
def save(state: State, wait: bool = True) -> bool:
    """Write a checkpoint of this step; a failure is said, and training may go on.

    Without `wait` in the background, as `checkpoint.background` says; False if it failed by now.
    """
    every, options = contents(state), state.cfg.checkpoint
    return state.saver.save(
        state.run, state.step, state.tensors(), every, state.world, options, wait
    )


def resume(state: State) -> bool:
    """Load the newest valid checkpoint of the run; False where there is none."""
    cfg, here = state.cfg, state.world
    state.saver.finish()
    if here.leads:
        _settle(state.run, cfg.checkpoint.keep)
    found = checkpoint.choose(state.run, here)
    if found is None:
        return False
    # not a rewind's
    if cfg.checkpoint.resume == "never" and not state.step:
        raise UserError(
            f"{state.run} has checkpoints and checkpoint.resume is never: use --name other"
        )
    restore(state, found)
    here.say(f"resuming {state.run} from step {state.step} ({found.name})")
    return True


def restore(state: State, found: Path) -> None:
    """Make the state that of a checkpoint; all ranks call it together."""
    cfg, here = state.cfg, state.world
    rewinds = here.broadcast(schedule.rewinds(state.run) if here.leads else None)
    saved = schedule.rewound(checkpoint.read_state(found), rewinds)
    changed = _refuse_changes(state, saved, found)
    checkpoint.load(found, state.tensors(), here)
    optim.set_step_count(state.optimizer, saved["adam_steps"])
    rng = bytearray.fromhex(saved["rng"])
    torch.set_rng_state(torch.frombuffer(rng, dtype=torch.uint8).clone())
    state.step = saved["step"]
    # where a rewind came later, it was made up for in the branch before
    state.unvalidated = saved.get("unvalidated") if saved.get("branch", 0) == len(rewinds) else None
    state.order, unread = schedule.go_on(cfg, state.sources, saved["segments"], state.step, changed)
    judged = saved.get("guard") and {"span": saved["config"]["guard"]["window"]} | saved["guard"]
    state.guard = Guard(cfg.guard, here, len(rewinds), judged)
    for name, windows in unread.items():
        here.say(f"{name} starts a new epoch: {windows:,} windows of the last one stay unread")
    rows = [saved["window"].get(name, [0.0, 0.0]) for name in state.order.names]
    state.window = torch.tensor(rows, dtype=torch.float64, device=here.device)


def _settle(run: Path, keep: int) -> None:
    """Carry out the last rewind: a kill does not undo what was decided."""
    if not checkpoint.steps(run):
        # somebody removed the checkpoints: the run begins anew
        (run / schedule.REWINDS).unlink(missing_ok=True)
    for last in schedule.rewinds(run)[-1:]:
        checkpoint.abandon(run, last["to"], last["branch"], keep)


def _refuse_changes(state: State, saved: dict[str, Any], found: Path) -> set[str]:
    """Refuse what this checkpoint cannot be trained on with; returns the sources that changed."""
    old, new, accept = saved["fingerprints"], state.fingerprints(), state.cfg.checkpoint
    # a key that is newer than the checkpoint has there the value that changes nothing
    model = asdict(ModelConfig()) | old["model"]
    if lines := config.differences(model, new["model"], "model."):
        raise UserError(f"{found} is of another model ({'; '.join(lines)}): use --name other")
    if old["tokenizer"] != new["tokenizer"]:
        raise UserError(
            f"{found} was trained with another tokenizer (sha256 {old['tokenizer'][:12]}) than "
            f"{state.cfg.data.path} was made with ({new['tokenizer'][:12]}): use --name other"
        )
    changed = {n for n, digest in new["data"].items() if old["data"].get(n, digest) != digest}
    if changed and not accept.accept_changes:
        raise UserError(
            f"the shards of {', '.join(sorted(changed))} in {state.cfg.data.path} are not those of "
            f"{found}: restore them, use --name other, or --checkpoint.accept_changes true"
        )
    if saved["step"] >= state.steps:
        raise UserError(
            f"{state.run} is finished, all {state.steps} steps are trained: use --name other for a "
            "new run, or more --train.tokens with --checkpoint.accept_changes true"
        )
    return changed
