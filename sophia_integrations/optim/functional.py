"""The update of a parameter group: plain parameters by lists on a backend, rotated matrices by batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import eager
from .adamw import adamw_update
from .backends import chosen_backend
from .basis import Basis, basis_layout, batches, into, known_bases, out_of
from .estimator import Estimate
from .gradients import all_finite, usable_gradient
from .progress import Progress
from .rule import Rule
from .sharding import SumOverShards, local, sharding_of
from .state import Groups, States, sophia_members, state_dtype, state_of


def fold(groups: Groups, states: States, progress: Progress, estimate: Estimate) -> None:
    """h ← β₂ h + (1 − β₂) ĥ, for what the estimate has; a matrix waits for its eigenbasis."""
    bases, diagonal = known_bases(groups, states), estimate.diagonal
    for param, group in sophia_members(groups):
        if param in diagonal and (param in bases or basis_layout(param, group) is None):
            h = local(state_of(states, param, group)["hessian"])
            h.lerp_(local(diagonal[param]).to(h.dtype), 1 - group["betas"][1])
    progress.hessian_step = progress.step
    progress.batch_predictions = estimate.batch_predictions or estimate.num_predictions
    progress.hessian_updates += 1


def squared_gradients(groups: Groups, states: States, num_predictions: float) -> Estimate:
    """N · grad², from the gradients of a mean loss over N sampled labels: the paper's Algorithm 2."""
    bases = known_bases(groups, states)
    diagonal = {}
    for param, _ in sophia_members(groups):
        if param.requires_grad and param.grad is not None:
            grad = param.grad.to(state_dtype(param))
            diagonal[param] = (bases[param].into(grad) if param in bases else grad).square().mul_(num_predictions)
    if not diagonal:
        return Estimate(None, dropped="no parameter has a gradient")
    if not bases and any(basis_layout(param, group) for param, group in sophia_members(groups)):
        return Estimate(None, dropped="the eigenbasis is known after the first step(): call it after that")
    if not all_finite([local(x) for x in diagonal.values()]):
        return Estimate(None, dropped="it was not finite")
    return Estimate(diagonal, int(num_predictions))


def update_groups(
    groups: Groups, states: States, progress: Progress, counting: bool, fused: bool | None = None
) -> list[Tensor]:
    """One update of every parameter that has a gradient, each by the rule of its group.

    Args:
        counting: whether `progress` gets the shares of coordinates that the clip left alone, and that have ρh for a
            denominator.
        fused: as for `SophiaG`.

    Returns:
        0-dim int64 tensors: coordinates with a non-finite gradient.
    """
    shares, bad = SumOverShards() if counting else None, []
    for group in groups:
        if group["update"] == "adamw":
            bad += adamw_update(group, states)
        else:
            bad += update_group(group, states, progress, shares, fused)
    total = shares.total() if shares is not None else None
    if total is not None and total[2]:
        unclipped, curved, coordinates = total.tolist()
        progress.win_rate, progress.curvature_share = unclipped / coordinates, curved / coordinates
    return bad


def update_group(
    group: dict[str, Any],
    states: States,
    progress: Progress,
    shares: SumOverShards | None,
    fused: bool | None = None,
) -> Iterator[Tensor]:
    """One update of every parameter of a Sophia group that has a gradient.

    Args:
        shares: gets (unclipped, curved, all) coordinates, when given.
        fused: as for `SophiaG`.

    Yields:
        0-dim int64 tensors: coordinates with a non-finite gradient.
    """
    rule, counting = Rule.of(group, progress), shares is not None
    together: dict[tuple, list[tuple[Tensor, ...]]] = defaultdict(list)
    rotated: list[tuple[Any, ...]] = []
    for param in group["params"]:
        if (grad := param.grad) is None:
            continue
        state = state_of(states, param, group)
        tensors = (local(param), local(grad), local(state["exp_avg"]), local(state["hessian"]))
        layout = basis_layout(param, group)
        if layout is None:
            together[param.device, sharding_of(param)].append((*tensors, param))
        else:
            rotated.append((*tensors, Basis(layout, state)))
    for members in batches([r[-1] for r in rotated], [r[0] for r in rotated], "basis"):
        some = [rotated[i] for i in members]
        counts = eigenbasis_update(*zip(*some, strict=True), rule, counting)
        yield counts[0]
        _add(shares, some[0][0], counts, (theta for theta, *_ in some))
    for members in together.values():
        *tensors, params = zip(*members, strict=True)
        counts = sophia_update(*tensors, rule, counting, fused)
        yield counts[0]
        _add(shares, params[0], counts, tensors[0])


