"""How far a comparison is, over all its runs: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


class Progress:
    """Counts in the seconds that runs are expected to take, so that the time left is that of all of them.

    Args:
        say: receives lines; they are written above the bar.
        show: False for none, None for a bar on a terminal alone.
    """

    def __init__(self, say: Callable[[str], object], show: bool | None = None) -> None:
        from tqdm import tqdm

        self._tqdm, self._say = tqdm, say
        layout = "{percentage:3.0f}% |{bar}| {desc}, {remaining} left"
        self._bar: Any = tqdm(total=0, desc="0 runs", bar_format=layout, disable=None if show is None else not show)
        self._done = self._expected = 0.0
        self._steps, self._runs = 1, 0

    @property
    def total(self) -> float:
        """Seconds that all runs are expected to take."""
        return float(self._bar.total or 0.0)

    @property
    def left(self) -> float:
        """Of these, what the runs after the current one are expected to take."""
        return max(0.0, self.total - self._done - self._expected)

    def expect(self, seconds: float) -> None:
        """More (or, below 0, less) is to be done."""
        self._bar.total = max(0.0, self.total + seconds)
        self._bar.refresh()

    def begin(self, name: str, steps: int, seconds: float) -> None:
        """The next run, and how long it is expected to be."""
        self._steps, self._expected = max(1, steps), seconds
        self._bar.set_description_str(f"run {self._runs + 1}: {name}")

    def at(self, step: int) -> None:
        """The current run is at this step."""
        self._bar.n = min(self.total, self._done + self._expected * min(1.0, step / self._steps))
        self._bar.refresh()

    def end(self) -> None:
        """The current run has ended."""
        self._done, self._runs = self._done + self._expected, self._runs + 1
        self.at(0)
        self._expected = 0.0

    def say(self, line: str) -> None:
        """A line above the bar."""
        with self._tqdm.external_write_mode():
            self._say(line)

    def close(self) -> None:
        """No bar any more."""
        self._bar.close()


def in_words(seconds: float) -> str:
    """A duration, coarsely: ``40 s``, ``12 min``, ``3.5 h``."""
    if not math.isfinite(seconds):
        return "a time that is not known"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
