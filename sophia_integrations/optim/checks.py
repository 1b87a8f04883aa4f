"""What Sophia refuses, and the sentence that says so."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ranges import require_in_range
from .backends import require_fused
from .basis import asked_layout, basis_layout
from .progress import KEY
from .state import Groups

_FIXED_IN_A_RUN = (
    "betas",
    "rho",
    "eps",
    "weight_decay",
    "hessian_interval",
    "maximize",
    "nesterov",
    "bias_correction",
    "noise_floor",
    "unclipped",
    "momentum_dtype",
    "basis_interval",
    "basis_warmup",
    "basis_beta",
    "basis_factor_interval",
)
_SHAPES_THE_STATE = ("update", "basis", "basis_max_dim", "basis_flatten")
_CYCLES_MOMENTUM = ("max_momentum", "base_momentum")
"""What OneCycleLR leaves in a group whose betas it sets at every step."""
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


def check_group(group: dict[str, Any], interval: int, fused: bool | None) -> None:
    """Raise ValueError for a group that cannot be trained beside others with this interval, or not with `fused`."""
    check_hyperparameters(group)
    for param in group["params"]:
        check_parameter(param)
        if fused and group["update"] == "sophia":
            require_fused(param)
    if group["hessian_interval"] != interval:
        raise ValueError("hessian_interval must be one value for all groups: there is one Hessian pass.")
    if group["update"] == "sophia" and group["basis"] is not None:
        cap = group["basis_max_dim"]
        if not any([basis_layout(param, group) for param in group["params"]]):
            raise ValueError(
                f"basis={group['basis']!r} rotates matrices, and this parameter group has none"
                f"{f' that basis_max_dim={cap} lets it cut' if cap else ''}: leave basis out "
                "there, or give the group update='adamw'."
            )


def check_parameter(param: Tensor) -> None:
    """Raise ValueError for a parameter that Sophia cannot train."""
    if param.layout != torch.strided:
        raise ValueError("Sophia does not support sparse parameters; keep them in another optimizer.")
    if param.is_complex():
        raise ValueError("Sophia does not support complex parameters; train torch.view_as_real of them instead.")
    if not param.is_floating_point():
        raise ValueError(f"Sophia trains floating-point parameters only, got dtype {param.dtype}.")


def check_loadable(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError when the checkpoint was written by another optimizer, in another basis or for another model."""
    states, saved_groups = state_dict["state"], state_dict["param_groups"]
    if any("capturable" in g for g in saved_groups) and any("hessian" in s for s in states.values()):
        raise ValueError(
            "this checkpoint was written by the official SophiaG, whose hessian lacks the number of predictions: "
            "multiply every 'hessian' by the bs of its step(), delete 'step' from every state and 'capturable' "
            "from every group, then load it."
        )
    for saved, group in zip(saved_groups, groups, strict=False):
        saved_sophia = [states[i] for i in saved["params"] if states.get(i)]
        if saved.get("update", "sophia") == "sophia":
            _check_written_by_sophia(saved_sophia)
        for name in _SHAPES_THE_STATE:
            if saved_sophia and saved.get(name, _OF_OLD[name]) != group[name]:
                raise ValueError(
                    f"the checkpoint was written with {name}={saved.get(name, _OF_OLD[name])!r}, and this optimizer "
                    f"has {name}={group[name]!r}, with another state: build it as it was, or load the weights only."
                )
        for i, param in zip(saved["params"], group["params"], strict=False):
            _check_shapes(i, states.get(i, {}), param, group)


_OF_OLD = {"update": "sophia", "basis": None, "basis_max_dim": None, "basis_flatten": False}
"""What groups saved by an older version mean."""


def _check_written_by_sophia(states: Sequence[dict[str, Any]]) -> None:
    if any("exp_avg_sq" in s and "hessian" not in s for s in states):
        raise ValueError(
            "this checkpoint was written by Adam or AdamW (it has exp_avg_sq and no hessian): Sophia cannot resume "
            "it. Load the weights only and start with a new optimizer state."
        )
    if any("hessian" not in s for s in states):
        raise ValueError("this checkpoint has optimizer state without 'hessian': it is not one of Sophia.")


def _check_shapes(index: int, state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    layout = asked_layout(param, group)
    expected = {**(layout.shapes() if layout else {}), "step": ()}
    for key, value in state.items():
        if key != KEY and isinstance(value, Tensor) and tuple(value.shape) != tuple(expected.get(key, param.shape)):
            raise ValueError(
                f"the checkpoint's {key} of parameter {index} has shape {tuple(value.shape)}, the parameter "
                f"{tuple(param.shape)}: it belongs to another model."
            )


def warn_changed_hyperparameters(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Warn once for hyperparameters whose saved value is about to replace the one asked for."""
    changed = {}
    for now, then in zip(current, saved, strict=False):
        for name in _FIXED_IN_A_RUN:
            cycled = name == "betas" and any(key in then for key in _CYCLES_MOMENTUM)
            if name in then and not cycled and _plain(then[name]) != _plain(now[name]):
                changed[name] = f"{name}={then[name]} (you asked for {now[name]})"
    if changed:
        warn_caller(
            f"the checkpoint's values replace the ones given: {'; '.join(changed.values())}. To change them in a "
            "resumed run, set optimizer.param_groups after loading."
        )


def refuse_sparse_gradients(groups: Groups) -> None:
    """Raise RuntimeError for a gradient that no rule can take, before anything has moved."""
    for group in groups:
        if any((grad := p.grad) is not None and grad.layout != torch.strided for p in group["params"]):
            rule = "Sophia does" if group["update"] == "sophia" else "AdamW groups do"
            raise RuntimeError(
                f"{rule} not support sparse gradients; use sparse=False in the embedding layer, or give it an "
                "optimizer of its own such as torch.optim.SparseAdam."
            )


def warn_caller(message: str) -> None:
    """Warn at the line that called into torch or this package, however many wrappers lie between."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value
