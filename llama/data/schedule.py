"""The data order that a configuration asks for: from the start, or going on from a checkpoint.

A batch ramp is a segment per batch size. A run continued with other weights, batches, window length
or shards gets new segments from its present step on, and every source goes on where it stands.
"""

from pathlib import Path
from typing import Any

from llama import files
from llama.config import Config
from llama.data.order import Order, from_json, integer_weights
from llama.data.shards import Source

REWINDS = "rewinds.json"


def plan(cfg: Config, sources: dict[str, Source]) -> Order:
    """The order of a new run."""
    (_, windows), *_ = _phases(cfg)
    order = Order.start(cfg.seed, batch_windows=windows, **_common(cfg, sources))
    return _with_ramp(order, cfg, 0)


def go_on(
    cfg: Config,
    sources: dict[str, Source],
    saved: list[dict[str, Any]],
    step: int,
    changed: set[str],
) -> tuple[Order, dict[str, int]]:
    """The order of a resumed run, and the windows that stay unread where a source starts anew.

    `saved` are the checkpoint's segments. They are kept as they are when the configuration still
    asks for them; `changed` names the sources whose shards are others than before.
    """
    past, wanted = Order(cfg.seed, from_json(saved)), plan(cfg, sources)
    if not changed and _ahead(past, step) == _ahead(wanted, step):
        return past, {}
    windows, common = wanted.segment(step).batch_windows, _common(cfg, sources)
    order, unread = past.append(step, batch_windows=windows, restart=changed, **common)
    return _with_ramp(order, cfg, step), unread


def skip(cfg: Config, order: Order, first: int, end: int) -> Order:
    """The order that passes over the batches of steps [first, end) of one segment."""
    samples = order.position(first), order.position(end)
    return _with_ramp(order.append(first, skipped=[samples])[0], cfg, first)


def rewinds(run: Path) -> Any:
    """Every rewind that a run has decided on, in order; see llama/runtime/rewind.py."""
    return files.read_json(run / REWINDS) if (run / REWINDS).exists() else []


def rewound(saved: dict[str, Any], rewinds: list[Any]) -> dict[str, Any]:
    """A checkpoint's state with the order that holds: the last rewind's, if that was not saved yet.

    From where the rewind leads to, that order was made for the shards which the rewind names.
    """
    if not rewinds or saved.get("branch", 0) >= rewinds[-1]["branch"]:
        return saved
    last, step, prints = rewinds[-1], int(saved["step"]), saved["fingerprints"]
    data = {**prints["data"], **(last.get("data", {}) if step >= last["to"] else {})}
    now = {"segments": last["segments"], "fingerprints": {**prints, "data": data}}
    return {**saved, **now, "step": min(step, last["to"])}


def _phases(cfg: Config) -> list[tuple[int, int]]:
    """(first step, windows per batch) of the ramp and of the full batch after it."""
    found, first_step = [], 0
    for batch_tokens, steps in cfg.train.batch_ramp:
        found.append((first_step, batch_tokens // cfg.data.seq_len))
        first_step += steps
    return [*found, (first_step, cfg.train.batch_tokens // cfg.data.seq_len)]


def _with_ramp(order: Order, cfg: Config, step: int) -> Order:
    """The order with a segment for each phase that begins after a step."""
    for first_step, windows in _phases(cfg):
        if first_step > step:
            order, _ = order.append(first_step, batch_windows=windows)
    return order


def _common(cfg: Config, sources: dict[str, Source]) -> dict[str, Any]:
    assert isinstance(cfg.data.mixture, dict)
    length = cfg.data.seq_len
    weights = integer_weights(cfg.data.mixture)
    windows = {name: source.n_windows(length) for name, source in sources.items()}
    return {"seq_len": length, "weights": weights, "windows": windows}


def _ahead(order: Order, step: int) -> list[tuple[Any, ...]]:
    """What an order does from a step on, segment by segment."""
    ahead = [order.segment(step), *(s for s in order.segments if s.first_step > step)]
    found: list[tuple[Any, ...]] = []
    for s in ahead:
        sizes = {name: s.windows[name] for name in s.weights}
        layout = s.batch_windows, s.seq_len, s.weights, sizes
        # a segment that only passes over batches goes on as the one before
        if not found or found[-1][1:] != layout:
            found.append((max(s.first_step, step), *layout))
    return found
