"""What the callbacks of both trainers write while they train: ``metrics.jsonl``, and lines and a bar for the reader."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .events import read_metrics
from .run_folder import write_text


class RunLog:
    """Events of a run, one JSON object a line and never two for one step; only rank 0 writes them.

    Fields: ``step``, ``epoch``, ``seconds`` (training time so far, earlier sessions included), then ``loss`` with
    ``lr`` (per step), ``grad_norm`` and ``sophia/*``, or ``eval_loss`` with ``eval_accuracy`` of a classification.
    A figure that is not a finite number is null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._earlier, self._began, self._first = 0.0, time.monotonic(), 0
        self._total: int | None = None
        self._bar: tqdm | None = None

    def begin(self, step: int, total: int | None) -> None:
        """Training begins or goes on after `step`: drops later events, goes on counting time.

        Args:
            step: optimizer steps so far.
            total: the last step; None when there is none.
        """
        kept = [event for event in read_metrics(self.path) if event["step"] <= step]
        write_text(self.path, "".join(json.dumps(event) + "\n" for event in kept))
        self._earlier = kept[-1].get("seconds", 0.0) if kept else 0.0
        self._began, self._first, self._total = time.monotonic(), step, total

    def show_bar(self) -> None:
        """Shows a bar from now on, on a terminal only."""
        self._bar = tqdm(total=self._total, initial=self._first, unit="step", dynamic_ncols=True, disable=None)

    def move(self, step: int) -> None:
        """After each optimizer step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def training(self, step: int, epoch: float | None, figures: Mapping[str, Any]) -> None:
        """A log of the training loss."""
        self._append(step, epoch, figures)
        line = f"{self._at(step)}  loss {figures['loss']:.4f}"
        if isinstance(figures.get("sophia/win_rate"), float):
            line += f"  win rate {figures['sophia/win_rate']:.2f}"
        if self._total is not None:
            pace = (time.monotonic() - self._began) / max(1, step - self._first)
            line += f"  {tqdm.format_interval(pace * (self._total - step))} left"
        _say(line)

    def validation(self, step: int, epoch: float | None, figures: Mapping[str, Any]) -> None:
        """An evaluation."""
        self._append(step, epoch, figures)
        accuracy = f"  accuracy {figures['eval_accuracy']:.4f}" if "eval_accuracy" in figures else ""
        _say(f"{self._at(step)}  validation loss {figures['eval_loss']:.4f}{accuracy}")

    def _at(self, step: int) -> str:
        return f"step {step}" if self._total is None else f"step {step}/{self._total}"

    def _append(self, step: int, epoch: float | None, figures: Mapping[str, Any]) -> None:
        seconds = self._earlier + time.monotonic() - self._began
        event: dict[str, Any] = {"step": step, "epoch": epoch, "seconds": round(seconds, 3)}
        for name, value in figures.items():
            event[name] = value if isinstance(value, (int, float)) and math.isfinite(value) else None
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def _say(line: str) -> None:
    """A line of its own, above a bar."""
    tqdm.write(line)
    sys.stdout.flush()


def tokens_in(batch: Any) -> Any:
    """Tokens of a batch's ``input_ids`` without padding, as a number or a tensor; 0 where it has none."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return 0
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else mask.sum()