def sophia_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[Tensor],
    rule: Rule,
    counting: bool = False,
    fused: bool | None = None,
) -> Tensor:
    """One update of parameters of one device in weight coordinates, in place, each list on its fastest backend.

    Args:
        params: θ, at least one, any real floating dtype, any strides.
        grads: gradients, the shapes of θ.
        exp_avgs: m, float32 (float64 for a float64 θ) or bfloat16, the shapes of θ; updated.
        hessians: h, float32 (float64 for a float64 θ), the shapes of θ; read.
        counting: whether to count what the clip does.
        fused: as for `SophiaG`.

    Returns:
        int64 [3] on the device, as `eager.update`.
    """
    fast = chosen_backend(params[0].device.type, fused)
    lists: dict[tuple, list[tuple[Tensor, ...]]] = defaultdict(list)
    for tensors in zip(params, grads, exp_avgs, hessians, strict=True):
        backend = fast if fast is not None and fast.takes(*tensors) else eager
        lists[backend, tensors[0].dtype].append(tensors)
    counts = [backend.update(*zip(*each, strict=True), rule, counting) for (backend, _), each in lists.items()]
    return counts[0] if len(counts) == 1 else torch.stack(counts).sum(0)


def _add(shares: SumOverShards | None, param: Tensor, counts: Tensor, updated: Iterable[Tensor]) -> None:
    if shares is not None:
        size = torch.full((1,), sum(theta.numel() for theta in updated), device=counts.device)
        shares.add(param, torch.cat([counts[1:], size]))


def eigenbasis_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    hessians: Sequence[Tensor],
    bases: Sequence[Basis],
    rule: Rule,
    counting: bool,
) -> Tensor:
    """One update with the clip taken in the eigenbasis, in place: θ ← θ − lr · Q_L clip(Q_Lᵀ m Q_R / …) Q_Rᵀ.

    Args:
        params, grads, exp_avgs: θ, gradients and m of one of `basis.batches`.
        hessians: h in the eigenbasis, the shapes of θ.

    Returns:
        As `eager.update`. A coordinate with a non-finite gradient counts as 0 for the others.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=params[0].device)
    usables, followed = [], []
    for grad, exp_avg, hessian in zip(grads, exp_avgs, hessians, strict=True):
        usable, g = usable_gradient(grad, hessian.dtype, rule.maximize)
        m = eager.average(rule, exp_avg, g, usable)
        usables.append(usable)
        followed.append(eager.followed(rule, m, g))
    xs = [x.contiguous() for x in into(bases, followed)]
    for x, hessian in zip(xs, hessians, strict=True):
        flat = x.view(-1)
        eager.ratio(rule, flat, hessian.reshape(-1), flat, torch.empty_like(flat), counts if counting else None)
        x.clamp_(-1, 1)
    for param, step, usable in zip(params, out_of(bases, xs), usables, strict=True):
        theta = param if param.dtype == step.dtype and usable is None else param.to(step.dtype, copy=True)
        eager.move(rule, theta, step)
        if usable is not None:
            param.copy_(torch.where(usable, theta, param))
            counts[0] += param.numel() - usable.sum()
        elif theta is not param:
            param.copy_(theta)
    return counts
