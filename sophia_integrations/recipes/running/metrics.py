"""``metrics.jsonl``: one JSON object per logging event, never two for one step after a resume."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .events import read_metrics
from .folder import write_text

_RENAMED = {"learning_rate": "lr"}


class MetricsWriter(TrainerCallback):
    """Appends every training and evaluation log to the file.

    Fields: ``step``, ``epoch``, ``seconds`` (training time so far, earlier sessions included), ``loss`` with
    ``lr`` (per step), ``grad_norm`` and ``sophia/*``, or ``eval_loss``.  A loss that is not finite is null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.earlier = 0.0
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far, in seconds, earlier sessions included."""
        return self.earlier + time.monotonic() - self.began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.resume_at(state.global_step)

    def resume_at(self, step: int) -> None:
        """Drops events past `step` and goes on counting time from the last one kept."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.earlier = kept[-1].get("seconds", 0.0) if kept else 0.0
        self.began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        line = {"step": state.global_step, "epoch": state.epoch, "seconds": round(self.seconds, 3)}
        wanted = ("eval_loss",) if "eval_loss" in logs else ("loss", "learning_rate", "grad_norm")
        for name, value in logs.items():
            if name in wanted or name.startswith("sophia/"):
                finite = isinstance(value, (int, float)) and math.isfinite(value)
                line[_RENAMED.get(name, name)] = value if finite else None
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
