"""Progress on a terminal or in a log file: a live bar there, one plain line per log here; knows no trainer."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm


class Bar:
    """Loss and win rate beside the time left.

    Args:
        step: where training goes on.
        total: its last step; None when there is none.
        lines: print lines on a terminal too.

    Attributes:
        live: the bar; None where lines are printed.
    """

    def __init__(self, step: int, total: int | None, lines: bool = False) -> None:
        self.first, self.total = step, total
        self.began = time.monotonic()
        self.live: tqdm | None = None
        if sys.stdout.isatty() and not lines:
            self.live = tqdm(total=total, initial=step, dynamic_ncols=True, unit="step", file=sys.stdout)

    def move(self, step: int) -> None:
        """After each step."""
        if self.live is not None:
            self.live.update(step - self.live.n)

    def training(self, step: int, figures: Mapping[str, Any]) -> None:
        """After each log of the training loss; `figures` are named as in ``metrics.jsonl``."""
        words = {"loss": f"{figures['loss']:.4f}"}
        if isinstance(figures.get("sophia/win_rate"), float):
            words["win rate"] = f"{figures['sophia/win_rate']:.2f}"
        if self.live is not None:
            self.live.set_postfix(words)
            return
        shown = "  ".join(f"{name} {value}" for name, value in words.items())
        if self.total is not None:
            pace = (time.monotonic() - self.began) / max(1, step - self.first)
            shown += f"  {clock(pace * (self.total - step))} left"
        self.say(f"{self._at(step)}  {shown}")

    def validation(self, step: int, figures: Mapping[str, Any]) -> None:
        """After each evaluation."""
        accuracy = f"  accuracy {figures['eval_accuracy']:.4f}" if "eval_accuracy" in figures else ""
        self.say(f"{self._at(step)}  validation loss {figures['eval_loss']:.4f}{accuracy}")

    def say(self, line: str) -> None:
        """A line of its own, above a live bar."""
        if self.live is not None:
            self.live.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self.live is not None:
            self.live.close()
            self.live = None

    def _at(self, step: int) -> str:
        return f"step {step}" if self.total is None else f"step {step}/{self.total}"


def clock(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
