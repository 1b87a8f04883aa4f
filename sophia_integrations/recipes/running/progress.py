"""Progress of a run of ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import ProgressCallback

from .bar import Bar


class RunProgress(ProgressCallback):
    """Our bar or lines in place of the Trainer's, which keeps its own bar of an evaluation; starts at the resumed
    step."""

    bar: Bar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = Bar(state.global_step, state.max_steps)
            self.training_bar = self.bar.live

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.move(state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or not state.is_world_process_zero:
            return
        bar = self.bar or Bar(state.global_step, state.max_steps, lines=True)  # an evaluation without training
        if "eval_loss" in logs:
            bar.validation(state.global_step, logs)
        elif "loss" in logs:
            bar.training(state.global_step, logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.training_bar = None
