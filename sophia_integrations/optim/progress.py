"""How far a run is: what it counts and has found out, beside the hyperparameters of the groups and m and h."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor

KEY = "progress"
"""In the state of every parameter. In memory it is a place without numbers; a state dict has them there, because
`torch.distributed.checkpoint` in its flattened form loads nothing but what a state or a group has in memory."""


@dataclass
class Progress:
    """What an optimizer knows of its run; one for all groups. New fields come last: checkpoints have them in order.

    Attributes:
        step: steps made.
        hessian_updates, hessian_skipped: estimates made and dropped.
        hessian_step: the step of the last estimate.
        batch_predictions: N of the noise floor, predictions of the batch of that step.
        auto_rho: ρ where it is "auto".
        peak_lr: the largest learning rate that such a ρ was set at.
        win_rate, curvature_share: as in `SophiaG.stats()`.
    """

    step: int = 0
    hessian_updates: int = 0
    hessian_skipped: int = 0
    hessian_step: int = 0
    batch_predictions: int = 0
    auto_rho: float = 0.0
    peak_lr: float = 0.0
    win_rate: float = 0.0
    curvature_share: float = 0.0

    def as_tensor(self, device: torch.device) -> Tensor:
        """The fields in order, float64; on the CPU where `device` has no float64."""
        return torch.tensor(astuple(self), dtype=torch.float64, device="cpu" if device.type == "mps" else device)

    @classmethod
    def of_tensor(cls, values: Tensor) -> Progress:
        """What `as_tensor` of this or an older version made."""
        return cls(*(type(field.default)(x) for field, x in zip(fields(cls), values.tolist(), strict=False)))


def place() -> Tensor:
    """What a state has in memory under `KEY`."""
    return torch.empty(0, dtype=torch.float64)


def saved_in(states: Iterable[MutableMapping[str, Any]], groups: Iterable[MutableMapping[str, Any]]) -> Progress:
    """The progress in a checkpoint; a new one where it has none. What older versions kept in the groups is removed.

    Raises:
        ValueError: the loader has lost it.
    """
    older = taken_from(groups)
    for values in (state[KEY] for state in states if KEY in state):
        if isinstance(values, Tensor) and len(values):
            return Progress.of_tensor(values)
        raise ValueError(
            "the counters of the run are lost on the way from this checkpoint. Of an older version's, "
            "torch.distributed.checkpoint finds them only without flatten_optimizer_state_dict: save it so by that "
            "version. Otherwise save optimizer.state_dict(), and not what is in optimizer.state."
        )
    return older


def taken_from(groups: Iterable[MutableMapping[str, Any]]) -> Progress:
    """Remove from groups what older versions kept there."""
    progress = Progress()
    for group in groups:
        for field in fields(Progress):
            if field.name in group:
                setattr(progress, field.name, group.pop(field.name))
    return progress
