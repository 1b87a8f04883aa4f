"""Adds Sophia's figures to what the Trainer logs, before any reporter sees it."""

from __future__ import annotations

import time
from typing import Any

from transformers.trainer_callback import TrainerCallback

from .engine import find_sophia


class SophiaCallback(TrainerCallback):
    """Logs `sophia/win_rate`, `sophia/hessian_norm` and `sophia/hessian_time_fraction` beside the training loss.

    Registration adds it to every Trainer; without a Sophia optimizer it does nothing, and added a second time by
    hand it logs once. The time fraction is the
    share of wall-clock time since the last log that this process spent in Hessian passes. Once an estimate has been
    dropped, `sophia/hessian_skipped` counts them.
    """

    def __init__(self) -> None:
        self._wall = 0.0
        self._hessian = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        sophia = find_sophia(optimizer)
        if sophia is not None:
            self._wall, self._hessian = time.perf_counter(), sophia.hessian_seconds

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        sophia = find_sophia(optimizer)
        if sophia is None or logs is None or "loss" not in logs or "sophia/win_rate" in logs:
            return
        stats = sophia.stats()
        now = time.perf_counter()
        figures = {
            "sophia/win_rate": float(stats["win_rate"]),
            "sophia/hessian_norm": float(stats["hessian_norm"]),
            "sophia/hessian_time_fraction": (stats["hessian_seconds"] - self._hessian) / max(now - self._wall, 1e-9),
        }
        if stats["hessian_skipped"]:
            figures["sophia/hessian_skipped"] = stats["hessian_skipped"]
        self._wall, self._hessian = now, stats["hessian_seconds"]
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
