"""A ``transformers.Trainer`` whose run can be stopped at any moment and goes on exactly, and its run folder's callback.

Of the Trainer's own methods only those that it documents for overriding are overridden: `training_step` and `log`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from .checkpoints import COUNTS, Checkpoint, drop_oldest, put_in_place
from .run_folder import RunFolder, write_text
from .run_log import RunLog, tokens_in
from .signals import StopRequest

_LOGGED = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
_EVALUATED = {"eval_loss": "eval_loss", "eval_accuracy": "eval_accuracy"}


class RecipeTrainer(Trainer):
    """A Trainer that counts the loss since the last log by itself, and tokens, so that a checkpoint can carry both.

    The Trainer forgets the loss summed so far, and its first log after a resume in mid-interval averages fewer steps.
    """

    def start_counting(self, checkpoint: Checkpoint | None = None) -> None:
        """From nothing, or where `checkpoint` was saved."""
        before = checkpoint.counts() if checkpoint is not None else {}
        rank, losses = self.args.process_index, before.get("loss", [])
        self._loss = torch.tensor(losses[rank] if rank < len(losses) else 0.0, device=self.args.device)
        self._tokens = torch.tensor(before.get("tokens", 0) if rank == 0 else 0, device=self.args.device)
        self._logged_at = before.get("logged_at", 0 if checkpoint is None else checkpoint.step)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._loss = self._loss + loss
        self._tokens = self._tokens + tokens_in(inputs)
        if getattr(self.model.config, "is_encoder_decoder", False):
            self._tokens = self._tokens + (inputs["labels"] >= 0).sum()
        return loss

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and not self.args.logging_nan_inf_filter:
            logs["loss"] = self._loss_of_ranks().mean().item() / (self.state.global_step - self._logged_at)
        if "loss" in logs:
            self._loss, self._logged_at = torch.zeros_like(self._loss), self.state.global_step
        super().log(logs, *args, **kwargs)

    def counts(self) -> dict[str, Any]:
        """What a checkpoint carries; every process must call this."""
        tokens = int(self.accelerator.gather(self._tokens.reshape(1)).sum())
        return {"loss": self._loss_of_ranks().tolist(), "tokens": tokens, "logged_at": self._logged_at}

    def _loss_of_ranks(self) -> Tensor:
        return self.accelerator.gather(self._loss.reshape(1))


class RunFolderCallback(TrainerCallback):
    """Writes a Trainer's logs and checkpoints into its run folder, and stops it after a signal.

    The Trainer saves aside, into its `output_dir`; here each checkpoint gets its place once all of it is there.

    Args:
        folder: the run folder.
        log: its log.
        stop: the wish to stop; then the step is finished and a checkpoint saved.
        keep: checkpoints at most; None for all.
    """

    def __init__(self, folder: RunFolder, log: RunLog, stop: StopRequest, keep: int | None) -> None:
        self.folder, self.run_log, self.stop, self.keep = folder, log, stop, keep
        self.processes = stop.processes
        self.trainer: RecipeTrainer | None = None  # set once there is one
        self.checkpoint: Checkpoint | None = None  # where training goes on

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.start_counting(self.checkpoint)
        if self.processes.main:
            self.run_log.begin(state.global_step, state.max_steps)
            self.run_log.show_bar()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.run_log.move(state.global_step)
        if self.stop.agree() is not None and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.stop.signal is not None and state.global_step < state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = False
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not self.processes.main or not logs:
            return
        names, write = (
            (_EVALUATED, self.run_log.validation) if "eval_loss" in logs else (_LOGGED, self.run_log.training)
        )
        if "loss" in logs or "eval_loss" in logs:
            figures = {ours: logs[name] for name, ours in names.items() if name in logs}
            figures |= {name: value for name, value in logs.items() if name.startswith("sophia/")}
            write(state.global_step, state.epoch, figures)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counts = self.trainer.counts()
        new = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.best_model_checkpoint == str(new):
            state.best_model_checkpoint = str(self.folder.path / new.name)
        self.processes.agree()  # every process has written its part
        if self.processes.main:
            write_text(new / COUNTS, json.dumps(counts))
            state.save_to_json(str(new / "trainer_state.json"))
            put_in_place(new, self.folder.path)
            drop_oldest(self.folder.path, self.keep, state.best_model_checkpoint)
        self.processes.agree()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run_log.close()
