"""How many processes share what: a configuration and a number of processes in, their layout out.

What cannot work is refused in one sentence with the numbers and the nearest that would. Without
torch, so that a run is refused before any process group starts.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice

from llama import costs
from llama.cli import UserError
from llama.config import Config, ParallelConfig
from llama.costs import Layout

SIZES = ("replicate", "shard", "tensor", "context")


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def sizes(p: ParallelConfig, processes: int) -> dict[str, int]:
    """replicate, shard, tensor and context, with -1 filled in.

    Raises `UserError` where they do not make so many processes.
    """
    found = {name: getattr(p, name) for name in SIZES}
    asked = " x ".join(f"{name} {n}" for name, n in found.items())
    known = math.prod(n for n in found.values() if n != -1)
    for name, n in found.items():
        if n == -1 and processes % known == 0:
            found[name] = processes // known
    if math.prod(found.values()) != processes:
        raise UserError(f"parallel {asked} do not make a world of {processes}")
    return found


def share(cfg: Config, at: Layout) -> int:
    """Windows of a step in one process, or in the processes that share them."""
    return cfg.train.batch_tokens // cfg.data.seq_len // (at.replicate * at.shard)


def with_micro_batch(cfg: Config, at: Layout, windows: int) -> Layout:
    """The layout with so many windows per forward pass; 0 while there are none yet."""
    return replace(at, micro_batch=windows, accumulates=0 < windows < share(cfg, at))


def resolve(cfg: Config, processes: int, on_gpu: bool = True) -> Layout:
    """The layout a configuration asks for, on so many processes; a micro-batch of auto is 1.

    Raises `UserError` as `divide` does, with the two nearest layouts that work, if there are any.
    """
    try:
        return divide(cfg, processes, on_gpu)
    except UserError as error:
        good = ", or ".join(islice(_instead(cfg, processes, on_gpu), 2))
        said = f"{error}: {good} would" if good else str(error)
        raise UserError(said) from None


def divide(cfg: Config, processes: int, on_gpu: bool = True) -> Layout:
    """`resolve`, where nothing is offered instead.

    Raises `UserError` naming the numbers where it divides the world, the heads, the feed-forward
    width, the vocabulary, the sequence or the batch unevenly, or its budget holds no block.
    """
    p, t, T = cfg.parallel, cfg.train, cfg.data.seq_len
    spread = sizes(p, processes)
    n, c = spread["tensor"], spread["context"]
    if c > 1 and T % (2 * c):
        raise UserError(f"2 x parallel.context {c} pieces do not divide data.seq_len {T}")
    for name, number in _shared(cfg, c).items():
        if number % n:
            raise UserError(f"parallel.tensor {n} does not divide {name} {number}")
    compiled = on_gpu and t.compile is not False and p.recompute not in ("manual", "budget")
    if p.async_tensor and not (n > 1 and compiled):
        raise UserError(
            f"parallel.async_tensor with parallel.tensor {n}, parallel.recompute {p.recompute}, "
            f"train.compile {t.compile} on {'GPUs' if on_gpu else 'CPUs'} needs tensor groups "
            "on GPUs and compiled blocks, which manual and budget do not have"
        )
    ranks = spread["replicate"] * spread["shard"]
    if uneven := [(key, windows) for key, windows in _batches(cfg) if windows % ranks]:
        key, windows = uneven[0]
        near = (f"{key} {max(1, round(n / ranks)) * ranks * T}" for key, n in uneven)
        raise UserError(
            f"{key} {windows * T} is {windows} windows of data.seq_len {T} and does not divide "
            f"over parallel.replicate x shard = {ranks} ({' and '.join(near)} would)"
        )
    wide = t.dtype == "float32" or (t.dtype == "auto" and not on_gpu)
    at = Layout(
        T,
        recompute=p.recompute,
        element_bytes=4 if wide else 2,
        documents=not cfg.data.attend_across_documents,
        own_attention=cfg.kernels.attention in ("triton", "gluon"),
        on_gpu=on_gpu,
        budget=p.budget or 0,
        accumulate=p.accumulate,
        reshard=p.reshard,
        prefetch=p.prefetch,
        **spread,  # type: ignore[arg-type]
    )
    micro = 1 if t.micro_batch == "auto" else min(t.micro_batch, share(cfg, at))
    at = with_micro_batch(cfg, at, micro)
    if p.recompute == "budget" and (least := costs.kept(cfg.model, at)) > at.budget:
        raise UserError(
            f"parallel.budget {at.budget} is too small for train.micro_batch {micro} "
            f"({least} would hold all blocks full)"
        )
    return at


def _shared(cfg: Config, context: int) -> dict[str, int]:
    """What parallel.tensor divides."""
    m = cfg.model
    assert m.vocab_size, "the vocabulary size is known before a layout is chosen"
    return {
        "model.n_heads": m.n_heads,
        "the number of key/value heads": m.kv_heads,
        "the feed-forward width": m.hidden_dim,
        "model.vocab_size": m.vocab_size,
        "data.seq_len / parallel.context": cfg.data.seq_len // context,
    }


def _batches(cfg: Config) -> list[tuple[str, int]]:
    """(key, windows) of every size that the batch has in a run."""
    ramp = [("train.batch_ramp", batch) for batch, _ in cfg.train.batch_ramp]
    sizes = [*ramp, ("train.batch_tokens", cfg.train.batch_tokens)]
    return [(key, batch // cfg.data.seq_len) for key, batch in sizes]


# -- what works in place of what was asked for -----------------------------------------------------


def possible(cfg: Config) -> Iterator[tuple[int, ParallelConfig]]:
    """Every layout that divides what it has to, after the number of its processes."""
    half, odd = divmod(cfg.data.seq_len, 2)
    windows = math.gcd(*(n for _, n in _batches(cfg)))
    for c in [1] if odd else divisors(half):
        for tensor in divisors(math.gcd(*_shared(cfg, c).values())):
            for ranks in divisors(windows):
                for n in divisors(ranks):
                    found = dict(zip(SIZES, (ranks // n, n, tensor, c), strict=True))
                    yield ranks * tensor * c, replace(cfg.parallel, **found)  # type: ignore[arg-type]


def distance(asked: ParallelConfig, p: ParallelConfig) -> float:
    """How far sizes lie from those asked for: copies change least of all, -1 lies near to all."""
    pairs = [(getattr(asked, name), getattr(p, name)) for name in SIZES]
    weighted = zip(pairs, (0.5, 1, 2, 2), strict=True)
    return sum(weight * abs(math.log(n / wish)) for (wish, n), weight in weighted if wish != -1)


def changes(asked: ParallelConfig, p: ParallelConfig) -> str:
    """What is other than was asked for, as `parallel.shard 4 and parallel.tensor 2`."""
    new = {key: getattr(p, key) for key in (*SIZES, "accumulate", "reshard", "budget")}
    words = [f"parallel.{k} {n}" for k, n in new.items() if getattr(asked, k) not in (-1, n)]
    return " and ".join(words).replace("None", "null").replace("True", "true")


def _instead(cfg: Config, processes: int, on_gpu: bool) -> Iterator[str]:
    """What to change so that it works, the nearest first: in as many processes, then in fewer."""
    found = [(n, p) for n, p in possible(cfg) if n <= processes]
    for n, p in sorted(found, key=lambda each: (-each[0], distance(cfg.parallel, each[1]))):
        with suppress(UserError):
            divide(replace(cfg, parallel=p), n, on_gpu)
            words = changes(cfg.parallel, p), f"{n} processes" * (n < processes)
            yield " on ".join(filter(None, words))
