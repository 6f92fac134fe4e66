"""Bad numbers in synthetic curves and in a step."""

import json
import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from made_guard import batch, bits
from torch.utils._python_dispatch import TorchDispatchMode

import train
from llama import config
from llama.runtime.guard import Guard

pytestmark = pytest.mark.faults
ALONE = SimpleNamespace(size=1, device=torch.device("cpu"), leads=True)


# -- the judge -------------------------------------------------------------------------------------


def judged(losses: Any, norms: Any, spike: str = "off") -> tuple[np.ndarray, Guard]:
    """Which steps of two curves are called spikes."""
    guard = Guard(config.GuardConfig(spike=spike), ALONE)  # type: ignore[arg-type]
    found, before = [], 0.0
    for loss, norm in zip(losses, norms, strict=True):
        guard.judge(torch.tensor(loss), torch.tensor(norm))
        found.append(float(guard.counts[0]) > before)
        before = float(guard.counts[0])
    return np.array(found), guard


def curve(draws: np.random.Generator, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(loss, gradient norm, loss without noise) of a clean run that falls fast, then slowly."""
    t = np.arange(steps)
    fall = 8.5 * np.exp(-t / draws.uniform(5, 150)) if draws.random() < 0.5 else 8 / np.sqrt(1 + t)
    base = 2 + fall + 0.5 * (1 + t / 200) ** -0.3
    loss = base + draws.uniform(0.002, 0.05) * draws.standard_normal(steps)
    norm = (0.3 + 3 * np.exp(-t / draws.uniform(5, 150))) * (
        1 + draws.uniform(0.02, 0.2) * draws.standard_normal(steps)
    )
    return loss, norm, base


def test_a_clean_falling_curve_raises_no_alarm(
    rng: random.Random, scale: Callable, score: Callable
) -> None:
    draws = np.random.default_rng(rng.randrange(2**32))
    steps, alarms = 0, 0
    for _ in range(scale(4, 40)):
        loss, norm, _ = curve(draws, 1000)
        alarms += int(judged(loss, norm)[0].sum())
        steps += 1000
    score("spikes.steps", steps)
    score("spikes.alarms", alarms, f"<= {steps / 1e4}")
    assert alarms / steps < 1e-4, (alarms, steps)


@pytest.mark.parametrize("length", [20, 60, 120, 200])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_fall_that_ends_is_no_spike(length: int, noise: float, rng: random.Random) -> None:
    draws = np.random.default_rng(rng.randrange(2**32))
    t = np.arange(length + 200)
    loss = np.maximum(10 - 8 * t / length, 2) + noise * draws.standard_normal(len(t))
    assert not judged(loss, np.ones(len(t)))[0].any()


def test_every_spike_beyond_six_sigma_is_found(
    rng: random.Random, scale: Callable, score: Callable
) -> None:
    """Of the noise where the curve is flat, and of the whole window where it falls."""
    draws = np.random.default_rng(rng.randrange(2**32))
    for _ in range(scale(3, 30)):
        loss, norm, _ = curve(draws, 1200)
        places = np.arange(140 + draws.integers(100), 1200, 140)
        for place in places:
            values = (loss, norm)[draws.integers(2)]
            window = values[place - 128 : place]
            values[place] = window.mean() + draws.choice([6.01, 7, 20]) * window.std(ddof=1)
        found, _ = judged(loss, norm)
        score("spikes", len(places))
        score("spikes.missed", int((~found[places]).sum()), "0")
        assert found[places].all() and found.sum() == len(places)


def test_bad_numbers_never_enter_the_window_and_a_spike_hides_no_other(rng: random.Random) -> None:
    draws = np.random.default_rng(rng.randrange(2**32))
    loss, norm = 3 + 0.01 * draws.standard_normal(200), 1 + 0.01 * draws.standard_normal(200)
    for place, bad in ((150, math.nan), (151, math.inf), (152, -math.inf)):
        (loss, norm)[rng.randrange(2)][place] = bad
    loss[160], norm[161], loss[162] = 30, 1000, 30
    found, guard = judged(loss, norm)
    assert np.flatnonzero(found).tolist() == [160, 161, 162]
    assert guard.history[-64:].isfinite().all() and float(guard.history.max()) < 4
    assert guard.counts.tolist() == [3, 3, 0]
    _, skipping = judged(loss, norm, "skip")
    assert skipping.counts.tolist() == [3, 6, 0]


def test_a_lasting_change_is_accepted() -> None:
    loss = np.where(np.arange(400) < 200, 3.0, 4.0) + 0.01 * np.sin(np.arange(400))
    found, _ = judged(loss, np.ones(400))
    assert found[200] and not found[300:].any()


def test_the_window_is_the_same_after_json(rng: random.Random) -> None:
    draws = np.random.default_rng(rng.randrange(2**32))
    loss, norm, _ = curve(draws, 300)
    loss[250] = 40
    cut = int(draws.integers(1, 299))
    whole, _ = judged(loss, norm)
    _, guard = judged(loss[:cut], norm[:cut])
    saved = orjson.loads(orjson.dumps(guard.state()))
    again = Guard(guard.cfg, ALONE, saved=saved)  # type: ignore[arg-type]
    for at in range(cut, 300):
        before = float(again.counts[0])
        again.judge(torch.tensor(loss[at]), torch.tensor(norm[at]))
        assert (float(again.counts[0]) > before) == whole[at]


def test_a_longer_window_judges_on_with_what_the_last_one_had(rng: random.Random) -> None:
    draws = np.random.default_rng(rng.randrange(2**32))
    loss, norm, _ = curve(draws, 400)
    loss[[131, 250]] = 40
    _, guard = judged(loss[:130], norm[:130])
    longer = config.GuardConfig(window=192)

    def on(guard: Guard, first: int, last: int) -> list[float]:
        for at in range(first, last):
            guard.judge(torch.tensor(loss[at]), torch.tensor(norm[at]))
        return guard.counts.tolist()

    saved = {"span": 128} | orjson.loads(orjson.dumps(guard.state()))
    guard = Guard(longer, ALONE, saved=saved)  # type: ignore[arg-type]
    assert on(guard, 130, 140)[0] == 1
    # interrupted or not, it judges alike
    saved = orjson.loads(orjson.dumps(guard.state()))
    again = Guard(longer, ALONE, saved=saved)  # type: ignore[arg-type]
    assert guard.span == again.span == 138
    on(guard, 140, 240), on(again, 140, 240)
    assert guard.limits().tolist() == again.limits().tolist()
    assert guard.state() == again.state() and "span" not in guard.state()
    assert guard.span == 192 and on(guard, 240, 260)[0] == 2
    # one that was not full waits for the longer one
    few = {"span": 128} | judged(loss[:20], norm[:20])[1].state()
    assert Guard(longer, ALONE, saved=few).span == 192  # type: ignore[arg-type]


def test_numbers_are_read_one_step_late() -> None:
    guard = Guard(config.GuardConfig(), ALONE)  # type: ignore[arg-type]
    guard.judge(torch.tensor(1.0), torch.tensor(2.0))
    assert guard.read() is None
    guard.judge(torch.tensor(3.0), torch.tensor(math.nan))
    first = guard.read()
    assert first and (first[:2], first[-1]) == ([1.0, 2.0], 0.0)
    # what was not read yet goes on with the checkpoint
    saved = orjson.loads(orjson.dumps(guard.state()))
    second = Guard(guard.cfg, ALONE, saved=saved).read()  # type: ignore[arg-type]
    assert second and second[0] == 3.0 and second[1] > 1e300 and second[-1] == 1.0


class _Launches(TorchDispatchMode):
    """Counts operations that are kernels on a GPU, or copies."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # a view launches nothing
        views = func.is_view or "lift_fresh" in str(func)
        self.count += not views
        return func(*args, **(kwargs or {}))


def test_judging_a_step_takes_few_kernels() -> None:
    _, guard = judged(np.linspace(3, 2, 200), np.ones(200))
    loss, norm = torch.tensor(2.0, dtype=torch.float64), torch.tensor(1.0)
    with _Launches() as launched:
        guard.judge(loss, norm)
    # 54 once
    assert 0 < launched.count <= 36


# -- a step ----------------------------------------------------------------------------------------


def unchanged(state: train.State, before: dict[str, torch.Tensor]) -> bool:
    now = bits(state)
    return all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_a_spike_to_be_skipped_changes_no_bit(inside: train.State) -> None:
    for _ in range(17):
        train.step(inside, *batch(inside))
    before, window = bits(inside), inside.window.clone()
    weight = inside.model.output.weight  # type: ignore[union-attr]
    hook = weight.register_hook(lambda grad: 1000 * grad)
    train.step(inside, *batch(inside))
    assert unchanged(inside, before) and torch.equal(inside.window, window)
    hook.remove()
    assert inside.guard.counts.tolist() == [1, 1, 1]
    train.step(inside, *batch(inside))
    assert not unchanged(inside, before) and inside.guard.counts.tolist() == [1, 1, 0]


def test_a_bad_parameter_changes_no_bit(inside: train.State, rng: random.Random) -> None:
    train.step(inside, *batch(inside))
    with torch.no_grad():
        victim = rng.choice([p for p in inside.model.parameters() if p.dim() > 1])
        victim[: len(victim)] = rng.choice([math.nan, math.inf])
    before = {name: t.nan_to_num(7, 8, 9) for name, t in bits(inside).items()}
    train.step(inside, *batch(inside))
    now = {name: t.nan_to_num(7, 8, 9) for name, t in bits(inside).items()}
    assert all(torch.equal(now[name], t) for name, t in before.items())
    assert inside.guard.counts.tolist() == [0, 1, 1]


def test_a_batch_without_targets_makes_no_nan(
    inside: train.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = train.loader.drop_boundary_targets
    inside.cfg.data.boundary_loss = False
    monkeypatch.setattr(
        train.loader, "drop_boundary_targets", lambda i, t, eos: torch.full_like(t, -100)
    )
    measured = train.step(inside, *batch(inside))
    assert float(measured.loss) == 0 and float(measured.grad_norm) == 0
    assert all(t.isfinite().all() for t in bits(inside).values())
    assert inside.guard.history.isnan().all(), "it says nothing about what is usual"
    monkeypatch.setattr(train.loader, "drop_boundary_targets", drop)
    assert float(train.step(inside, *batch(inside)).loss) > 0


def test_what_flipped_bits_do_to_a_step(
    inside: train.State, rng: random.Random, scale: Callable, score: Callable
) -> None:
    """One bit of a weight, a gradient or an activation: caught by the guard, or said honestly.

    What is not finite never reaches a weight; a lower bit may well pass for noise.
    """
    inside.cfg.optim.lr = 1e-3
    for _ in range(20):
        train.step(inside, *batch(inside))
    kept, state = bits(inside), json.dumps(inside.guard.state())
    counted, caught = dict.fromkeys(("weight", "gradient", "activation"), 0), 0
    high = {"flips": 0, "caught": 0}
    data = batch(inside)

    def flip(tensor: torch.Tensor, bit: int) -> torch.Tensor:
        flat = tensor.detach().clone().contiguous().view(-1)
        integers = flat.view(torch.int32)
        integers[rng.randrange(len(integers))] ^= -(2**31) if bit == 31 else 1 << bit
        return flat.view(tensor.shape)

    for number in range(scale(24, 200)):
        kind, bit = list(counted)[number % 3], 30 if number % 4 == 0 else rng.randrange(32)
        victim = rng.choice(list(inside.model.parameters()))
        hooks = []
        if kind == "weight":
            with torch.no_grad():
                victim.copy_(flip(victim, bit))
        elif kind == "gradient":
            hooks.append(victim.register_hook(lambda grad, bit=bit: flip(grad, bit)))
        else:
            block = rng.choice(list(inside.model.layers))  # type: ignore[union-attr, arg-type]
            hooks.append(
                block.register_forward_hook(
                    lambda m, i, out, bit=bit: out + (flip(out, bit) - out.detach())
                )
            )
        before = bits(inside)
        train.step(inside, *data)
        for hook in hooks:
            hook.remove()
        spikes, skipped, _ = inside.guard.counts.tolist()
        counted[kind] += 1
        caught += bool(spikes or skipped)
        if skipped:
            assert all(
                torch.equal(t.nan_to_num(7), before[n].nan_to_num(7))
                for n, t in bits(inside).items()
            )
        if bit == 30:  # makes a small number huge
            high["flips"] += 1
            high["caught"] += bool(spikes or skipped)
        with torch.no_grad():
            for name, tensor in inside.tensors().items():
                tensor.copy_(kept[name])
        train.optim.set_step_count(inside.optimizer, int(kept["adam"]))
        inside.guard = Guard(inside.guard.cfg, inside.world, saved=json.loads(state))
        inside.guard.counts.zero_()
    print(counted, "caught", caught, "of the highest exponent bit", high)
    score("sdc.flips", sum(counted.values()))
    score("sdc.caught", caught)
    score("sdc.high", high["flips"])
    score("sdc.high.caught", high["caught"])
