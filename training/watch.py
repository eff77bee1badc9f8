"""Watches a running training: whether losses are finite, and whether a signal asks it to stop."""

import math

import torch
from torch import Tensor

from core import dist
from core.errors import NonFiniteLoss
from core.signals import StopRequests


class LossWatch:
    """Averages the losses over ranks, and looks at each step while the next one is under way.

    A step's figures are read one step late, so that a GPU never waits for the host. The stop
    request is averaged with them: all ranks see it at the same step.
    """

    def __init__(self, stop: StopRequests, device: torch.device) -> None:
        self._stop = stop
        self._flags = torch.tensor([0.0, 1.0], device=device)  # no copy to the device in a step
        self._pending: tuple[int, list[str], Tensor] | None = None
        self._sums: dict[str, float] = {}
        self._count = 0
        self.must_stop = False
        self.total = float("nan")  # the newest known sum of losses

    def push(self, iteration: int, losses: dict[str, Tensor]) -> None:
        """Take a step's scalar losses; checks those of the step before.

        Raises:
            NonFiniteLoss: on every rank alike.
        """
        figures = torch.stack([loss.detach().float() for loss in losses.values()])
        flag = self._flags[1:] if self._stop.requested else self._flags[:1]
        packed = dist.all_mean(torch.cat([figures, flag]))
        self.flush()
        self._pending = (iteration, list(losses), packed)

    def flush(self) -> None:
        """Check the newest step now."""
        if self._pending is None:
            return
        iteration, names, packed = self._pending
        self._pending = None
        *values, flag = packed.tolist()
        self.must_stop = self.must_stop or flag > 0
        self.total = sum(values)
        if not all(math.isfinite(value) for value in values):
            figures = ", ".join(f"{name} {value}" for name, value in zip(names, values))
            raise NonFiniteLoss(
                f"step {iteration}: the loss is not finite ({figures}); "
                "lower the learning rate, or train without amp"
            )
        for name, value in zip(names, values):
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def means(self) -> dict[str, float]:
        """Return the mean of each loss and of their sum since the last call."""
        self.flush()
        count = max(self._count, 1)
        means = {name: value / count for name, value in self._sums.items()}
        self._sums, self._count = {}, 0
        return {"loss": sum(means.values()), **means}
