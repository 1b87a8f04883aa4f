"""The state of a run: m and h of each parameter, and the counters that live in the parameter groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

Groups = list[dict[str, Any]]
States = MutableMapping[Tensor, dict[str, Tensor]]

COUNTERS: dict[str, Any] = {
    "step": 0,
    "hessian_updates": 0,
    "hessian_skipped": 0,
    "hessian_step": 0,
    "batch_predictions": 0,
    "auto_rho": 0.0,
    "peak_lr": 0.0,
    "win_rate": 0.0,
    "curvature_share": 0.0,
}
"""What the run knows of itself; equal in all groups, and part of them so that every kind of checkpoint has it."""


def note(groups: Groups, **counters: Any) -> None:
    """Set counters, in every group."""
    for group in groups:
        group.update(counters)


def hyperparameters_of(groups: Groups) -> str:
    """What the groups were given, a line each; what the run counts is in `SophiaG.stats()`."""
    lines = []
    for number, group in enumerate(groups):
        lines.append(f"Parameter group {number}: {len(group['params'])} parameters\n")
        lines += [f"    {key}: {group[key]}\n" for key in sorted(group) if key != "params" and key not in COUNTERS]
    return "".join(lines)


def sophia_members(groups: Groups) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Every parameter that Sophia updates, with its group."""
    for group in groups:
        if group["update"] == "sophia":
            yield from ((param, group) for param in group["params"])


def state_dtype(param: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(param.dtype, torch.float32)


def state_of(states: States, param: Tensor) -> dict[str, Tensor]:
    """The state of a parameter of Sophia's, with m and h of zeros where they are missing."""
    state = states[param]
    for key in ("exp_avg", "hessian"):
        if key not in state:
            state[key] = torch.zeros_like(param, dtype=state_dtype(param), memory_format=torch.preserve_format)
    return state


def restore(states: States, param: Tensor, saved: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Copy what a checkpoint has for `param`, in `dtype`, and what has its shape in its layout."""
    for key, value in saved.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if key == "step":
            states[param][key] = value.to(param.device, torch.float32, copy=True)
        elif value.shape == param.shape:
            restored = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            states[param][key] = restored.copy_(value)
        else:
            states[param][key] = value.to(param.device, dtype, copy=True)


def no_autocast(groups: Groups) -> torch.autocast:
    """Products in the state's own dtype, wherever the step is taken."""
    return torch.autocast(groups[0]["params"][0].device.type, enabled=False)
