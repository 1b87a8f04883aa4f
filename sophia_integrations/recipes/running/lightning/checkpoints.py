"""Lightning's checkpoints of a run folder: which is the newest that can be read whole; never deletes one."""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ....errors import UserError
from ..checkpoints import free_name


@dataclass(frozen=True)
class LightningCheckpoint:
    """A readable checkpoint: its file (a folder, where ranks saved their shards), and its optimizer step."""

    path: Path
    step: int

    def options(self, entry: Callable[..., Any]) -> dict[str, Any]:
        """What `Trainer.fit` or `Trainer.validate` takes to begin here, without running code that the file holds."""
        safely = {"weights_only": True} if "weights_only" in inspect.signature(entry).parameters else {}
        return {"ckpt_path": str(self.path), **safely}


def last_good_lightning(folder: Path, processes: int, say: Callable[[str], object]) -> LightningCheckpoint | None:
    """The newest checkpoint of `folder` that can be read whole, or None.

    Those that cannot are reported through `say` and moved into ``broken/``.

    Raises:
        UserError: it was made by another number of processes, or holds objects that only running code could restore.
    """
    steps: dict[Path, int] = {}
    for path in folder.glob("*.ckpt"):
        state = _read(path, say, whole=False)
        if state is not None:
            steps[path] = state["global_step"]
    for path in sorted(steps, key=lambda path: (steps[path], path.name), reverse=True):
        state = _read(path, say, whole=True)
        if state is not None:
            _require_processes(state, folder, processes)
            return LightningCheckpoint(path, steps[path])
    return None


class KeptInFolder(Callback):
    """Keeps the checkpoints of every `ModelCheckpoint` in the run folder, also after the folder was moved."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for callback in trainer.checkpoint_callbacks:
            if getattr(callback, "dirpath", "") is None:
                callback.dirpath = self.folder

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Makes what a `ModelCheckpoint` remembers name the files that there are."""
        for state in (checkpoint.get("callbacks") or {}).values():
            if isinstance(state, dict) and {"dirpath", "best_k_models"} <= state.keys():
                state["dirpath"] = self.folder
                known = {self._here(path): score for path, score in state["best_k_models"].items()}
                state["best_k_models"] = {path: score for path, score in known.items() if os.path.exists(path)}
                for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[name] = self._here(state.get(name) or "")

    def _here(self, path: str) -> str:
        return os.path.join(self.folder, os.path.basename(path)) if path else ""


def _read(path: Path, say: Callable[[str], object], *, whole: bool) -> dict[str, Any] | None:
    """The state in `path`, with its tensors when it is read `whole`; None after putting a broken one aside."""
    import torch

    file = path / "meta.pt" if path.is_dir() else path
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=not whole)
        if not isinstance(state["global_step"], int):
            raise ValueError("it has no step")
        return state
    except Exception as error:  # whatever a damaged file makes its reader raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise UserError(
                f"{path} holds objects that are not plain numbers, text and tensors, and running their code is not "
                f"safe; keep them out of save_hyperparameters and of on_save_checkpoint ({reason})"
            ) from None
        aside = free_name(path.parent / "broken" / path.name)
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
        say(f"Skipping {path}, which is not whole ({reason}); it is kept as {aside.relative_to(path.parent)}.")
        return None


def _require_processes(state: dict[str, Any], folder: Path, processes: int) -> None:
    saved = (state.get("callbacks") or {}).get("ExactResume")
    if saved is not None and len(saved["ranks"]) != processes:
        began = "one process" if len(saved["ranks"]) == 1 else f"{len(saved['ranks'])} processes"
        raise UserError(
            f"the run in {folder.parent} trains with {began}, and this is {processes}: its batches would be others. Go "
            f"on with --nproc {len(saved['ranks'])}, or use --fresh to start anew"
        )
