"""Crash-safe checkpoints: written aside, flushed to the disk, renamed as a whole; only then is an older one dropped."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer

from .processes import Processes

_ASIDE, _DROPPED, _REPLACED = ".saving", ".dropped-", ".replaced-"
_STATE = "trainer_state.json"


class RecipeTrainer(Trainer):
    """A plain Trainer that never has half a checkpoint under the name of one.

    Attributes:
        processes: those of the run; set after construction.
        running_loss: loss summed since the last log, mean over the processes; as of the last checkpoint.
    """

    processes: Processes
    running_loss: float | None = None
    _saving = False
    _kept: int | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; checkpoints are deleted here alone, and the newest never."""
        self._kept, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.save_total_limit = self._kept

    def load_weights(self, checkpoint: str) -> None:
        """Gives the model the weights, or the adapters, of a checkpoint."""
        self._load_from_checkpoint(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A tied weight is stored once: that its other name is missing is no news."""
        if set(load_result.missing_keys) <= set(getattr(self.model, "_tied_weights_keys", None) or ()):
            self.model.tie_weights()
            load_result.missing_keys.clear()
        super()._issue_warnings_after_load(load_result)

    @property
    def _aside(self) -> Path:
        return Path(self.args.output_dir, _ASIDE)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside) if self._saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        self._saving = True
        try:
            with self.processes.quiet_if_another_failed():
                self.running_loss = self.accelerator.gather(self._tr_loss).mean().item()
                super()._save_checkpoint(model, trial, *args, **kwargs)
                self.processes.agree(0)
                if self.args.should_save:
                    self._put_in_place()
                self.processes.agree(0)
        finally:
            self._saving = False
            if self.args.should_save:
                shutil.rmtree(self._aside, ignore_errors=True)

    def _put_in_place(self) -> None:
        folder = Path(self.args.output_dir)
        new = self._aside / f"checkpoint-{self.state.global_step}"
        target = folder / new.name
        if self.state.best_model_checkpoint == str(new):
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(new / _STATE))
        _flush(new)
        if target.exists():
            target.rename(folder / f"{_REPLACED}{target.name}")
        new.rename(target)
        _flush_folder(folder)
        shutil.rmtree(folder / f"{_REPLACED}{target.name}", ignore_errors=True)
        best = self.state.best_model_checkpoint
        drop_oldest(folder, self._kept, Path(best).name if best else None)


def drop_oldest(folder: Path, keep: int | None, best: str | None = None) -> None:
    """Deletes the oldest checkpoints of `folder` until `keep` are left; the newest and the `best` stay."""
    if not keep or keep < 1:
        return
    found = sorted(_checkpoints(folder))
    surplus = [path for _, path in found[:-1] if path.name != best]
    for path in surplus[: max(0, len(found) - keep)]:
        _drop(path)


def tidy(folder: Path) -> None:
    """Takes away what a crash left in the middle of saving; a checkpoint that was being replaced is put back."""
    for path in folder.glob(f"{_REPLACED}*"):
        target = folder / path.name.removeprefix(_REPLACED)
        if target.exists():
            _drop(path)
        else:
            path.rename(target)
    shutil.rmtree(folder / _ASIDE, ignore_errors=True)
    for path in folder.glob(f"{_DROPPED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    matches = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return [(int(match[1]), path) for match, path in matches if match]


def _drop(path: Path) -> None:
    """Renamed first: a checkpoint under its own name is always whole."""
    gone = path.with_name(f"{_DROPPED}{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Makes the disk hold all of `folder` before its name does."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _flush_folder(path)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
