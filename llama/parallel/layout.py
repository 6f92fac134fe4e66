"""How many processes share what: a configuration and a number of processes in, their layout out.

What cannot work is refused in one sentence with the numbers and the nearest that would. Without
torch, so that a run is refused before any process group starts.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from llama import costs
from llama.cli import UserError, show_bytes
from llama.config import Config, ParallelConfig
from llama.costs import Layout


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def nearest(value: int, good: Iterable[int]) -> str:
    """The largest one below and the smallest above, as `7 or 9`."""
    found = sorted(set(good))
    below, above = [n for n in found if n < value][-1:], [n for n in found if n > value][:1]
    return " or ".join(map(str, below + above)) or "none"


def sizes(p: ParallelConfig, processes: int) -> dict[str, int]:
    """replicate, shard, tensor and context, with -1 filled in.

    Raises `UserError` where they do not make so many processes.
    """
    found = {name: getattr(p, name) for name in ("replicate", "shard", "tensor", "context")}
    asked = " x ".join(f"{name} {n}" for name, n in found.items())
    known = math.prod(n for n in found.values() if n != -1)
    for name, n in found.items():
        if n == -1 and processes % known == 0:
            found[name] = processes // known
    if math.prod(found.values()) == processes:
        return found
    apart = found["tensor"] * found["context"]
    copies, left = divmod(processes, max(1, found["shard"] * apart))
    if processes % apart:
        offer = f"parallel.tensor x context {nearest(apart, divisors(processes))}"
    elif found["shard"] > 0 and not left:
        offer = f"parallel.replicate {copies}"
    else:
        shard = nearest(found["shard"], divisors(processes // apart))
        offer = f"parallel.shard {shard} with parallel.replicate -1"
    raise UserError(f"parallel {asked} do not make a world of {processes}: {offer} would")


def share(cfg: Config, at: Layout) -> int:
    """Windows of a step in one process, or in the processes that share them."""
    return cfg.train.batch_tokens // cfg.data.seq_len // (at.replicate * at.shard)


def with_micro_batch(cfg: Config, at: Layout, windows: int) -> Layout:
    """The layout with so many windows per forward pass; 0 while there are none yet."""
    return replace(at, micro_batch=windows, accumulates=0 < windows < share(cfg, at))


def resolve(cfg: Config, processes: int, on_gpu: bool = True) -> Layout:
    """The layout a configuration asks for, on so many processes; a micro-batch of auto is 1.

    Raises `UserError` naming the numbers where it divides the world, the heads, the feed-forward
    width, the vocabulary, the sequence or the batch unevenly, or its budget holds no block.
    """
    p, m, t, T = cfg.parallel, cfg.model, cfg.train, cfg.data.seq_len
    assert m.vocab_size, "the vocabulary size is known before a layout is chosen"
    spread = sizes(p, processes)
    n, c = spread["tensor"], spread["context"]
    shared = {
        "model.n_heads": m.n_heads,
        "the number of key/value heads": m.kv_heads,
        "the feed-forward width": m.hidden_dim,
        "model.vocab_size": m.vocab_size,
        "data.seq_len / parallel.context": T // c,
    }
    if c > 1 and T % (2 * c):
        offer = f"parallel.context {nearest(c, divisors(T // 2))} would"
        raise UserError(f"2 x parallel.context {c} pieces do not divide data.seq_len {T}: {offer}")
    for name, number in shared.items():
        if number % n:
            good = nearest(n, divisors(math.gcd(*shared.values())))
            raise UserError(
                f"parallel.tensor {n} does not divide {name} {number}: parallel.tensor {good} "
                "divides all it has to"
            )
    compiled = on_gpu and t.compile is not False and p.recompute not in ("manual", "budget")
    if p.async_tensor and not (n > 1 and compiled):
        raise UserError(
            f"parallel.async_tensor with parallel.tensor {n}, parallel.recompute {p.recompute}, "
            f"train.compile {t.compile} on {'GPUs' if on_gpu else 'CPUs'}: it needs tensor groups "
            "on GPUs and compiled blocks, which manual and budget do not have"
        )
    ranks = spread["replicate"] * spread["shard"]
    ramp = [("train.batch_ramp", batch) for batch, _ in t.batch_ramp]
    for key, batch in [*ramp, ("train.batch_tokens", t.batch_tokens)]:
        windows = batch // T
        if windows % ranks:
            fewer = batch - windows % ranks * T
            good = nearest(batch, [n for n in (fewer, fewer + ranks * T) if n])
            raise UserError(
                f"{key} {batch} is {windows} windows of data.seq_len {T} and does not divide over "
                f"parallel.replicate x shard = {ranks}: {key} {good} would, or replicate x shard "
                f"{nearest(ranks, divisors(windows))}"
            )
    wide = t.dtype == "float32" or (t.dtype == "auto" and not on_gpu)
    at = Layout(
        T,
        recompute=p.recompute,
        element_bytes=4 if wide else 2,
        # kernels/eager.py
        loss_elements=2**26 if on_gpu else 2**20,
        documents=not cfg.data.attend_across_documents,
        own_attention=cfg.kernels.attention in ("triton", "gluon"),
        budget=p.budget or 0,
        accumulate=p.accumulate,
        reshard=p.reshard,
        prefetch=p.prefetch,
        **spread,  # type: ignore[arg-type]
    )
    micro = 1 if t.micro_batch == "auto" else min(t.micro_batch, share(cfg, at))
    at = with_micro_batch(cfg, at, micro)
    if p.recompute == "budget" and (least := costs.kept(m, at)) > at.budget:
        raise UserError(
            f"parallel.budget {show_bytes(at.budget)} is too small for train.micro_batch {micro}: "
            f"with all blocks full it takes {show_bytes(least)}"
        )
    return at
