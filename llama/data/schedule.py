"""The data order that a configuration asks for: from the start, or going on from a checkpoint.

A batch ramp is a segment per batch size. A run continued with other weights, batches, window length
or shards gets new segments from its present step on, and every source goes on where it stands.
"""

from typing import Any

from llama.config import Config
from llama.data.order import Order, Segment, from_json, integer_weights
from llama.data.shards import Source


def phases(cfg: Config) -> list[tuple[int, int]]:
    """(first step, windows per batch) of the ramp and of the full batch after it."""
    found, first_step = [], 0
    for batch_tokens, steps in cfg.train.batch_ramp:
        found.append((first_step, batch_tokens // cfg.data.seq_len))
        first_step += steps
    return [*found, (first_step, cfg.train.batch_tokens // cfg.data.seq_len)]


def plan(cfg: Config, sources: dict[str, Source]) -> Order:
    """The order of a new run."""
    (_, windows), *later = phases(cfg)
    order = Order.start(cfg.seed, batch_windows=windows, **_common(cfg, sources))
    for first_step, windows in later:
        order, _ = order.append(first_step, batch_windows=windows)
    return order


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
    now, *later = [s for s in _ahead(wanted, step)]
    order, unread = past.append(
        step, batch_windows=now[1], restart=changed, **_common(cfg, sources)
    )
    for first_step, windows, *_ in later:
        order, _ = order.append(first_step, batch_windows=windows)
    return order, unread


def _common(cfg: Config, sources: dict[str, Source]) -> dict[str, Any]:
    assert isinstance(cfg.data.mixture, dict)
    length = cfg.data.seq_len
    return {
        "seq_len": length,
        "weights": integer_weights(cfg.data.mixture),
        "windows": {name: source.n_windows(length) for name, source in sources.items()},
    }


def _ahead(order: Order, step: int) -> list[tuple[int, int, int, dict[str, int], dict[str, int]]]:
    """What an order does from a step on: (first step, batch, T, weights, windows) per segment."""
    ends = [s.first_step for s in order.segments[1:]] + [None]

    def sizes(s: Segment) -> dict[str, int]:
        return {name: s.windows[name] for name in s.weights}

    return [
        (max(s.first_step, step), s.batch_windows, s.seq_len, s.weights, sizes(s))
        for s, end in zip(order.segments, ends, strict=True)
        if end is None or end > step
    ]
