"""ρ by itself: the trust region is set by the share of coordinates that it leaves alone, which falls over a run.

Which ρ is good differs tenfold between models and lengths; the share of unclipped coordinates that good runs have does
not. So ρ becomes, after each estimate, the s-quantile of |m|/h over all coordinates together: s of them lie below and
are not clipped. s falls from its start to its end in proportion to the learning rate, whose peak is remembered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from .basis import Basis
from .eager import followed
from .gradients import usable_gradient
from .progress import Progress
from .rule import Rule
from .sharding import SumOverShards, local, sharding_of
from .state import Groups, States, sophia_members, state_of

UNCLIPPED = (0.6, 0.3)
"""The share left alone at the peak of the learning rate, and where it is 0."""

BINS_PER_OCTAVE = 16
LOWEST, HIGHEST = -64, 64
BINS = BINS_PER_OCTAVE * (HIGHEST - LOWEST)
"""Bins of log₂(|m|/h), from 2⁻⁶⁴ to 2⁶⁴ in steps of 4.4 %; the first and the last take what lies beyond."""

_SAMPLE = 1 << 16
"""Coordinates of unrotated parameters that are looked at, in even distances: the share of them below any value differs
from that of all by about 0.2 %."""


def log_ratio_histogram(grad: Tensor, exp_avg: Tensor, hessian: Tensor, rule: Rule, basis: Basis | None) -> Tensor:
    """Counts of |m|/h on a logarithmic scale, int64 [BINS], with m as the coming update will follow it.

    Coordinates without curvature (h ≤ 0) have no ratio and are not counted.

    Args:
        grad, exp_avg, hessian: as for `sophia_update`, before it.
        basis: of the parameter; None for weight coordinates.
    """
    _, g = usable_gradient(grad, hessian.dtype, rule.maximize)
    x = followed(rule, exp_avg.to(g.dtype).lerp(g, 1 - rule.beta1), g)
    if basis is not None:
        x = basis.into(x)
    x = x.abs().mul_(rule.momentum_scale / rule.hessian_scale).div_(hessian)
    bins = x.log2_().sub_(LOWEST).mul_(BINS_PER_OCTAVE).clamp_(0, BINS - 1)
    bins = torch.where((hessian > 0) & ~bins.isnan(), bins, BINS).long().reshape(-1)
    return (_bin_counts if bins.device.type == "cpu" else _bin_counts_on_device)(bins)[:BINS]


def _bin_counts(bins: Tensor) -> Tensor:
    """How many of `bins` are 0, 1, …, BINS; unlike torch.histc the same every time on a GPU."""
    return torch.bincount(bins, minlength=BINS + 1)


def _bin_counts_on_device(bins: Tensor) -> Tensor:
    """The same where torch.bincount would wait for the largest of them."""
    counts = torch.zeros(BINS + 1, dtype=torch.int64, device=bins.device)
    return counts.index_add_(0, bins, counts.new_ones(1).expand(len(bins)))


def quantile_of(histogram: Tensor, share: float) -> float | None:
    """The value of |m|/h that `share` of the counted coordinates lie below; None where nothing was counted.

    Within a bin the counts are spread evenly on the logarithmic scale. Waits for the device.
    """
    counts = histogram.double().cpu().cumsum(0)
    total = float(counts[-1])
    if total == 0:
        return None
    wanted = share * total
    index = min(int(torch.searchsorted(counts, wanted)), BINS - 1)
    below = float(counts[index - 1]) if index else 0.0
    inside = float(counts[index]) - below
    position = index + ((wanted - below) / inside if inside else 0.5)
    return 2.0 ** (LOWEST + position / BINS_PER_OCTAVE)


def deciles_of(histogram: Tensor | None) -> list[float | None] | None:
    """The values of |m|/h that 10, 20, …, 90 % lie below; None without a histogram."""
    return None if histogram is None else [quantile_of(histogram, tenths / 10) for tenths in range(1, 10)]


def share_at(lr: float, peak_lr: float, start: float, end: float) -> float:
    """s of the present step: `start` at the peak of the learning rate, `end` where it is 0, linear between."""
    return end + (start - end) * (min(1.0, lr / peak_lr) if peak_lr > 0 else 1.0)


def measured_ratios(groups: Groups, states: States, progress: Progress, bases: Mapping[Tensor, Basis]) -> Tensor | None:
    """The histogram of |m|/h over all of Sophia's coordinates and ranks, on the CPU; None without a gradient."""
    histogram = SumOverShards()
    plain = sum(p.numel() for p, _ in sophia_members(groups) if p.grad is not None and p not in bases)
    stride = plain // _SAMPLE | 1  # odd, not to see the same columns of every row
    for group in (g for g in groups if g["update"] == "sophia"):
        rule = Rule.of(group, progress)
        sampled: dict[tuple, list[tuple[Tensor, ...]]] = defaultdict(list)
        for param in (p for p in group["params"] if p.grad is not None):
            state = state_of(states, param, group)
            tensors = [local(x) for x in (param.grad, state["exp_avg"], state["hessian"])]
            if param in bases:
                histogram.add(param, log_ratio_histogram(*tensors, rule, bases[param]))
            else:
                samples = (x.reshape(-1)[::stride] for x in tensors)
                sampled[param.device, sharding_of(param)].append((param, *samples))
        for members in sampled.values():
            params, *together = zip(*members, strict=True)
            histogram.add(params[0], log_ratio_histogram(*map(torch.cat, together), rule, None))
    return histogram.total()


def set_rho(groups: Groups, progress: Progress, histogram: Tensor | None) -> None:
    """Where ρ is "auto", make it the quantile of `histogram`, if there is one, that the learning rate asks for."""
    automatic = next((g for g in groups if g["update"] == "sophia" and g["rho"] == "auto"), None)
    if automatic is None or histogram is None:
        return
    lr = float(automatic["lr"])
    progress.peak_lr = max(lr, progress.peak_lr, float(automatic.get("initial_lr", 0.0)))
    rho = quantile_of(histogram, share_at(lr, progress.peak_lr, *automatic["unclipped"]))
    if rho is not None:
        progress.auto_rho = rho
