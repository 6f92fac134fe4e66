"""The integer arithmetic under the data order: weights, the layout of a mixture, permutations.

In: mixture weights (Table 1 of §2.1), or indices with a size and a key. Out: integer weights, the
table that says which source each slot draws, and the images of indices under keyed permutations.
"""

import heapq
import math
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llama.cli import UserError

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

WEIGHT_LIMIT = 65_536  # largest sum of the integer weights: the layout table stays small
ROUNDS = 12  # with 8, the permutations of 5 are visibly uneven
GOLDEN = 0x9E3779B97F4A7C15


def integer_weights(weights: Mapping[str, float], limit: int = WEIGHT_LIMIT) -> dict[str, int]:
    """Integers in the proportion of ``weights`` that sum to at most ``limit``, none of them 0.

    Exact when decimals as written allow it (Table 1 gives 134 30 9 9 9 5 4 of 200); otherwise the
    nearest by largest remainder. From here on the integers are the target.
    """
    if not weights or len(weights) > limit:
        raise UserError(f"a mixture needs between 1 and {limit} sources, not {len(weights)}")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"weight of source {name!r} must be above 0, not {weight}")
    parts = {name: Fraction(str(float(weight))) for name, weight in weights.items()}
    total = sum(parts.values(), Fraction(0))
    shares = {name: part / total for name, part in parts.items()}
    exact = math.lcm(*(share.denominator for share in shares.values()))
    if exact <= limit:
        return {name: int(share * exact) for name, share in shares.items()}
    integers = {name: max(1, int(share * limit)) for name, share in shares.items()}

    def shortfall(name: str) -> tuple[Fraction, str]:
        return shares[name] * limit - integers[name], name

    missing = limit - sum(integers.values())
    for name in sorted(shares, key=shortfall, reverse=True)[: max(0, missing)]:
        integers[name] += 1
    for _ in range(-missing):  # sources too rare for one slot were lifted to 1: the largest pays
        integers[max(integers, key=lambda name: (integers[name], name))] -= 1
    common = math.gcd(*integers.values())
    return {name: n // common for name, n in integers.items()}


@lru_cache(maxsize=16)
def layout(weights: tuple[int, ...]) -> tuple[Ints, Ints]:
    """Source of each of the P = sum(weights) slots, and its earlier slots of the same source.

    Earliest deadline first over unit jobs: job j of source i may run from slot floor(j·P/w_i) and
    is due at (j+1)·P/w_i. Any schedule that keeps these dates has |count_i(n) - n·w_i/P| < 1 at
    every prefix n, and this one always does (Tijdeman's chairman assignment, 1980).
    """
    total = sum(weights)
    # Two different due dates are at least 1/(w_a·w_b) >= 2**-32 apart: 33 binary places keep order.
    jobs = sorted(
        (j * total // w, ((j + 1) * total << 33) // w, i, j)
        for i, w in enumerate(weights)
        for j in range(w)
    )
    ready: list[tuple[int, int, int]] = []
    chosen, released = [], 0
    for slot in range(total):
        while released < total and jobs[released][0] <= slot:
            heapq.heappush(ready, jobs[released][1:])
            released += 1
        chosen.append(heapq.heappop(ready)[1:])
    source, job = np.array(chosen, np.int64).T.copy()
    return source, job


def _mix(x: Words) -> Words:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_key(source_key: ArrayLike, epoch: ArrayLike) -> Words:
    """The key of each (source, epoch): another epoch is another permutation."""
    source, epochs = np.atleast_1d(np.asarray(source_key, np.uint64), np.asarray(epoch, np.uint64))
    return _mix(source ^ _mix(epochs + np.uint64(GOLDEN)))


def source_key(seed: int, name: str) -> int:
    """The key of a source: from the run's seed and its name, so others do not matter."""
    digest = blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permute(index: ArrayLike, size: ArrayLike, key: ArrayLike, inverse: bool = False) -> Ints:
    """Image of each index under the permutation of [0, size) named by its key; all broadcast.

    A Feistel network over Z_a x Z_b with a·b just above the size; what falls outside is sent
    through again until it lands inside (cycle walking), which keeps the map one-to-one.
    """
    words = [np.atleast_1d(np.asarray(each, np.uint64)) for each in (index, size, key)]
    x, n, keys = np.broadcast_arrays(*words)
    out = x.copy()
    a = np.ceil(np.sqrt(n)).astype(np.uint64)
    b = (n + a - np.uint64(1)) // a
    outside = np.arange(len(out))
    while len(outside):
        moved = _feistel(out[outside], a[outside], b[outside], keys[outside], inverse)
        out[outside] = moved
        outside = outside[moved >= n[outside]]
    return out.astype(np.int64)


def _feistel(x: Words, a: Words, b: Words, key: Words, inverse: bool) -> Words:
    high, low = np.divmod(x, b)
    for r in range(ROUNDS - 1, -1, -1) if inverse else range(ROUNDS):
        round_key = _mix(key + np.uint64((r * GOLDEN) % 2**64))
        if r % 2 == 0:
            shift = _mix(low ^ round_key) % a
            high = (high + (a - shift if inverse else shift)) % a
        else:
            shift = _mix(high ^ round_key) % b
            low = (low + (b - shift if inverse else shift)) % b
    return high * b + low
