"""The specification: one Sophia step for one tensor in float64, written to be read, never to be fast."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    hessian: Tensor,
    estimate: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    rho: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    nesterov: bool = False,
    bias_correction: bool = False,
    noise_floor: float = 0.0,
    step: int = 0,
    updates: int = 0,
    predictions: int = 0,
    basis: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 3 of arXiv 2305.14342, in the form of the official code (ρ is the later paper's γ).

    Arguments are tensors of one shape; `estimate` is ĥ when a Hessian pass ran at this step, else None.
    A coordinate whose gradient is not finite keeps θ and m as they were, and counts as 0 for the others.

    Args:
        step: steps made before this one, for the bias correction of m.
        updates: estimates made, this step's included, for the bias correction of h.
        predictions: N of the noise floor, the predictions in the mean loss of a step.
        basis: Q_L [rows, rows] and Q_R [columns, columns] for a matrix whose h and ĥ are taken in that basis.

    Returns:
        The new θ, m and h in float64.
    """
    theta, g, m, h = (x.detach().double() for x in (param, grad, exp_avg, hessian))
    usable = torch.isfinite(g)
    g = torch.where(usable, g, 0)
    left, right = (q.double() for q in basis) if basis is not None else (None, None)
    if estimate is not None:
        h = beta2 * h + (1 - beta2) * estimate.double()

    g = -g if maximize else g
    new_m = torch.where(usable, beta1 * m + (1 - beta1) * g, m)
    followed = beta1 * new_m + (1 - beta1) * g if nesterov else new_m
    unbiased_h = h
    if bias_correction:
        followed = followed / (1 - beta1 ** (step + 1))
        unbiased_h = h / (1 - beta2**updates) if updates else h
    if basis is not None:
        followed = left.T @ followed @ right

    denominator = torch.clamp(rho * unbiased_h, min=eps)
    if noise_floor and predictions:
        gradient_noise = torch.sqrt(unbiased_h.clamp(min=0) / predictions)
        denominator = torch.maximum(denominator, noise_floor * gradient_noise)
    update = torch.clamp(followed / denominator, -1, 1)
    if basis is not None:
        update = left @ update @ right.T

    new_theta = theta - lr * weight_decay * theta - lr * update
    return torch.where(usable, new_theta, theta), new_m, h


def reference_rho(followed: Tensor, hessian: Tensor, share: float) -> float:
    """ρ by itself: the `share`-quantile of |m|/h over the coordinates with curvature, m as the update follows it."""
    ratios = (followed.double().abs() / hessian.double())[hessian > 0].flatten().sort().values
    return float(ratios[min(len(ratios) - 1, math.ceil(share * len(ratios)) - 1)]) if len(ratios) else 0.0
