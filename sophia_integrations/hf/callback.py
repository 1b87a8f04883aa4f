"""Adds Sophia's figures to what the Trainer logs, before any reporter sees it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from ..optim import LogFigures
from ..optim.checks import warn_caller
from .integration import find_sophia


class SophiaCallback(TrainerCallback):
    """Logs the figures of `optim.LogFigures.flush`, such as `sophia/win_rate`, beside the training loss.

    Registration adds it to every Trainer; without a Sophia optimizer it does nothing, and added a second time by
    hand it logs once. The time fraction is the share of wall-clock time since the last log that this process spent
    in Hessian passes. Once an estimate has been dropped, `sophia/hessian_skipped` counts them. A training that ends
    without any estimate because nothing makes one is warned about.
    """

    def __init__(self) -> None:
        self._figures = LogFigures()

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        sophia = find_sophia(optimizer)
        if sophia is None:
            return
        self._figures.restart(sophia)
        if sophia.estimator is not None:
            # A training that broke off, as at a batch size too large for the memory, left micro-batches behind.
            sophia.estimator.arm(sophia.hessian_due)

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        sophia = find_sophia(optimizer)
        if sophia is None or sophia.estimator is not None:
            return
        if sophia.progress.step and not sophia.progress.hessian_updates:
            warn_caller(
                f"Sophia made {sophia.progress.step} steps without a single Hessian estimate: they were sign momentum "
                "under another name. Train with optim='sophia', which brings its estimator, or give the optimizer one: "
                "SophiaG(…, estimator=GaussNewtonBartlett(model))."
            )

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
        read = self._figures.flush(sophia)
        figures = {name: float(value) if isinstance(value, Tensor) else value for name, value in read.items()}
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
