"""The state of each parameter: m, h, and the place of what the run knows of itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from .progress import KEY, place
from .rounding import MOMENTUM_DTYPES

Groups = list[dict[str, Any]]
States = MutableMapping[Tensor, dict[str, Tensor]]


def sophia_members(groups: Groups) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Every parameter that Sophia updates, with its group."""
    for group in groups:
        if group["update"] == "sophia":
            yield from ((param, group) for param in group["params"])


def state_dtype(param: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(param.dtype, torch.float32)


def momentum_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """Of m, as the group asks for it."""
    return MOMENTUM_DTYPES[group["momentum_dtype"]] or state_dtype(param)


def state_of(states: States, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of a parameter of Sophia's, with m and h of zeros where they are missing."""
    state = states[param]
    if "exp_avg" not in state:
        state["exp_avg"] = _zeros_like(param, momentum_dtype(param, group))
    if "hessian" not in state:
        state["hessian"] = _zeros_like(param, state_dtype(param))
    if KEY not in state:
        state[KEY] = place()
    return state


def restore(states: States, param: Tensor, saved: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Copy what a checkpoint has for `param`, in the dtypes of its group, and what has its shape in its layout."""
    for key, value in saved.items():
        if key == KEY or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        dtype = _dtype_of(key, param, group)
        if key == "step":
            states[param][key] = value.to(param.device, torch.float32, copy=True)
        elif value.shape == param.shape:
            states[param][key] = _zeros_like(param, dtype).copy_(value)
        else:
            states[param][key] = value.to(param.device, dtype, copy=True)
    if saved:
        states[param][KEY] = place()


def _dtype_of(key: str, param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """Of a tensor with the name `key` in the state of `param`."""
    if group["update"] != "sophia":
        return param.dtype
    return momentum_dtype(param, group) if key == "exp_avg" else state_dtype(param)


def _zeros_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def no_autocast(groups: Groups) -> contextlib.AbstractContextManager:
    """Products in the state's own dtype, wherever the step is taken."""
    device_type = groups[0]["params"][0].device.type
    if not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
