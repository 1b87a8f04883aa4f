"""Coordinates that were left alone because their gradient was not finite: counted, and warned of once a process."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import warn_caller
from .later import Later
from .statistics import total


class NonFiniteGradients:
    """The count on the host and on each device; only `total` may be waited for."""

    def __init__(self) -> None:
        self._on_host = 0
        self._counts: dict[torch.device, Tensor] = {}
        self._asked: dict[torch.device, Later] = {}
        self._warned = False

    def add(self, count: Tensor) -> None:
        """Add a 0-dim count."""
        if count.is_cpu:
            self._on_host += int(count)
            return
        earlier = self._counts.get(count.device)
        self._counts[count.device] = count if earlier is None else earlier.add_(count)

    def total(self) -> Tensor:
        """The count over all of them."""
        return total([*self._counts.values(), torch.tensor(self._on_host)])

    def warn(self, step: int, wait: bool) -> None:
        """Warn by step `step` of what is known by then.

        Args:
            wait: whether to ask the devices as well, whose answer comes with a later step.
        """
        if self._warned:
            return
        for device, so_far in self._counts.items():
            if wait and device not in self._asked:
                self._asked[device] = Later(so_far)
        come = [device for device, later in self._asked.items() if later.has_come]
        count = self._on_host + sum(int(self._asked.pop(device).read()) for device in come)
        if count > 0:
            self._warned = True
            self._asked.clear()
            warn_caller(
                f"{count} gradient coordinates were not finite by step {step}; Sophia left those parameters as they "
                "were. stats()['nonfinite_gradients'] keeps count."
            )
