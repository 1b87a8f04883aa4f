"""What Sophia refuses, and the sentence that says so."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ranges import require_in_range

_FIXED_IN_A_RUN = ("betas", "rho", "eps", "weight_decay", "hessian_interval", "maximize")
_NUMBERS = ("lr", "rho", "eps", "weight_decay")
_INTERNAL = ("torch", __name__.partition(".")[0])


def check_hyperparameters(options: dict[str, Any]) -> None:
    """Raise ValueError for a hyperparameter of one parameter group that is out of range."""
    for name, value in options.items():
        if isinstance(value, Tensor) and name in _NUMBERS:
            if name != "lr" or value.numel() != 1:
                raise ValueError(f"{name} must be a number; only lr may be a tensor, with one element.")
            value = value.item()
        require_in_range(**{name: value})


def check_parameter(param: Tensor) -> None:
    """Raise ValueError for a parameter that Sophia cannot train."""
    if param.layout != torch.strided:
        raise ValueError("Sophia does not support sparse parameters; keep them in another optimizer.")
    if param.is_complex():
        raise ValueError("Sophia does not support complex parameters; train torch.view_as_real of them instead.")
    if not param.is_floating_point():
        raise ValueError(f"Sophia trains floating-point parameters only, got dtype {param.dtype}.")


def check_loadable(state_dict: dict[str, Any], params: Sequence[Tensor]) -> None:
    """Raise ValueError when the checkpoint was written by another optimizer or for other parameters."""
    states = state_dict["state"].values()
    if any("exp_avg_sq" in s and "hessian" not in s for s in states):
        raise ValueError(
            "this checkpoint was written by Adam or AdamW (it has exp_avg_sq and no hessian): Sophia cannot resume "
            "it. Load the weights only and start with a new optimizer state."
        )
    if any("hessian" in s for s in states) and any("capturable" in g for g in state_dict["param_groups"]):
        raise ValueError(
            "this checkpoint was written by the official SophiaG, whose hessian lacks the number of predictions: "
            "multiply every 'hessian' by the bs of its step(), delete 'step' from every state and 'capturable' "
            "from every group, then load it."
        )
    if any(s and "hessian" not in s for s in states):
        raise ValueError("this checkpoint has optimizer state without 'hessian': it is not one of Sophia.")
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    for i, param in zip(saved_ids, params, strict=False):
        for key, value in state_dict["state"].get(i, {}).items():
            if isinstance(value, Tensor) and value.shape != param.shape:
                raise ValueError(
                    f"the checkpoint's {key} of parameter {i} has shape {tuple(value.shape)}, the parameter "
                    f"{tuple(param.shape)}: it belongs to another model."
                )


def warn_changed_hyperparameters(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Warn once for hyperparameters whose saved value is about to replace the one asked for."""
    changed = {}
    for now, then in zip(current, saved, strict=False):
        for name in _FIXED_IN_A_RUN:
            if name in then and _plain(then[name]) != _plain(now[name]):
                changed[name] = f"{name}={then[name]} (you asked for {now[name]})"
    if changed:
        warn_caller(
            f"the checkpoint's values replace the ones given: {'; '.join(changed.values())}. To change them in a "
            "resumed run, set optimizer.param_groups after loading."
        )


def warn_caller(message: str) -> None:
    """Warn at the line that called into torch or this package, however many wrappers lie between."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value
