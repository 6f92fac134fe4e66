"""What a configuration may hold: nested values in, one sentence for what cannot be trained."""

import math
import re
from collections.abc import Iterator
from typing import Any

from llama.cli import UserError, expect

AT_LEAST_ZERO = ("seed", "optim.warmup_steps", "optim.weight_decay", "validation.every")
SHARES = ("optim.min_lr_ratio", "optim.decay_ratio", "optim.betas.0", "optim.betas.1")
# Far beyond any model: what a damaged or hostile file says must not be built first.
SIZES = {f"model.{key}": 10**7 for key in "dim n_heads n_kv_heads vocab_size ffn_dim".split()}
SIZES["model.n_layers"] = 10**4

ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def check_weights(weights: dict[str, Any], where: str) -> dict[str, float]:
    """Weights by source name, each positive, summing to 1 within 1e-6."""
    for name, weight in weights.items():
        good = isinstance(weight, int | float) and not isinstance(weight, bool) and weight > 0
        expect(good, f"{where}: the weight of {name} is {weight!r}", "a number > 0")
    total = math.fsum(weights.values())
    expect(abs(total - 1) <= 1e-6, f"{where}: the weights sum to {total:.6g}", "1")
    return {str(name): float(weight) for name, weight in weights.items()}


def check(cfg: dict[str, Any]) -> None:
    """Refuse values that cannot be trained, each with its key, value and what would do.

    `cfg` is the nested configuration as it is written to YAML, with every key present.
    """
    for key, value in _numbers(cfg):
        if key.startswith("parallel.") and key not in ("parallel.budget", "parallel.prefetch"):
            good, expected = value == -1 or value >= 1, "1 or more, or -1 for the rest"
        elif key in SHARES:
            top = 1 if "betas" not in key else 1 - 1e-9
            good, expected = 0 <= value <= top, "a share between 0 and 1"
        elif key in SIZES:
            top = SIZES[key]
            good, expected = 0 < value <= top, f"more than 0, at most {top}"
        elif key == "guard.window":
            good, expected = value >= 16, "16 or more"
        elif key in AT_LEAST_ZERO or key == "guard.replicas_every":
            good, expected = 0 <= value < 2**64, "0 or more, below 2^64"
        else:
            good, expected = 0 < value < math.inf, "more than 0"
        expect(good, f"{key} is {value}", expected)
    m, d, t, p = cfg["model"], cfg["data"], cfg["train"], cfg["parallel"]
    name = cfg["name"]
    good = re.fullmatch(r"[\w][\w.+-]*", name) is not None and len(name.encode()) <= 200
    expect(good, f"name is {name!r}", "200 bytes of letters, digits, '.', '_' and '-' at most")
    dim, heads, kv_heads = m["dim"], m["n_heads"], m["n_kv_heads"] or m["n_heads"]
    if dim % heads or (dim // heads) % 2:
        raise UserError(f"model.dim {dim} / model.n_heads {heads} gives no even, whole head size")
    if heads % kv_heads:
        raise UserError(f"model.n_kv_heads {kv_heads} does not divide model.n_heads {heads}")
    if m["rope_scaling"] is not None:
        _check_rope_scaling(m["rope_scaling"])
    length = d["seq_len"]
    ramp = [("train.batch_ramp", batch) for batch, _ in t["batch_ramp"]]
    for key, batch in [("train.batch_tokens", t["batch_tokens"]), *ramp]:
        if batch % length:
            near = max(1, round(batch / length)) * length
            raise UserError(
                f"{key} {batch} is not a multiple of data.seq_len {length}; {near} would be"
            )
    steps = re.fullmatch(r"0*([1-9]\d*)-(\d+)", cfg["log"]["profile"] or "1-1")
    good = steps is not None and int(steps[1]) <= int(steps[2])
    expect(good, f"log.profile is {cfg['log']['profile']!r}", "steps such as 10-12")
    if isinstance(d["mixture"], dict):
        check_weights(d["mixture"], "data.mixture")
    rest = [f"parallel.{key}" for key, value in p.items() if value == -1]
    expect(len(rest) < 2, f"{' and '.join(rest)} are -1", "at most one of them")
    if (p["recompute"] == "budget") != (p["budget"] is not None):
        raise UserError(
            f"parallel.recompute is {p['recompute']} and parallel.budget {p['budget']}: "
            "recompute budget needs the bytes to keep (20GB), and nothing else does"
        )


def _check_rope_scaling(scaling: dict[str, str | float]) -> None:
    kind = scaling.get("type")
    expect(kind in ROPE_SCALINGS, f"model.rope_scaling.type is {kind!r}", "linear or llama3")
    expected = {"type", *ROPE_SCALINGS[str(kind)]}
    if odd := expected ^ set(scaling):
        raise UserError(f"model.rope_scaling {kind} has exactly {sorted(expected)}, not {odd}")
    for key in ROPE_SCALINGS[str(kind)]:
        value = scaling[key]
        good = not isinstance(value, str) and 0 < value < math.inf
        expect(good, f"model.rope_scaling.{key} is {value!r}", "more than 0")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(dotted key, number) of everything that is a number of the configuration's own."""
    if key in ("data.mixture", "model.rope_scaling"):
        return  # checked where they are read
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from _numbers(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
