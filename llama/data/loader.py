"""Batches of token windows, read ahead of the step that needs them.

In: opened sources and the order of the run. Out: tokens (B, T+1), inputs and targets overlapping in
all but one, and the source of each row. Also the helpers for documents inside a window: paper §2.1
packs them without masking, the loss and attention can be told to respect their borders.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from typing import Any

import torch

from llama import faults
from llama.data.order import Order
from llama.data.shards import Source

IGNORED = -100  # a target that counts for nothing, the convention of cross_entropy
AHEAD = 3  # batches read before they are asked for
POLL_S = 1.0
Rows = tuple[int, int]
# whether this process waits for a batch -> whether any does; None to end
Agree = Callable[[bool], bool | None]
Read = tuple[torch.Tensor, torch.Tensor]


class Loader:
    """Reads the batches of an order. Has no state to save: the step is all it needs."""

    stalled_after_s = 600.0

    def __init__(self, sources: Mapping[str, Source], order: Order, pin: bool = True) -> None:
        self.sources, self.order = sources, order
        self.pin = pin and torch.cuda.is_available()
        self._aside: Any = torch.cuda.Stream() if self.pin else None
        self.waited_s = 0.0
        self._reading = "nothing yet"
        self._stop: Callable[[], None]
        self._thread: threading.Thread | None = None

    def batch(self, step: int, lo: int, hi: int) -> Read:
        """Rows [lo, hi) of the global batch: tokens (hi-lo, T+1) and index into ``order.names``.

        Raises ``UserError`` with file and byte for a short read or an id outside the vocabulary.
        """
        segment, drawn = self.order.segment(step), self.order.batch(step)
        length = segment.seq_len
        out = torch.empty((hi - lo, length + 1), dtype=torch.int64, pin_memory=self.pin)
        rows = out.numpy()
        picked = [self.sources[self.order.names[i]] for i in drawn.sources[lo:hi].tolist()]
        windows = drawn.windows[lo:hi].tolist()
        for row, source, window in zip(rows, picked, windows, strict=True):
            # resuming gives an order of its own to other shards
            assert source.n_windows(length) == segment.windows[source.name], source.folder
            self._reading = f"window {window} of {source.folder}"
            row[:] = source.read(window * length, length + 1)
        # one pass over the batch; only a failure looks for the row
        limit = min(source.vocab_size for source in self.sources.values())
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < limit:
            for row, source, window in zip(rows, picked, windows, strict=True):
                source.check_ids(row.astype(source.dtype), window * length)
        sources = torch.from_numpy(drawn.sources[lo:hi].copy())
        return out, sources.pin_memory() if self.pin else sources

    def steps(
        self, first_step: int, end_step: int, rows: Callable[[int], Rows], agree: Agree = bool
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(step, tokens, sources) of steps [first, end), read by a thread in the background.

        ``rows(step)`` is this process's share of the global batch. What fails in the thread is
        raised here; a read that hangs is named after ``stalled_after_s``. ``agree`` is asked
        before each step, and every second while there is no batch. On a machine with GPUs the
        tensors are on this process's; nobody waits for the copy but the GPU.
        """
        ready: queue.SimpleQueue[Read | BaseException] = queue.SimpleQueue()
        room, stopped = threading.Semaphore(AHEAD), threading.Event()

        def read_ahead() -> None:
            for step in range(first_step, end_step):
                room.acquire()
                if stopped.is_set():
                    return
                try:
                    faults.point("step.reading", step=step + 1)
                    ready.put(self.batch(step, *rows(step)))
                except BaseException as error:
                    error.add_note(f"while reading {self._reading}")
                    ready.put(error)
                    return

        def stop() -> None:
            stopped.set()
            room.release()

        self.close()
        # a daemon: a read that hangs must not keep the process
        self._stop, self._thread = stop, threading.Thread(target=read_ahead, daemon=True)
        self._thread.start()
        try:
            for step in range(first_step, end_step):
                got: Read | BaseException | None = None
                for tries in count(1):
                    began = time.monotonic()
                    with suppress(queue.Empty):
                        got = got or ready.get(timeout=POLL_S)
                    self.waited_s += time.monotonic() - began
                    if isinstance(got, BaseException):
                        raise got
                    if not got and tries * POLL_S >= self.stalled_after_s:
                        stalled = f"no batch for {self.stalled_after_s:g} s"
                        raise TimeoutError(f"{stalled}: still reading {self._reading}")
                    if not (waiting := agree(not got)):
                        break
                if waiting is None or not isinstance(got, tuple):
                    return
                room.release()
                yield step, *(self._copied(*got) if self.pin else got)
        finally:
            stop()

    def _copied(self, *batch: torch.Tensor) -> Read:
        """The batch on the GPU, copied while it still computes the step before."""
        aside, computing = self._aside, torch.cuda.current_stream()
        with torch.cuda.stream(aside):
            tokens, sources = (t.to("cuda", non_blocking=True) for t in batch)
        computing.wait_stream(aside)
        for tensor in (tokens, sources):
            tensor.record_stream(computing)
        return tokens, sources

    def close(self) -> None:
        """End the background thread; the sources stay open."""
        if self._thread:
            self._stop()
            self._thread.join(timeout=5)


def validation_windows(source: Source, seq_len: int, budget: int) -> torch.Tensor:
    """The first windows (n, T+1) of a valid split, as many as ``budget`` tokens hold."""
    n = min(source.n_windows(seq_len), budget // seq_len)
    out = torch.empty((n, seq_len + 1), dtype=torch.int64)
    for window, row in enumerate(out.numpy()):
        tokens = source.read(window * seq_len, seq_len + 1)
        source.check_ids(tokens, window * seq_len)
        row[:] = tokens
    return out


def document_ids(tokens: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Document of each token (B, T) within its window: the EOS before it. EOS ends its own."""
    ends = (tokens == eos_id).to(torch.int32)
    return ends.cumsum(-1, dtype=torch.int32) - ends


def drop_boundary_targets(inputs: torch.Tensor, targets: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Targets (B, T) with those that an EOS would have to predict ignored."""
    return targets.masked_fill(inputs == eos_id, IGNORED)
