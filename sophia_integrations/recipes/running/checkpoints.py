"""Checkpoints of a run folder: which is the newest that can be read whole; never deletes one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME = re.compile(r"checkpoint-(\d+)")
_NEEDED = ("optimizer.pt", "scheduler.pt")


@dataclass(frozen=True)
class Checkpoint:
    """A readable checkpoint: its folder, its step, and the trainer's state as stored."""

    path: Path
    step: int
    state: dict[str, Any]

    @classmethod
    def at(cls, path: Path) -> Checkpoint:
        """The checkpoint in `path`, which another process has found whole."""
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        return cls(path, state["global_step"], state)

    @property
    def finished(self) -> bool:
        """Whether training had reached its last step."""
        return self.step >= self.state["max_steps"]

    @property
    def processes(self) -> int:
        """How many processes trained: each leaves its random state."""
        return len(list(self.path.glob("rng_state*.pth")))


def last_good(folder: Path, say: Callable[[str], object]) -> Checkpoint | None:
    """The newest checkpoint of `folder` that can be read whole, or None.

    Newer ones that cannot are reported through `say` and renamed to ``broken-checkpoint-N``, so that a later
    checkpoint of the same step is written into an empty folder.
    """
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    for step, path in sorted(found, reverse=True):
        try:
            return Checkpoint(path, step, _read(path, step))
        except Exception as error:  # whatever a damaged file makes its reader raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            aside = free_name(folder / f"broken-{path.name}")
            path.rename(aside)
            say(f"Skipping {path}, which is not whole ({reason}); it is kept as {aside.name}.")
    return None


def _read(path: Path, step: int) -> dict[str, Any]:
    import safetensors.torch
    import torch

    state_file = path / "trainer_state.json"
    if not state_file.is_file():
        raise ValueError("trainer_state.json is missing")
    state = json.loads(state_file.read_text(encoding="utf-8"))
    if state["global_step"] != step or not isinstance(state["max_steps"], int):
        raise ValueError("trainer_state.json belongs to another step")
    for name in _NEEDED:
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(path / name, map_location="cpu", weights_only=True)
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ValueError("the weights are missing")
    for file in weights:
        safetensors.torch.load_file(file)
    states = list(path.glob("rng_state*.pth"))
    if not states:
        raise ValueError("rng_state.pth is missing")
    for name in states:
        with open(name, "rb") as file:  # its numpy parts need transformers' own list of safe types
            torch._C.PyTorchFileReader(file)
    return state


def free_name(path: Path) -> Path:
    """`path`, or the first of ``path-2``, ``path-3``, … that does not exist."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
