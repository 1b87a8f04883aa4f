"""SIGINT and SIGTERM as a wish to stop after the current step, in all processes of a run; knows no trainer."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from .processes import Processes
from .run_folder import RunFolder

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_PRESS = 1.0  # seconds; launchers may deliver one Ctrl-C twice


class StopRequest:
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
        """Takes over both signals, and gives them back; does nothing outside the main thread."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.take()
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):
                for number, handler in before.items():
                    signal.signal(number, handler)

    def take(self) -> None:
        """Takes over both signals, also from a trainer that has just taken them."""
        with contextlib.suppress(ValueError):  # not the main thread: signals cannot be received here
            for number in _SIGNALS:
                signal.signal(number, self._received)

    def agree(self) -> int | None:
        """The signal that any process received; all must call it after the same step."""
        self.signal = self.processes.agree(self.signal or 0) or None
        return self.signal

    def sentence(self, step: int, last: int, folder: RunFolder) -> str:
        """What is said of a run that was stopped after `step`; `last` is its last step, or -1 where that is open."""
        total = f" of {last}" if last > 0 else ""
        saved = f"checkpoint saved in {folder.path}" if step else "nothing to save yet"
        return f"Stopped at step {step}{total}, {saved}. To go on, run the same command again."

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
