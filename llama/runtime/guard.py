"""Bad numbers: whether a step may change anything, and whether it is a spike.

In: loss and gradient norm of every step, on the device. Out: `found_inf` for the optimizer, and
numbers that the host reads while the next step runs, so that nothing here waits for the device. A
spike is a value more than `sigma` standard deviations above what the last steps lead to expect;
what is not finite never enters that window, and what is too high enters it as the limit, so that
one spike hides no second one and a lasting change is accepted in the end.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama.config import GuardConfig
from llama.runtime import stragglers
from llama.runtime.world import World

# A window as even as rounding makes it must not call the next rounding error a spike.
SMALLEST_SIGMA = 1e-4


class Guard:
    """The judge of a run's numbers; its state is saved, so that resuming is exact."""

    def __init__(
        self, cfg: GuardConfig, here: World, branch: int = 0, saved: dict[str, Any] | None = None
    ) -> None:
        self.cfg, self.here, self.branch = cfg, here, branch
        saved = saved or {"window": [], "counts": [0] * 3, "unread": None}
        known = saved["window"][-cfg.window :]
        # (loss, gradient norm) of the last steps, NaN where there were none
        rows = [[math.nan] * 2] * (cfg.window - len(known)) + known
        self.history = torch.tensor(rows, dtype=torch.float64, device=here.device)
        # spikes, steps that changed nothing, and those of them in a row up to now
        self.counts = torch.tensor(saved["counts"], dtype=torch.float64, device=here.device)
        # where the window has become longer, those that filled the last one judge on
        self._look_back(len(known) if len(known) >= saved.get("span", cfg.window) else cfg.window)
        self._judged: Tensor | None = None
        unread = saved["unread"]
        self._sent = (torch.tensor(unread, dtype=torch.float64), None) if unread else None

    def _look_back(self, span: int) -> None:
        """Judge by the last `span` steps: what times these is their mean and slope, and the line
        that these mean.
        """
        self.span = span
        time = torch.arange(span, dtype=torch.float64, device=self.here.device)
        self._line = torch.stack([torch.ones_like(time), time - time.mean()], 1)
        self._fit = (self._line / self._line.square().sum(0)).T

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 where the step must change nothing, else 0.0: the same on every process."""
        now, limit = self._look(loss, norm)
        high, finite = now > limit, now.amax() < math.inf
        spike = finite & high.any()
        unchanged = ~finite | spike if self.cfg.spike == "skip" else ~finite
        longer = torch.cat([self.history[1:], torch.where(high, limit, now)[None]])
        # a batch without a target has loss 0 and says nothing
        self.history = torch.where(finite & (now.amin() > 0), longer, self.history)
        self.counts = self.counts + torch.stack([spike, unchanged, unchanged])
        self.counts[2] *= unchanged
        self._judged = torch.cat([now, limit, spike.double()[None], self.counts[2:]])
        return unchanged.float()

    def suspects(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether they are a spike or not finite on any process; waits for the device."""
        now, limit = self._look(loss, norm)
        with stragglers.waiting():
            return bool((now > limit).any() | (now.amax() == math.inf))

    def _look(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, norm) over all processes, infinite where not finite, and their limits."""
        now = torch.stack([loss, norm]).double().nan_to_num(math.inf, math.inf, math.inf)
        if self.here.size > 1:
            # replicas reduce their norms apart: what one of them sees holds for all
            dist.all_reduce(now, dist.ReduceOp.MAX)
        return now, self.limits()

    def limits(self) -> Tensor:
        """Highest (loss, gradient norm) that is no spike; NaN until the window is full.

        A fall is followed to the present step, or it would drown the noise around it, but not
        below what was seen: it may have just ended. A rise is not followed, or a slow divergence
        would become its own measure.
        """
        history = self.history[-self.span :]
        fit = self._fit @ history
        fit[1].clamp_(max=0.0)
        sigma = torch.addmm(history, self._line, fit, alpha=-1).std(0)
        now = torch.add(*fit, alpha=(self.span + 1) / 2)
        expected = torch.maximum(now, history.amin(0))
        return expected + self.cfg.sigma * torch.maximum(sigma, SMALLEST_SIGMA * fit[0])

    def read(self) -> list[float] | None:
        """Loss, norm, their limits, spike and steps in a row that changed nothing: 6 numbers.

        They are of the step before the last one judged; that one's begin their way to the host.
        """
        before, self._sent = self._sent, None
        if self._judged is not None:
            cuda = self.here.device.type == "cuda"
            numbers, self._judged = self._judged.to("cpu", non_blocking=True), None
            self._sent = numbers, torch.cuda.current_stream().record_event() if cuda else None
        if before and before[1]:
            with stragglers.waiting():
                before[1].synchronize()
        return before[0].tolist() if before else None

    def state(self) -> dict[str, Any]:
        """What a new guard goes on from, as JSON has it; waits for the device."""
        rows = [row for row in self.history.tolist() if not math.isnan(row[0])]
        # JSON has no infinity
        unread = self._sent[0].nan_to_num().tolist() if self._sent else None
        state = {"window": rows, "counts": self.counts.tolist(), "unread": unread}
        # it grows here, not with every row, and so for a run that resumes from this as well
        self._look_back(max(self.span, len(rows)))
        return state if self.span == self.cfg.window else state | {"span": self.span}
