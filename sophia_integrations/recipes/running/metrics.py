"""What a ``transformers.Trainer`` logs, as events of ``metrics.jsonl``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .event_file import EventFile

_RENAMED = {"learning_rate": "lr"}


class MetricsWriter(EventFile, TrainerCallback):
    """Appends every training and evaluation log to the file.

    Fields: ``step``, ``epoch``, ``seconds`` (training time so far, earlier sessions included), ``loss`` with
    ``lr`` (per step), ``grad_norm`` and ``sophia/*``, or ``eval_loss`` with ``eval_accuracy`` of a classification.
    A loss that is not finite is null.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.resume_at(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        wanted = ("eval_loss", "eval_accuracy") if "eval_loss" in logs else ("loss", "learning_rate", "grad_norm")
        figures = {_RENAMED.get(k, k): v for k, v in logs.items() if k in wanted or k.startswith("sophia/")}
        self.append(state.global_step, state.epoch, figures)
