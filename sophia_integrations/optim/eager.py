"""The update in torch operations, for every device, dtype and layout: chunk by chunk, so that no temporary is large."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gradients import finite_mask
from .rounding import rounded_to_bfloat16
from .rule import Rule

CPU_CHUNK = 65_536
"""Elements updated at a time on the CPU: float32 scratch rows of this length stay in the L2 cache."""

DEVICE_CHUNK = 1 << 24
"""Elements updated at a time elsewhere: long enough to hide the launches, short enough to bound the scratch."""


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[Tensor],
    rule: Rule,
    counting: bool,
) -> Tensor:
    """One update of parameters of one device and dtype, in place; arguments as for `sophia_update`.

    Returns:
        int64 [3] on the device, coordinates: with a non-finite gradient, whose θ and m stay as they were; with
        |m| < max(ρh, c √(h/N), ε); and whose denominator is ρh. The last two are 0 unless `counting`.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=params[0].device)
    for tensors in zip(params, grads, exp_avgs, hessians, strict=True):
        _update_tensor(*tensors, rule, counts, counting)
    return counts


def ratio(rule: Rule, numerator: Tensor, hessian: Tensor, out: Tensor, scratch: Tensor, counts: Tensor | None) -> None:
    """m / max(ρ h, c √(h/N), ε) before it is clipped, in `out`; one of `numerator` and `scratch` may be `out`.

    Args:
        counts: gets what the clip does, as `update` returns it, when given.
    """
    denominator = torch.mul(hessian, rule.rho * rule.hessian_scale, out=scratch)
    floor: Tensor | float = rule.eps
    if rule.noise:
        variance = hessian.mul(rule.noise**2 * rule.hessian_scale)
        floor = variance.clamp_min_(0).sqrt_().clamp_min_(rule.eps)
    if counts is not None:
        counts[2] += (denominator > floor).sum()
    if isinstance(floor, Tensor):
        torch.maximum(denominator, floor, out=denominator)
    else:
        denominator.clamp_min_(floor)
    torch.div(numerator, denominator, out=out)
    if rule.momentum_scale != 1:
        out.mul_(rule.momentum_scale)
    if counts is not None:
        counts[1] += (out.abs() < 1).sum()


def average(rule: Rule, exp_avg: Tensor, grad: Tensor, usable: Tensor | None) -> Tensor:
    """m ← β₁ m + (1 − β₁) g, in place where `usable` says so (None: everywhere).

    Returns:
        m in the dtype of `grad`: before it is rounded, if it is stored in fewer bits.
    """
    m = exp_avg.to(grad.dtype)
    if usable is None:
        m.lerp_(grad, 1 - rule.beta1)
    else:
        m.copy_(torch.where(usable, m.lerp(grad, 1 - rule.beta1), m))
    if m is not exp_avg:
        exp_avg.copy_(rounded_to_bfloat16(m, rule.seed))
    return m


def followed(rule: Rule, exp_avg: Tensor, grad: Tensor, out: Tensor | None = None) -> Tensor:
    """What the update follows: m, or with Nesterov β₁ m + (1 − β₁) g, in `out` or a new tensor."""
    return torch.lerp(exp_avg, grad, 1 - rule.beta1, out=out) if rule.nesterov else exp_avg


def move(rule: Rule, theta: Tensor, step: Tensor) -> None:
    """θ ← θ − lr λ θ − lr step, in place; `step` is scratch afterwards."""
    if rule.weight_decay != 0:
        theta.mul_(1 - rule.lr * rule.weight_decay)
    if isinstance(rule.lr, Tensor):
        theta.sub_(step.mul_(rule.lr))
    else:
        theta.add_(step, alpha=-rule.lr)


def _chunk_length(tensor: Tensor) -> int:
    """Elements to work on at a time where `tensor` lies."""
    return CPU_CHUNK if tensor.device.type == "cpu" else DEVICE_CHUNK


def _update_tensor(
    param: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor, rule: Rule, counts: Tensor, counting: bool
) -> None:
    flat = _flat_views(param, grad, exp_avg, hessian)
    if flat is None:
        theta, m = param.contiguous(), exp_avg.contiguous()
        _update_tensor(theta, grad.contiguous(), m, hessian.contiguous(), rule, counts, counting)
        param.copy_(theta)
        exp_avg.copy_(m)
        return
    length = max(1, min(_chunk_length(param), param.numel()))
    rows = torch.empty(3 if rule.nesterov else 2, length, dtype=hessian.dtype, device=param.device)
    for theta, g, m, h in zip(*(view.split(length) for view in flat), strict=True):
        scratch = (row[: theta.numel()] for row in rows)
        _update_chunk(theta, g, m, h, *scratch, rule=rule, counts=counts, counting=counting)


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions from slowest to fastest, so that a dense `channels_last` tensor is seen as contiguous."""
    return sorted(range(tensor.ndim), key=lambda d: -tensor.stride(d))


def _flat_view(tensor: Tensor, order: list[int]) -> Tensor | None:
    """`tensor` as one dimension in memory order `order`, without a copy; None where its strides allow none."""
    try:
        return tensor.permute(order).view(-1)
    except RuntimeError:
        return None


def _flat_views(*tensors: Tensor) -> list[Tensor] | None:
    order = memory_order(tensors[0])
    views = [_flat_view(t, order) for t in tensors]
    return None if any(v is None for v in views) else views


def _update_chunk(theta, g, m, h, work, cast, ahead=None, *, rule, counts, counting) -> None:
    """`work`, `cast` and `ahead` are scratch rows; `ahead` holds the momentum that Nesterov follows."""
    usable = finite_mask(g)
    if usable is not None:
        counts[0] += g.numel() - usable.sum()
        g = torch.where(usable, g, 0)
    if rule.maximize or g.dtype != h.dtype:
        g = cast.copy_(g)
    if rule.maximize:
        g.neg_()
    m = average(rule, m, g, usable)
    ratio(rule, followed(rule, m, g, out=ahead), h, work, work, counts if counting else None)
    work.clamp_(-1, 1)
    target = theta if theta.dtype == m.dtype and usable is None else cast.copy_(theta)
    move(rule, target, work)
    if usable is not None:
        theta.copy_(torch.where(usable, target, theta))
    elif target is not theta:
        theta.copy_(target)
