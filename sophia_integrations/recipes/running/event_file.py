"""Writing ``metrics.jsonl``: one JSON object per logging event, never two for one step after a resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .events import read_metrics
from .folder import write_text


class EventFile:
    """The file, and the clock of its ``seconds``: training time so far, earlier sessions included."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.earlier = 0.0
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far, in seconds, earlier sessions included."""
        return self.earlier + time.monotonic() - self.began

    def resume_at(self, step: int) -> None:
        """Drops events past `step` and goes on counting time from the last one kept."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.earlier = kept[-1].get("seconds", 0.0) if kept else 0.0
        self.began = time.monotonic()

    def append(self, step: int, epoch: float | None, figures: Mapping[str, Any]) -> None:
        """Adds an event; a figure that is not a finite number is null."""
        line: dict[str, Any] = {"step": step, "epoch": epoch, "seconds": round(self.seconds, 3)}
        for name, value in figures.items():
            line[name] = value if isinstance(value, (int, float)) and math.isfinite(value) else None
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
