"""Adds Sophia's figures to what the Trainer logs, before any reporter sees it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from ..optim import LogFigures
from .engine import find_sophia


class SophiaCallback(TrainerCallback):
    """Logs `sophia/win_rate`, `sophia/hessian_norm` and `sophia/hessian_time_fraction` beside the training loss.

    Registration adds it to every Trainer; without a Sophia optimizer it does nothing, and added a second time by
    hand it logs once. The time fraction is the share of wall-clock time since the last log that this process spent
    in Hessian passes. Once an estimate has been dropped, `sophia/hessian_skipped` counts them.
    """

    def __init__(self) -> None:
        self._figures = LogFigures()

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        sophia = find_sophia(optimizer)
        if sophia is not None:
            self._figures.restart(sophia)

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
        read = self._figures.read(sophia)
        figures = {name: float(value) if isinstance(value, Tensor) else value for name, value in read.items()}
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
