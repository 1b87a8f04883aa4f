"""SIGINT and SIGTERM as a wish to stop after the current step, in all processes of a run; knows no trainer."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from .processes import Processes

_WATCHED = (signal.SIGINT, signal.SIGTERM)
_ONE_PRESS = 1.0  # seconds; launchers may deliver one Ctrl-C twice


class SignalWatch:
    """Remembers the first signal; a second one ends the process at once.

    Attributes:
        signal: the number received, by this process or (after `agree`) by any; None before.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.signal: int | None = None
        self._at = 0.0
        self._owner = os.getpid()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes over both signals, and gives them back."""
        try:
            before = self.take()
        except ValueError:  # not the main thread: signals cannot be watched from here
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def take(self) -> dict[int, object]:
        """Takes over both signals and returns their handlers before; raises ValueError outside the main thread."""
        return {number: signal.signal(number, self._received) for number in _WATCHED}

    def agree(self) -> int | None:
        """The signal that any process received; all must call it after the same step."""
        self.signal = self.processes.agree(self.signal or 0) or None
        return self.signal

    def _received(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a forked data loader worker, which the whole process group's Ctrl-C reaches too
        if self.signal is not None:
            if time.monotonic() - self._at < _ONE_PRESS:
                return
            if self.processes.main:
                os.write(2, b"\nStopped at once; the last whole checkpoint is kept.\n")
            os._exit(128 + number)
        self.signal, self._at = number, time.monotonic()
        if self.processes.main:
            os.write(2, "\nStopping after this step …\n".encode())
