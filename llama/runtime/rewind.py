"""What the loop asks after every step: are its numbers right, and do all processes hold the same?

In: a state whose guard has judged. Out: a warning, a rewind, or the end of the run in one sentence.
A rewind is decided by rank 0 and is in `rewinds.json` before anything is done about it; resuming
carries out what is written there (llama/runtime/state.py), so that a kill undoes nothing.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from llama import files
from llama.cli import UserError
from llama.data import schedule
from llama.data.loader import Loader
from llama.runtime import checkpoint, replicas
from llama.runtime.state import State, resume


def batches(state: State, reader: Loader, *how: Any) -> Iterator[Any]:
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
    every, last = state.cfg.guard.replicas_every, state.step == state.steps
    state.pace.mark()
    if every and (state.step % every == 0 or last):
        replicas.compare(state)
    return any(reading and _act(state, step, reading) for step, reading in readings(state))


def readings(state: State) -> list[tuple[int, list[float] | None]]:
    """What the guard saw of the step before; after the last step of the run of that one too."""
    steps = [state.step - 1, *([state.step] if state.step == state.steps else [])]
    return [(step, state.guard.read()) for step in steps]


def _act(state: State, step: int, seen: list[float]) -> bool:
    cfg, here = state.cfg.guard, state.world
    loss, norm, loss_limit, norm_limit, spike, unchanged = seen
    word = "changed nothing" if unchanged else "is a sudden spike"
    what = (
        f"step {step} {word}: loss {loss:.4g} and gradient norm {norm:.4g}, "
        f"limits {loss_limit:.4g} and {norm_limit:.4g}"
    )
    if spike and here.leads:
        # the disk may be full, and the oldest just on its way out
        with suppress(OSError):
            for _, path in [found for found in checkpoint.steps(state.run) if found[0] < step][-1:]:
                checkpoint.protect(path, what)
    decision = None
    if unchanged >= cfg.patience:
        raise UserError(
            f"{what}, the last of {unchanged:.0f} steps (guard.patience): go on from a checkpoint "
            "before them with a lower --optim.lr and --checkpoint.accept_changes true, or look "
            "for a broken device"
        )
    if spike and cfg.spike == "rewind":
        decision, note = here.broadcast(_decide(state, step) if here.leads else None)
        what += f"; {note}"
        if decision and decision["times"] > cfg.rewinds:
            raise UserError(what)
    if spike or unchanged:
        here.say(f"WARNING: {what}")
    return decision is not None and resume(state)


def _decide(state: State, step: int) -> tuple[dict[str, Any] | None, str]:
    """Write down where to go back to and what to pass over; None, and why not, where it cannot."""
    cfg, past = state.cfg.guard, schedule.rewinds(state.run)
    before = [n for n, _ in checkpoint.steps(state.run) if n < step and _serves(state, n)]
    if not before:
        return None, "no rewind: there is no checkpoint of this data before it (checkpoint.every)"
    to = max((n for n in before if n <= step - cfg.rewind_steps), default=min(before))
    # steps of the order count from 0; only what one segment drew can be named
    bad, segment = step - 1, state.order.segment(step - 1)
    later = [s.first_step for s in state.order.segments if s.first_step > bad]
    first = max(bad - cfg.skip_steps // 2, to, segment.first_step)
    end = min([bad + cfg.skip_steps - cfg.skip_steps // 2, *later])
    segments = schedule.skip(state.cfg, state.order, first, end).segments
    times = 1 + sum(rewind["to"] == to for rewind in past)
    decision = {"branch": len(past) + 1, "spike": step, "to": to, "times": times}
    decision |= {"skipped": [first, end], "segments": segments}
    decision["data"] = state.fingerprints()["data"]
    if times > cfg.rewinds:
        return decision, (
            f"guard.rewinds to step {to} are used up: take another --optim.lr with "
            "--checkpoint.accept_changes true, or more --guard.skip_steps"
        )
    try:
        files.write_json(state.run / schedule.REWINDS, [*past, decision])
    except OSError as error:
        return None, f"no rewind: {schedule.REWINDS} cannot be written: {error.strerror}"
    passed = f"passes over the batches of steps {first + 1} to {end}"
    return decision, f"back to step {to}, branch {len(past) + 1} {passed}"


def _serves(state: State, step: int) -> bool:
    """Whether the order from a checkpoint on is the present one: its data was not changed since."""
    order = state.order
    here = [asdict(segment) for segment in order.segments]
    again, _ = schedule.go_on(state.cfg, state.sources, here, step, set())
    began = any(segment.first_step == step for segment in order.segments)
    # what cannot be read is no place to go back to
    with suppress(UserError):
        saved = checkpoint.read_state(checkpoint.path_of(state.run, step))
        same = saved["fingerprints"]["data"] == state.fingerprints()["data"]
        return again.segments == order.segments and (began or same)
    return False
