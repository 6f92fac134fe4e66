"""What tests of the kernels share: where they run, bounds on errors, a vocabulary in shards."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.reference import VocabularyShard

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def run_interpreted(file: str) -> None:
    """The tests of a file under the interpreter, which must be on before triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-m", "not gpu", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def begin_as_nan(monkeypatch: Any) -> None:
    """Outputs begin as NaN, so that whatever a kernel does not write shows."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *args: Any, **options: Any) -> Tensor:
        x = new_empty(self, *args, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(Tensor, "new_empty", filled)


def values_and_gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Every output, and the gradient of every input for these gradients of the outputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    grads = [g.to(y.dtype) for g, y in zip(grads, out, strict=True)]
    return [*(y.detach() for y in out), *torch.autograd.grad(out, inputs, grads)]


def assert_as_exact(
    results: Sequence[Tensor], truths: Sequence[Tensor], *peers: Sequence[Tensor]
) -> None:
    """Each result is as near to its float64 truth as plain torch's in the same dtype, its peers.

    Several peers are the same sums in other orders, of which the farthest counts.

    Largest error <= 2 x the peer's + 1 ulp of the largest magnitude; norm of the error <= 1.1 x,
    with an allowance of a few roundings in float32, which small tensors need. In float32 itself it
    is 2 ulp for these: their few sums, taken in another order, differ by as much.
    """
    for i, (result, truth, *others) in enumerate(zip(results, truths, *peers, strict=True)):
        dtype = others[0].dtype
        assert result.shape == truth.shape and result.dtype == dtype, f"result {i}"
        ours, theirs = result.double() - truth, [peer.double() - truth for peer in others]
        small = dtype == torch.float32 and truth.numel() < 2**16
        ulp = (2 if small else 1) * torch.finfo(dtype).eps * float(truth.abs().max())
        worst = float(ours.abs().max())
        limit = 2 * max(float(each.abs().max()) for each in theirs) + ulp
        assert worst <= limit, f"result {i}: largest error {worst:.3g} > {limit:.3g}"
        roundings = 4 * torch.finfo(torch.float32).eps * float(truth.norm())
        whole = float(ours.norm())
        limit = 1.1 * max(float(each.norm()) for each in theirs) + roundings
        assert whole <= limit, f"result {i}: norm of the error {whole:.3g} > {limit:.3g}"


Exchange = Callable[[int, Tensor], list[Tensor]]


def in_threads(n: int, work: Callable[[int, Exchange], Any]) -> list[Any]:
    """`work(rank, exchange)` of n ranks, each in a thread, one at a time between exchanges.

    `exchange(rank, x)` returns the tensors that all ranks have brought.
    """
    results: list[Any] = [None] * n
    parts: dict[int, Tensor] = {}
    turn, barrier = threading.Lock(), threading.Barrier(n)

    def exchange(rank: int, x: Tensor) -> list[Tensor]:
        parts[rank] = x.detach().clone()
        turn.release()
        barrier.wait(60)
        found = [parts[i] for i in range(n)]
        barrier.wait(60)
        turn.acquire()
        return found

    def run(rank: int) -> None:
        with turn:
            results[rank] = work(rank, exchange)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def in_shards(weight: Tensor, n: int, work: Callable[[Tensor, VocabularyShard], Any]) -> list[Any]:
    """`work` on n shards of the vocabulary."""
    shards = weight.split(-(-len(weight) // n))
    starts = np.cumsum([0, *(len(rows) for rows in shards)])

    def one(rank: int, exchange: Exchange) -> Any:
        def reduce(x: Tensor, how: str) -> Tensor:
            stacked = torch.stack(exchange(rank, x))
            return stacked.amax(0) if how == "max" else stacked.sum(0)

        return work(shards[rank], VocabularyShard(int(starts[rank]), reduce))

    return in_threads(n, one)


def round_like_a_gpu(monkeypatch: Any) -> None:
    """Triton's interpreter cuts float32 down to bfloat16; GPUs round to nearest, ties to even."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            tensor = torch.from_numpy(np.array(x.data, np.float32))
            return tensor.bfloat16().view(torch.int16).numpy().view(np.uint16)
        if source == tl.bfloat16 and target == tl.float32:
            return np.asarray(x.data, np.uint32) << 16
        return original(x, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
