"""Random states in Lightning's checkpoints, which Lightning leaves out: a resumed run draws the same dropout masks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from ..optim.sharding import is_distributed


class ExactResume(Callback):
    """Stores the random states of every rank with each checkpoint, and sets them again where training goes on.

    Covers torch on the CPU and on the rank's CUDA devices, numpy and Python. A run that is resumed from the end of an
    epoch, or from anywhere with a loader that knows its position such as `TextDataModule`'s, then equals an
    uninterrupted one bit for bit. `CausalLM` brings this callback with it. A checkpoint of another number of ranks
    leaves the random states as they are.
    """

    def __init__(self) -> None:
        self._own: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        ranks: list[Any] = [random_states()]
        if is_distributed(None):
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, random_states())
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if is_distributed(None) else (0, 1)
        self._own = state_dict["ranks"][rank] if len(state_dict["ranks"]) == ranks else None
        if self._own is not None:
            set_random_states(self._own)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once more in the middle of an epoch, where the resumed run alone has just begun to iterate over its data."""
        if self._own is not None and trainer.fit_loop.batch_idx + 1 < trainer.num_training_batches:
            set_random_states(self._own)
        self._own = None


def random_states() -> dict[str, Any]:
    """The global random states of this process, as tensors and plain numbers."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(name), keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Go on from what `random_states` gave."""
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(tuple(states["numpy"]))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
