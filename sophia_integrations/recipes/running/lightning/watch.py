"""Callbacks of a Lightning run: what goes into ``metrics.jsonl`` and onto the screen, and the stop on a signal."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..bar import Bar
from ..event_file import EventFile
from ..folder import RunFolder
from ..signals import SignalWatch

_VALIDATION = ("val_loss", "eval_loss", "valid_loss", "validation_loss", "val/loss", "valid/loss", "eval/loss")
_STOPPED = "stopped-"


class RunMetrics(Callback):
    """Writes and shows the mean training loss every `log_every_n_steps`, and the validation loss.

    The training loss is what `training_step` returns, averaged over all micro-batches and ranks since the last log; the
    sum so far is part of the checkpoint, so that a resumed run logs the same. The validation loss is the first of
    ``val_loss``, ``eval_loss``, … that the module logs. Counts tokens where batches hold ``input_ids``.

    Args:
        events: the file of the metrics.
        main: whether this process writes and prints.

    Attributes:
        step, epoch: optimizer steps and epochs so far.
        began: whether training has begun.
    """

    def __init__(self, events: EventFile, main: bool) -> None:
        self.events, self.main = events, main
        self.step, self.epoch, self.began = 0, 0.0, False
        self._bar: Bar | None = None
        self._trainer: Trainer | None = None
        self._loss: Any = 0.0
        self._tokens: Any = 0
        self._micro_batches = 0
        self._seen: dict[str, Any] = {}

    @property
    def tokens(self) -> int:
        """Tokens that all ranks have trained on, those of earlier sessions included."""
        return int(self._reduced(self._tokens, "sum"))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        loss = self._reduced(self._loss, "mean")
        counts = {"micro_batches": self._micro_batches, "tokens": self.tokens, "epoch": self.epoch}
        return {"loss": float(loss), **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loss, self._micro_batches, self.epoch = (state_dict[key] for key in ("loss", "micro_batches", "epoch"))
        self._tokens = state_dict["tokens"] if self.main else 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step, self.began = trainer.global_step, True
        if self.main:
            self.events.resume_at(self.step)
            self._bar = Bar(self.step, last_step(trainer))

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
        self._tokens = self._tokens + _tokens(batch)
        self.epoch = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        before, self.step, every = self.step, trainer.global_step, trainer.log_every_n_steps
        if self.step == before:
            return
        if self._bar is not None:
            self._bar.move(self.step)
        if every and self.step // every > before // every and self._micro_batches:
            self._log(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = next((name for name in _VALIDATION if name in trainer.callback_metrics), None)
        if trainer.sanity_checking or name is None or not self.main:
            return
        figures = {"eval_loss": float(trainer.callback_metrics[name])}
        self.events.append(self.step, self.epoch, figures)
        (self._bar or Bar(self.step, trainer.max_steps if trainer.max_steps > 0 else None, lines=True)).validation(
            self.step, figures
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            self._bar.close()

    def _log(self, trainer: Trainer) -> None:
        figures = {"loss": float(self._reduced(self._loss / self._micro_batches, "mean")), **self._seen}
        self._loss, self._micro_batches, self._seen = 0.0, 0, {}
        for name, value in trainer.callback_metrics.items():
            if name.startswith("sophia/"):
                figures[name] = float(value)
        if self.main:
            self.events.append(self.step, self.epoch, figures)
            self._bar.training(self.step, figures)

    def _reduced(self, value: Any, how: str) -> torch.Tensor:
        """The sum or mean of all ranks; every rank must call this."""
        tensor = torch.as_tensor(value, device=self._trainer.strategy.root_device)
        return self._trainer.strategy.reduce(tensor.clone(), reduce_op=how)


class Stopped(Exception):
    """Ends `Trainer.fit` after a signal, once the checkpoint is saved."""


class StopOnSignal(Callback):
    """On SIGINT or SIGTERM: finish the step, save a checkpoint, stop, in all processes."""

    def __init__(self, watch: SignalWatch, folder: RunFolder) -> None:
        self.watch, self.folder = watch, folder
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with contextlib.suppress(ValueError):  # not the main thread
            self.watch.take()  # from Lightning, which would stop in the middle of a window
        self._step = trainer.global_step
        if self.watch.agree() is not None:
            raise Stopped

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._step = self._step, trainer.global_step
        if self._step == before or self.watch.agree() is None or self._step == last_step(trainer):
            return
        target = self.folder.checkpoints / f"{_STOPPED}{self._step}.ckpt"
        trainer.save_checkpoint(target)
        if trainer.is_global_zero:
            drop_stopped(self.folder, keep=target.name)
        raise Stopped


def drop_stopped(folder: RunFolder, keep: str = "") -> None:
    """Deletes the checkpoints that earlier stops left."""
    for path in folder.checkpoints.glob(f"{_STOPPED}*.ckpt"):
        if path.name == keep:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def last_step(trainer: Trainer) -> int | None:
    """The optimizer step at which training ends by itself, once it has begun; None without one."""
    steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) else None


def _tokens(batch: Any) -> Any:
    """Tokens of a batch without padding; 0 where it has none."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return 0
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else mask.sum()


def _gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    """L2 norm of all gradients, before they are clipped."""
    norms = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                norm = torch.linalg.vector_norm(param.grad, dtype=torch.float32)
                norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
