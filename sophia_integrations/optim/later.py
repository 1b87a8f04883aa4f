"""Values that are on their way from a device: read when they have come, without waiting for them."""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Later:
    """A 0-dim tensor as it is now, copied to the host beside what the device has to do."""

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if value.device.type != "cuda":
            self._value = value.detach().clone()
            return
        self._value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(value.device))

    @property
    def has_come(self) -> bool:
        """Whether the device has got so far."""
        return self._event is None or self._event.query()

    def read(self) -> int | float:
        """The number; waits for it unless it `has_come`."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.item()


class Stopwatch:
    """Seconds between `start` and `stop`, summed: of the device's own time on a GPU, which is not waited for."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, device: torch.device) -> None:
        """Begin, with work that `device` does."""
        self._device = device
        self._begun = self._now()

    def stop(self) -> None:
        """End what `start` began."""
        end = self._now()
        if isinstance(end, float):
            self._seconds += end - self._begun
        else:
            self._pending.append((self._begun, end))
            self._collect(wait=False)

    @property
    def seconds(self) -> float:
        """The sum; waits for the end of the last interval."""
        self._collect(wait=True)
        return self._seconds

    def _now(self) -> torch.cuda.Event | float:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _collect(self, wait: bool) -> None:
        while self._pending and (wait or self._pending[0][1].query()):
            begin, end = self._pending.pop(0)
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
