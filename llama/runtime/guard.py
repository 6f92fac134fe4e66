"""Bad numbers: whether a step may change anything, and whether it is a spike.

In: loss and gradient norm of every step, on the device. Out: `found_inf` for the optimizer, and
numbers that the host reads while the next step runs, so that nothing here waits for the device. A
spike is a value more than `sigma` standard deviations above what the last steps lead to expect;
what is not finite never enters that window, and what is too high enters it as the limit, so that
one spike hides no second one and a lasting change is accepted in the end.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llama.config import GuardConfig
from llama.runtime.world import World

# A window as even as rounding makes it must not call the next rounding error a spike.
SMALLEST_SIGMA = 1e-4


class Reading(NamedTuple):
    """What was seen of a step; limits are infinite while the window holds too little."""

    loss: float
    norm: float
    loss_limit: float
    norm_limit: float
    spike: float
    # steps in a row, with this one, that changed nothing
    unchanged: float

    def __str__(self) -> str:
        text = f"loss {self.loss:.4g}, gradient norm {self.norm:.4g}"
        if math.isinf(self.loss_limit):
            return text
        return f"{text}, expected below {self.loss_limit:.4g} and {self.norm_limit:.4g}"


class Guard:
    """The judge of a run's numbers; its state is saved, so that resuming is exact."""

    def __init__(
        self, cfg: GuardConfig, here: World, branch: int = 0, saved: dict[str, Any] | None = None
    ) -> None:
        self.cfg, self.here, self.branch = cfg, here, branch
        saved = saved or {"window": [], "counts": [0, 0, 0], "unread": None}
        rows = saved["window"][-cfg.window :]
        # (loss, gradient norm) of the last steps, NaN where there were none
        rows = [[math.nan] * 2] * (cfg.window - len(rows)) + rows
        self.history = torch.tensor(rows, dtype=torch.float64, device=here.device)
        # spikes, steps that changed nothing, and those of them in a row up to now
        self.counts = torch.tensor(saved["counts"], dtype=torch.float64, device=here.device)
        self.age = torch.arange(cfg.window, dtype=torch.float64, device=here.device)[:, None]
        self._judged: Tensor | None = None
        self._sent: tuple[Tensor, Any] | None = None
        if saved["unread"]:
            # JSON has no infinity
            numbers = [math.inf if number is None else number for number in saved["unread"]]
            self._sent = torch.tensor(numbers, dtype=torch.float64), None

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 where the step must change nothing, else 0.0: the same on every process."""
        now = torch.stack([loss, norm]).double()
        now = torch.where(now.isfinite(), now, math.inf)
        if self.here.size > 1:
            # replicas reduce their norms apart: what one of them sees holds for all
            dist.all_reduce(now, dist.ReduceOp.MAX)
        limit = self.limits()
        finite = now.isfinite().all()
        spike = finite & (now > limit).any()
        unchanged = ~finite | spike if self.cfg.spike == "skip" else ~finite
        # a batch without a target has loss 0 and says nothing
        enters = finite & (now > 0).all()
        longer = torch.cat([self.history[1:], torch.minimum(now, limit)[None]])
        self.history = torch.where(enters, longer, self.history)
        in_a_row = torch.where(unchanged, self.counts[2] + 1, 0.0)
        self.counts = torch.stack([self.counts[0] + spike, self.counts[1] + unchanged, in_a_row])
        self._judged = torch.cat([now, limit, torch.stack([spike.double(), in_a_row])])
        return unchanged.float()

    def limits(self) -> Tensor:
        """Highest (loss, gradient norm) that is no spike.

        A fall is followed to the present step, or it would drown the noise around it, but not
        below what was seen: it may have just ended. A rise is not followed, or a slow divergence
        would become its own measure.
        """
        there = ~self.history[:, :1].isnan()
        count = there.sum()
        values = torch.where(there, self.history, 0.0)
        mean = values.sum(0) / count
        middle = self.cfg.window - (count + 1) / 2
        time = torch.where(there, self.age - middle, 0.0)
        slope = ((time * values).sum(0) / time.square().sum()).clamp(max=0.0)
        rest = torch.where(there, values - mean - slope * time, 0.0)
        sigma = (rest.square().sum(0) / (count - 1)).sqrt()
        lowest = torch.where(there, self.history, math.inf).amin(0)
        expected = torch.maximum(mean + slope * (self.cfg.window - middle), lowest)
        limit = expected + self.cfg.sigma * torch.maximum(sigma, SMALLEST_SIGMA * mean)
        return torch.where(count >= self.cfg.window // 2, limit, math.inf)

    def read(self) -> Reading | None:
        """The step before the last one judged; that one's numbers begin their way to the host."""
        before, self._sent = self._sent, None
        if self._judged is not None:
            ready = torch.cuda.Event() if self.here.device.type == "cuda" else None
            self._sent = self._judged.to("cpu", non_blocking=True), ready
            if ready:
                ready.record()
            self._judged = None
        if before is None:
            return None
        numbers, ready = before
        if ready:
            ready.synchronize()
        return Reading(*numbers.tolist())

    def state(self) -> dict[str, Any]:
        """What a new guard goes on from, as JSON has it; waits for the device."""
        rows = [row for row in self.history.tolist() if not math.isnan(row[0])]
        unread = self._sent[0].tolist() if self._sent else None
        return {"window": rows, "counts": self.counts.tolist(), "unread": unread}
