"""The update rule on tensors: chunk by chunk, so that no temporary is as large as a parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .basis import Basis, basis_layout
from .gradients import finite_mask, usable_gradient
from .sharding import SumOverShards, local
from .state import Groups, States, note, state_of

CPU_CHUNK = 65_536
"""Elements updated at a time on the CPU: float32 scratch rows of this length stay in the L2 cache."""

DEVICE_CHUNK = 1 << 24
"""Elements updated at a time elsewhere: long enough to hide the launches, short enough to bound the scratch."""


@dataclass(frozen=True)
class Rule:
    """The numbers of one update; `reference_step` is the rule in readable form.

    Attributes:
        lr: learning rate per step.
        momentum_scale: 1 / (1 − β₁ᵗ) with bias correction, else 1.
        hessian_scale: 1 / (1 − β₂ⁿ) after n estimates with bias correction, else 1.
        noise: c / √N of the noise floor, 0 for none.
    """

    lr: float | Tensor
    beta1: float
    rho: float
    eps: float
    weight_decay: float
    maximize: bool = False
    nesterov: bool = False
    momentum_scale: float = 1.0
    hessian_scale: float = 1.0
    noise: float = 0.0

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Rule:
        """The numbers of a parameter group at its present step."""
        (beta1, beta2), corrected = group["betas"], group["bias_correction"]
        predictions, updates = group["batch_predictions"], group["hessian_updates"]
        return cls(
            lr=group["lr"],
            beta1=beta1,
            rho=group["auto_rho"] if group["rho"] == "auto" else group["rho"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            nesterov=group["nesterov"],
            momentum_scale=1 / (1 - beta1 ** (group["step"] + 1)) if corrected else 1.0,
            hessian_scale=1 / (1 - beta2**updates) if corrected and updates else 1.0,
            noise=group["noise_floor"] / math.sqrt(predictions) if predictions else 0.0,
        )

    def floor(self, hessian: Tensor) -> Tensor | float:
        """What the denominator does not fall below: ε, or with a noise floor max(c √(h/N), ε)."""
        if not self.noise:
            return self.eps
        variance = hessian.mul(self.noise**2 * self.hessian_scale)
        return variance.clamp_min_(0).sqrt_().clamp_min_(self.eps)

    def ratio(self, numerator: Tensor, hessian: Tensor, out: Tensor, scratch: Tensor, tally: Tally | None) -> Tensor:
        """m / max(ρ h, c √(h/N), ε) before it is clipped, in `out`; one of `numerator` and `scratch` may be `out`."""
        denominator = torch.mul(hessian, self.rho * self.hessian_scale, out=scratch)
        floor = self.floor(hessian)
        if tally is not None:
            tally.curved += (denominator > floor).sum()
        if isinstance(floor, Tensor):
            torch.maximum(denominator, floor, out=denominator)
        else:
            denominator.clamp_min_(floor)
        torch.div(numerator, denominator, out=out)
        if self.momentum_scale != 1:
            out.mul_(self.momentum_scale)
        if tally is not None:
            tally.unclipped += (out.abs() < 1).sum()
        return out

    def average(self, exp_avg: Tensor, grad: Tensor, usable: Tensor | None) -> None:
        """m ← β₁ m + (1 − β₁) g, in place where `usable` says so (None: everywhere)."""
        old = exp_avg.clone() if usable is not None else None
        exp_avg.lerp_(grad, 1 - self.beta1)
        if usable is not None:
            exp_avg.copy_(torch.where(usable, exp_avg, old))

    def momentum(self, exp_avg: Tensor, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """What the update follows: m, or with Nesterov β₁ m + (1 − β₁) g, in `out` or a new tensor."""
        return torch.lerp(exp_avg, grad, 1 - self.beta1, out=out) if self.nesterov else exp_avg

    def move(self, theta: Tensor, step: Tensor) -> None:
        """θ ← θ − lr λ θ − lr step, in place; `step` is scratch afterwards."""
        if self.weight_decay != 0:
            theta.mul_(1 - self.lr * self.weight_decay)
        if isinstance(self.lr, Tensor):
            theta.sub_(step.mul_(self.lr))
        else:
            theta.add_(step, alpha=-self.lr)


class Tally:
    """Counts what the clip does to one parameter, from the very numbers that the update clips.

    Attributes:
        unclipped: coordinates with |m| < max(ρh, c √(h/N), ε).
        curved: coordinates whose denominator is ρh.
    """

    def __init__(self, device: torch.device) -> None:
        self.unclipped = torch.zeros((), dtype=torch.int64, device=device)
        self.curved = torch.zeros((), dtype=torch.int64, device=device)


def update_group(group: dict[str, Any], states: States, counts: SumOverShards | None) -> Iterator[Tensor]:
    """One update of every parameter of a Sophia group that has a gradient.

    Args:
        counts: gets (unclipped, curved, all) coordinates, when given.

    Yields:
        0-dim int64 tensors: coordinates with a non-finite gradient.
    """
    rule = Rule.of(group)
    for param in (p for p in group["params"] if p.grad is not None):
        state = state_of(states, param)
        tally = Tally(param.device) if counts is not None else None
        tensors = [local(x) for x in (param, param.grad, state["exp_avg"], state["hessian"])]
        layout = basis_layout(param, group)
        if layout is None:
            yield sophia_update(*tensors, rule, tally)
        else:
            yield eigenbasis_update(*tensors, Basis(layout, state), rule, tally)
        if counts is not None and tensors[0].numel():
            size = torch.tensor(tensors[0].numel(), device=param.device)
            counts.add(param, torch.stack([tally.unclipped, tally.curved, size]))


def note_shares(groups: Groups, counts: SumOverShards) -> None:
    """Keep the shares of coordinates that the clip left alone, and that have ρh for a denominator."""
    shares = counts.total()
    if shares is not None:
        unclipped, curved, coordinates = shares.tolist()
        note(groups, win_rate=unclipped / coordinates, curvature_share=curved / coordinates)


def sophia_update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, hessian: Tensor, rule: Rule, tally: Tally | None = None
) -> Tensor:
    """One update of one parameter in weight coordinates, in place.

    Args:
        param: θ, any real floating dtype, any strides.
        grad: gradient, the shape of θ.
        exp_avg: m, float32 (float64 for a float64 θ), the shape of θ; updated.
        hessian: h, as `exp_avg`; read.
        tally: counts what the clip does, when given.

    Returns:
        0-dim int64 tensor: coordinates with a non-finite gradient; their θ and m stay as they were.
    """
    flat = _flat_views(param, grad, exp_avg, hessian)
    if flat is None:
        theta, m = param.contiguous(), exp_avg.contiguous()
        bad = sophia_update(theta, grad.contiguous(), m, hessian.contiguous(), rule, tally)
        param.copy_(theta)
        exp_avg.copy_(m)
        return bad
    bad = torch.zeros((), dtype=torch.int64, device=param.device)
    length = max(1, min(chunk_length(param), param.numel()))
    rows = torch.empty(3 if rule.nesterov else 2, length, dtype=exp_avg.dtype, device=param.device)
    for theta, g, m, h in zip(*(view.split(length) for view in flat), strict=True):
        _update_chunk(theta, g, m, h, *(row[: theta.numel()] for row in rows), bad=bad, rule=rule, tally=tally)
    return bad


def eigenbasis_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    hessian: Tensor,
    basis: Basis,
    rule: Rule,
    tally: Tally | None = None,
) -> Tensor:
    """As `sophia_update` with the clip taken in the eigenbasis: θ ← θ − lr · Q_L clip(Q_Lᵀ m Q_R / …) Q_Rᵀ.

    Args:
        hessian: h in the eigenbasis, the shape of θ.

    Returns:
        Coordinates with a non-finite gradient, which counts as 0; their θ and m stay as they were.
    """
    usable, g = usable_gradient(grad, exp_avg.dtype, rule.maximize)
    rule.average(exp_avg, g, usable)
    x = basis.into(rule.momentum(exp_avg, g)).contiguous()
    flat, h = x.view(-1), hessian.reshape(-1)
    rule.ratio(flat, h, flat, torch.empty_like(flat), tally).clamp_(-1, 1)
    step = basis.out_of(x)
    theta = param if param.dtype == step.dtype and usable is None else param.to(step.dtype, copy=True)
    rule.move(theta, step)
    if usable is not None:
        param.copy_(torch.where(usable, theta, param))
        return grad.numel() - usable.sum()
    if theta is not param:
        param.copy_(theta)
    return torch.zeros((), dtype=torch.int64, device=param.device)


def chunk_length(tensor: Tensor) -> int:
    """Elements to work on at a time where `tensor` lies."""
    return CPU_CHUNK if tensor.device.type == "cpu" else DEVICE_CHUNK


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


def _update_chunk(theta, g, m, h, work, cast, ahead=None, *, bad, rule, tally) -> None:
    """`work`, `cast` and `ahead` are scratch rows; `ahead` holds the momentum that Nesterov follows."""
    usable = finite_mask(g)
    if usable is not None:
        bad += g.numel() - usable.sum()
        g = torch.where(usable, g, 0)
    if rule.maximize or g.dtype != m.dtype:
        g = cast.copy_(g)
    if rule.maximize:
        g.neg_()
    rule.average(m, g, usable)
    rule.ratio(rule.momentum(m, g, out=ahead), h, work, work, tally).clamp_(-1, 1)
    target = theta if theta.dtype == m.dtype and usable is None else cast.copy_(theta)
    rule.move(target, work)
    if usable is not None:
        theta.copy_(torch.where(usable, target, theta))
    elif target is not theta:
        theta.copy_(target)
