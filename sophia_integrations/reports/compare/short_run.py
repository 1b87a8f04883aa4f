"""A short training that is measured: a process that makes some steps when it is told to, and otherwise waits."""

from __future__ import annotations

import os
import time
from pathlib import Path

from .dials import dials_of
from .rivals import Side
from .training import Training


class ShortRun:
    """One side's; begin, then each of the turns, then end.

    Args:
        side: whose.
        place: its run folder.
        turns: how often it will be told to go on before its end.

    Attributes:
        period: steps of a turn, those after which the price of a step repeats.
        steps: of the whole run: a turn to warm up, `turns`, and one whose operations are counted.
        beginning, ending: seconds of the start with the first turn, and of the last turn with what comes after it.
        costs: the file with what was counted.
    """

    def __init__(self, side: Side, place: Path, turns: int) -> None:
        dials = dials_of(side.settings)
        self.place, self.costs = place, Path(f"{place}.costs")
        self.period = dials.interval(side.settings)
        self.steps = (turns + 2) * self.period
        self.beginning = self.ending = 0.0
        settings = dials.measured(side.settings, self.steps, self.period)
        self._answers, reply = os.pipe()
        options = ["--turns", str(turns), str(self.period), str(reply), str(self.costs)]
        try:
            self._training = Training(place, settings, f"{side.name}, measured", options, [reply])
        finally:
            os.close(reply)

    def begin(self) -> None:
        """Waits for the first steps.  Raises `UserError` when it does not get there, as the others do."""
        began = time.monotonic()
        self._wait()
        self.beginning = time.monotonic() - began

    def turn(self) -> None:
        """Makes the next `period` steps."""
        self._training.go_on()
        self._wait()

    def end(self) -> None:
        """Makes the last ones, evaluates, and ends."""
        began = time.monotonic()
        self._training.go_on()
        if self._training.process.wait():
            raise self._training.failure()
        self.ending = time.monotonic() - began

    def close(self) -> None:
        """Ends it wherever it is."""
        self._training.close()
        os.close(self._answers)

    def _wait(self) -> None:
        if not os.read(self._answers, 1):
            self._training.process.wait()
            raise self._training.failure()
