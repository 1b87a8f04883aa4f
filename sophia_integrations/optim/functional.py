"""The update rule on tensors: chunk by chunk, so that no temporary is as large as a parameter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CPU_CHUNK = 65_536
"""Elements updated at a time on the CPU: two float32 scratch rows of this length stay in the L2 cache."""

DEVICE_CHUNK = 1 << 24
"""Elements updated at a time elsewhere: long enough to hide the launches, short enough to bound the scratch."""


def sophia_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    hessian: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    rho: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> Tensor:
    """One update of one parameter, in place (`reference_step` is the rule in readable form).

    Args:
        param: θ, any real floating dtype, any strides.
        grad: gradient, the shape of θ.
        exp_avg: m, float32 (float64 for a float64 θ), the shape of θ; updated.
        hessian: h, as `exp_avg`; read.
        lr: learning rate per step.

    Returns:
        0-dim int64 tensor: coordinates with a non-finite gradient; their θ and m stay as they were.
    """
    options = dict(lr=lr, beta1=beta1, rho=rho, eps=eps, weight_decay=weight_decay, maximize=maximize)
    flat = _flat_views(param, grad, exp_avg, hessian)
    if flat is None:
        theta, m = param.contiguous(), exp_avg.contiguous()
        bad = sophia_update(theta, grad.contiguous(), m, hessian.contiguous(), **options)
        param.copy_(theta)
        exp_avg.copy_(m)
        return bad
    bad = torch.zeros((), dtype=torch.int64, device=param.device)
    length = max(1, min(CPU_CHUNK if param.device.type == "cpu" else DEVICE_CHUNK, param.numel()))
    work, cast = torch.empty(2, length, dtype=exp_avg.dtype, device=param.device)
    for theta, g, m, h in zip(*(view.split(length) for view in flat), strict=True):
        n = theta.numel()
        _update_chunk(theta, g, m, h, work[:n], cast[:n], bad, **options)
    return bad


def flat_view(tensor: Tensor, order: list[int]) -> Tensor | None:
    """`tensor` as one dimension in memory order `order`, without a copy; None where its strides allow none."""
    try:
        return tensor.permute(order).view(-1)
    except RuntimeError:
        return None


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions from slowest to fastest, so that a dense `channels_last` tensor is seen as contiguous."""
    return sorted(range(tensor.ndim), key=lambda d: -tensor.stride(d))


def _flat_views(*tensors: Tensor) -> list[Tensor] | None:
    order = memory_order(tensors[0])
    views = [flat_view(t, order) for t in tensors]
    return None if any(v is None for v in views) else views


def _update_chunk(theta, g, m, h, work, cast, bad, *, lr, beta1, rho, eps, weight_decay, maximize) -> None:
    """`work` and `cast` are scratch rows; `cast` is touched only where a dtype differs from the state's."""
    usable = None
    if m.device.type != "cpu" or not math.isfinite(g.sum(dtype=torch.float32)):
        usable = torch.isfinite(g)
        bad += g.numel() - usable.sum()
        g = torch.where(usable, g, 0)
        old_theta, old_m = theta.clone(), m.clone()
    if maximize or g.dtype != m.dtype:
        g = cast.copy_(g)
    if maximize:
        g.neg_()
    m.lerp_(g, 1 - beta1)
    torch.mul(h, rho, out=work).clamp_min_(eps)
    torch.div(m, work, out=work).clamp_(-1, 1)
    target = theta if theta.dtype == m.dtype else cast.copy_(theta)
    if weight_decay != 0:
        target.mul_(1 - lr * weight_decay)
    if isinstance(lr, Tensor):
        target.sub_(work.mul_(lr))
    else:
        target.add_(work, alpha=-lr)
    if target is not theta:
        theta.copy_(target)
    if usable is not None:
        theta.copy_(torch.where(usable, theta, old_theta))
        m.copy_(torch.where(usable, m, old_m))
