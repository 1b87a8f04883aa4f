"""Coordinates that were left alone because their gradient was not finite: counted, and warned of once a process."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import warn_caller
from .statistics import total


class NonFiniteGradients:
    """The count on each device; reading it waits for the device."""

    def __init__(self) -> None:
        self._counts: dict[torch.device, Tensor] = {}
        self._warned = False

    def add(self, count: Tensor) -> None:
        """Add a 0-dim count."""
        earlier = self._counts.get(count.device)
        self._counts[count.device] = count if earlier is None else earlier.add_(count)

    def total(self) -> Tensor:
        """The count over all devices."""
        return total(list(self._counts.values()))

    def warn(self, step: int, wait: bool) -> None:
        """Warn by step `step`; with `wait` also about devices that have to be waited for."""
        for device, count in self._counts.items():
            if not self._warned and (device.type == "cpu" or wait) and count > 0:
                self._warned = True
                warn_caller(
                    f"{int(count)} gradient coordinates were not finite by step {step}; Sophia left those parameters "
                    "as they were. stats()['nonfinite_gradients'] keeps count."
                )
