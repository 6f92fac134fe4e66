"""What the loop asks after every step: are its numbers right, and do all processes hold the same?

In: a state whose guard has judged. Out: a warning, a rewind, or the end of the run in one sentence.
A rewind is decided by rank 0 and is in `rewinds.json` before anything is done about it; resuming
carries out what is written there (llama/runtime/state.py), so that a kill undoes nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch

from llama import files
from llama.cli import UserError
from llama.data import schedule
from llama.data.loader import Loader
from llama.runtime import checkpoint, replicas
from llama.runtime.guard import Reading
from llama.runtime.state import State, resume


def batches(
    state: State, reader: Loader, *how: Any
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """`reader.steps` from the state's step to the end of the run, again after each rewind."""
    order = None
    while order is not state.order:
        order = reader.order = state.order
        for batch in reader.steps(state.step, state.steps, *how):
            if order is not state.order:
                break
            yield batch


def rewound(state: State) -> bool:
    """Act on what the guard saw, of the step before while this one runs, and compare replicas.

    Returns whether the state is an older one now. Raises `UserError` where the run must end.
    """
    state.pace.mark()
    every, last = state.cfg.guard.replicas_every, state.step == state.steps
    if every and (state.step % every == 0 or last):
        replicas.compare(state)
    seen = [(state.step - 1, state.guard.read())]
    if last:
        seen.append((state.step, state.guard.read()))
    return any(reading and _act(state, step, reading) for step, reading in seen)


def _act(state: State, step: int, seen: Reading) -> bool:
    cfg, here = state.cfg.guard, state.world
    if seen.unchanged >= cfg.patience:
        raise UserError(
            f"the last {seen.unchanged:.0f} steps up to step {step} changed nothing ({seen}): go "
            "on from a checkpoint before them with a lower --optim.lr and "
            "--checkpoint.accept_changes true, or look for a broken device (guard.patience)"
        )
    if seen.unchanged:
        here.say(f"WARNING: step {step} changed nothing: {seen}")
    elif seen.spike and cfg.spike == "rewind":
        return _rewind(state, step, seen)
    elif seen.spike:
        here.say(f"WARNING: spike at step {step}: {seen}")
    return False


def _rewind(state: State, step: int, seen: Reading) -> bool:
    here = state.world
    decision, problem = here.broadcast(_decide(state, step) if here.leads else None)
    if problem and not decision:
        here.say(f"WARNING: spike at step {step}: {seen}; no rewind: {problem}")
        return False
    if problem:
        raise UserError(f"spike at step {step}: {seen}; {problem}")
    first, end = decision["skipped"]
    here.say(
        f"WARNING: spike at step {step}: {seen}; back to step {decision['to']}, branch "
        f"{decision['branch']} passes over the batches of steps {first + 1} to {end}"
    )
    return resume(state)


def _decide(state: State, step: int) -> tuple[dict[str, Any] | None, str | None]:
    """Write down where to go back to and what to pass over; or say why not."""
    cfg, past = state.cfg.guard, schedule.rewinds(state.run)
    before = [number for number, _ in checkpoint.steps(state.run) if number < step]
    if not before:
        return None, "there is no checkpoint before it (checkpoint.every)"
    to = max((n for n in before if n <= step - cfg.rewind_steps), default=min(before))
    if sum(rewind["to"] == to for rewind in past) >= cfg.rewinds:
        return past[-1], (
            f"the run was rewound to step {to} {cfg.rewinds} times (guard.rewinds): take another "
            "--optim.lr with --checkpoint.accept_changes true, or a larger --guard.skip_steps"
        )
    # steps of the order count from 0; only what one segment drew can be named
    bad, segment = step - 1, state.order.segment(step - 1)
    later = [s.first_step for s in state.order.segments if s.first_step > bad]
    first = max(bad - cfg.skip_steps // 2, to, segment.first_step)
    end = min([bad + cfg.skip_steps - cfg.skip_steps // 2, *later])
    order = schedule.skip(state.cfg, state.order, first, end)
    decision = {
        "branch": len(past) + 1,
        "spike": step,
        "to": to,
        "skipped": [first, end],
        "segments": order.segments,
    }
    try:
        files.write_json(state.run / schedule.REWINDS, [*past, decision])
    except OSError as error:
        return None, f"{schedule.REWINDS} cannot be written: {error.strerror}"
    return decision, None
