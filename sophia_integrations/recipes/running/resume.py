"""What a plain Trainer needs to stop and go on exactly: signals, and the running loss between two logs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .signals import SignalWatch


class RunningLoss(TrainerCallback, ExportableState):
    """Carries the loss summed since the last log through a checkpoint.

    The Trainer forgets it, so the first log after a resume in mid-interval would average fewer steps.  Stored in
    ``trainer_state.json``, which is written last: a whole checkpoint always has it.
    """

    def __init__(self) -> None:
        self.trainer: Any = None

    def state(self) -> dict[str, Any]:
        running = getattr(self.trainer, "running_loss", None)  # absent until a checkpoint is saved
        if running is None:
            return {"args": {}, "attributes": {}}
        kept = {"sum": running, "last_logged": self.trainer._globalstep_last_logged}
        return {"args": {}, "attributes": {"kept": kept}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__) or {}
        kept = stored.get("attributes", {}).get("kept")
        if state.global_step and kept:
            self.trainer._tr_loss = torch.tensor(kept["sum"], device=args.device)
            self.trainer._globalstep_last_logged = kept["last_logged"]


class StopOnSignal(SignalWatch, TrainerCallback):
    """On SIGINT or SIGTERM: finish the step, save a checkpoint, stop.  A second signal ends the process at once.

    All processes of a run stop after the same step, whichever received it.  `signal` is the number, or None.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.agree() is not None and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.signal is not None and state.global_step < state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = False
        return control
