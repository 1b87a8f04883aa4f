"""Progress of a run: a live bar on a terminal, one plain line per log elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback


class RunProgress(ProgressCallback):
    """The Trainer's bar with loss and win rate beside the time left; starts at the resumed step."""

    def __init__(self) -> None:
        super().__init__()
        self.live = sys.stdout.isatty()
        self.values: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = self.first_step = state.global_step
        self.began = time.monotonic()
        if self.live and state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                unit="step",
                file=sys.stdout,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self._say(f"step {state.global_step}/{state.max_steps}  validation loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            self.values = {"loss": f"{logs['loss']:.4f}"}
            if isinstance(logs.get("sophia/win_rate"), float):
                self.values["win rate"] = f"{logs['sophia/win_rate']:.2f}"
            if self.training_bar is not None:
                self.training_bar.set_postfix(self.values)
            else:
                pace = (time.monotonic() - self.began) / max(1, state.global_step - self.first_step)
                words = "  ".join(f"{name} {value}" for name, value in self.values.items())
                left = _clock(pace * (state.max_steps - state.global_step))
                self._say(f"step {state.global_step}/{state.max_steps}  {words}  {left} left")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _say(self, line: str) -> None:
        if self.training_bar is not None:
            self.training_bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
