"""The callback that writes a Lightning run into its folder, and stops it after a signal."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ...errors import UserError
from .run_folder import RunFolder
from .run_log import RunLog, tokens_in
from .signals import StopRequest

_VALIDATION = ("val_loss", "eval_loss", "valid_loss", "validation_loss", "val/loss", "valid/loss", "eval/loss")
_STOPPED = "stopped-"


class Stopped(Exception):
    """Ends `Trainer.fit` after a signal, once the checkpoint is saved."""


class RunFolderCallback(Callback):
    """Logs the mean training loss every `log_every_n_steps` and the validation loss; keeps checkpoints in the folder.

    The training loss is what `training_step` returns, averaged over all micro-batches and ranks since the last log; the
    sum so far is part of the checkpoint, so that a resumed run logs the same. The validation loss is the first of
    ``val_loss``, ``eval_loss``, … that the module logs. Counts tokens where batches hold ``input_ids``.

    Args:
        folder: the run folder.
        stop: the wish to stop; then the step is finished and a checkpoint saved, in all processes.

    Attributes:
        step, epoch: optimizer steps and epochs so far.
        began: whether training has begun.
    """

    def __init__(self, folder: RunFolder, stop: StopRequest) -> None:
        self.folder, self.stop, self.run_log = folder, stop, RunLog(folder.metrics)
        self.main = stop.processes.main
        self.step, self.epoch, self.began = 0, 0.0, False
        self._trainer: Trainer | None = None
        self._loss: Any = 0.0
        self._tokens: Any = 0
        self._micro_batches = 0
        self._seen: dict[str, Any] = {}

    @property
    def tokens(self) -> int:
        """Tokens that all ranks have trained on, those of earlier sessions included; every rank must ask."""
        return int(self._reduced(self._tokens, "sum"))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        here = str(self.folder.checkpoints)
        for callback in (item for item in trainer.checkpoint_callbacks if isinstance(item, ModelCheckpoint)):
            if callback.dirpath not in (None, here):
                raise UserError(
                    "trainer.callbacks: leave dirpath out of ModelCheckpoint: checkpoints are kept in the run folder, "
                    "and a run goes on from them"
                )
            callback.dirpath = here

    def state_dict(self) -> dict[str, Any]:
        loss = float(self._reduced(self._loss, "mean"))
        return {"loss": loss, "micro_batches": self._micro_batches, "tokens": self.tokens, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loss, self._micro_batches, self.epoch = (state_dict[key] for key in ("loss", "micro_batches", "epoch"))
        self._tokens = state_dict["tokens"] if self.main else 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop.take()  # the signals, from Lightning, which would stop in the middle of a window
        self.step, self.began = trainer.global_step, True
        if self.main:
            self.run_log.begin(self.step, _last_step(trainer))
            self.run_log.show_bar()
        if self.stop.agree() is not None:
            raise Stopped

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.log_every_n_steps and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            self._seen = {"lr": float(optimizer.param_groups[0]["lr"]), "grad_norm": _gradient_norm(optimizer)}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            # Lightning has divided the loss by the length of the window
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._loss = self._loss + loss.detach().float() * scale
            self._micro_batches += 1
        self._tokens = self._tokens + tokens_in(batch)
        self.epoch = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        before, self.step, every = self.step, trainer.global_step, trainer.log_every_n_steps
        if self.step == before:
            return
        self.run_log.move(self.step)
        if every and self.step // every > before // every and self._micro_batches:
            self._write_training(trainer)
        if self.stop.agree() is not None and self.step != _last_step(trainer):
            trainer.save_checkpoint(self.folder.checkpoints / f"{_STOPPED}{self.step}.ckpt")
            if self.main:
                drop_stopped(self.folder, but=self.step)
            raise Stopped

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = next((name for name in _VALIDATION if name in trainer.callback_metrics), None)
        if self.main and name is not None and not trainer.sanity_checking:
            self.run_log.validation(self.step, self.epoch, {"eval_loss": float(trainer.callback_metrics[name])})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run_log.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.run_log.close()

    def _write_training(self, trainer: Trainer) -> None:
        figures = {"loss": float(self._reduced(self._loss / self._micro_batches, "mean")), **self._seen}
        self._loss, self._micro_batches, self._seen = 0.0, 0, {}
        logged = trainer.callback_metrics.items()
        figures |= {name: float(value) for name, value in logged if name.startswith("sophia/")}
        if self.main:
            self.run_log.training(self.step, self.epoch, figures)

    def _reduced(self, value: Any, how: str) -> torch.Tensor:
        """The sum or mean of all ranks; every rank must call this."""
        tensor = torch.as_tensor(value, device=self._trainer.strategy.root_device)
        return self._trainer.strategy.reduce(tensor.clone(), reduce_op=how)


def drop_stopped(folder: RunFolder, but: int | None = None) -> None:
    """Deletes the checkpoints that earlier stops left, except one after `but` steps."""
    for path in folder.checkpoints.glob(f"{_STOPPED}*.ckpt"):
        if path.name == f"{_STOPPED}{but}.ckpt":
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _last_step(trainer: Trainer) -> int | None:
    """The optimizer step at which training ends by itself, once it has begun; None without one."""
    steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) else None


def _gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    """L2 norm of all gradients, before they are clipped."""
    norms = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                norm = torch.linalg.vector_norm(param.grad, dtype=torch.float32)
                norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
