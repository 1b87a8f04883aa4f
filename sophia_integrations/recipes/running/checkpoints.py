"""Checkpoints of the Trainer: put in place as a whole, found again when whole, dropped when too many."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, first_line
from .run_folder import free_name

SAVING = ".saving"
"""The folder in a run folder where the Trainer writes a checkpoint before it gets its place."""
COUNTS = "counts.json"
"""What `RecipeTrainer` has counted, in a checkpoint."""

_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A readable checkpoint: its folder, its step, and the Trainer's state as stored."""

    path: Path
    step: int
    state: dict[str, Any]

    @classmethod
    def at(cls, path: Path) -> Checkpoint:
        """The checkpoint in `path`, which some process has found whole."""
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        return cls(path, state["global_step"], state)

    @property
    def finished(self) -> bool:
        """Whether training had reached its last step."""
        return self.step >= self.state["max_steps"]

    @property
    def processes(self) -> int:
        """How many processes trained: each leaves its random state."""
        return len(list(self.path.glob("rng_state*.pth")))

    def counts(self) -> dict[str, Any]:
        """What `RecipeTrainer` had counted."""
        file = self.path / COUNTS
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def saved_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a Trainer in `folder`, whole or not, each with its step, the newest last."""
    matches = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def newest_whole(folder: Path, say: Callable[[str], object]) -> Checkpoint | None:
    """The newest checkpoint of `folder` that can be read whole, or None.

    Newer ones that cannot are reported through `say` and renamed to ``broken-checkpoint-N``, so that a later
    checkpoint of the same step is written into an empty folder; none is deleted.
    """
    for step, path in reversed(saved_checkpoints(folder)):
        with put_aside_if_broken(path, folder / f"broken-{path.name}", say):
            _read(path, step)
            return Checkpoint.at(path)
    return None


@contextlib.contextmanager
def put_aside_if_broken(path: Path, aside: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Around the reading of a checkpoint: one that cannot be read is reported and renamed."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        aside = free_name(aside)
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
        kept = aside.relative_to(path.parent)
        say(f"Skipping {path}, which is not whole ({first_line(error)}); it is kept as {kept}.")


def _read(path: Path, step: int) -> None:
    """Raises some exception unless everything that resuming takes can be read."""
    import safetensors.torch
    import torch
    from transformers.trainer_pt_utils import safe_globals

    state = Checkpoint.at(path)
    if state.step != step or not isinstance(state.state["max_steps"], int):
        raise ValueError(f"{_STATE} belongs to another step")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(path / name, map_location="cpu", weights_only=True)
    weights, random_states = list(path.glob("*.safetensors")), list(path.glob("rng_state*.pth"))
    if not weights or not random_states:
        raise ValueError(f"{'rng_state.pth is' if weights else 'the weights are'} missing")
    for file in weights:
        safetensors.torch.load_file(file)
    for file in random_states:
        with safe_globals():  # it holds numbers of numpy
            torch.load(file, map_location="cpu", weights_only=True)


def put_in_place(new: Path, folder: Path) -> None:
    """Gives the checkpoint `new`, written elsewhere on the same disk, its place in `folder`, once the disk holds it."""
    if not (folder / new.name).exists():  # or it has been saved at this very step
        _flush(*new.rglob("*"), new)
        new.rename(folder / new.name)
        _flush(folder)


def drop_oldest(folder: Path, keep: int | None, best: str | None = None) -> None:
    """Deletes the oldest checkpoints of `folder` until `keep` are left; the newest and the `best` stay."""
    if not keep or keep < 1:
        return
    found = saved_checkpoints(folder)
    surplus = [path for _, path in found[:-1] if best is None or path.name != Path(best).name]
    for path in surplus[: max(0, len(found) - keep)]:
        shutil.rmtree(path, ignore_errors=True)


def _flush(*paths: Path) -> None:
    """Makes the disk hold files and folders now, before anything else is told of them."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
