"""Parameter groups with `update="adamw"`: torch's own fused AdamW on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .gradients import finite_mask
from .progress import KEY, place
from .sharding import local

AS_TORCH = {"betas": (0.9, 0.999), "eps": 1e-8}
"""Torch's own, where a group does not say otherwise."""

STATE = ("exp_avg", "exp_avg_sq")


def adamw_update(group: dict[str, Any], states: Mapping[Tensor, dict[str, Tensor]]) -> list[Tensor]:
    """One step of `torch.optim.AdamW(fused=True)` on the parameters of `group` that have gradients.

    A parameter that has a non-finite coordinate in its gradient stays as it is; on a GPU all of them do.

    Returns:
        Such coordinates: a 0-dim int64 tensor for each device.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for param in group["params"]:
        if param.grad is not None:
            by_device.setdefault(param.device, []).append(param)
    return [_on_one_device(params, states, group) for params in by_device.values()]


def _on_one_device(params: list[Tensor], states: Mapping[Tensor, dict[str, Tensor]], group: dict[str, Any]) -> Tensor:
    on_host = params[0].device.type == "cpu"
    masks = {p: mask for p in params if (mask := finite_mask(local(p.grad))) is not None}
    counts = {p: mask.numel() - mask.sum() for p, mask in masks.items()}
    bad = torch.zeros((), dtype=torch.int64, device=params[0].device)
    if counts:
        bad = torch.stack(list(counts.values())).sum()
    if on_host:
        spoilt = {p for p, count in counts.items() if count}
        params = [p for p in params if p not in spoilt]
    held = [_state_of(p, states[p]) for p in params]
    adamw(
        [local(p) for p in params],
        [local(p.grad) for p in params],
        *([local(state[key]) for state in held] for key in STATE),
        [],
        [state["step"] for state in held],
        fused=True,
        found_inf=None if on_host else (bad > 0).float(),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    return bad


def _state_of(param: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        for key in STATE:
            state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state[KEY] = place()
    return state
