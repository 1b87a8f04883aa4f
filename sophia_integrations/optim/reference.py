"""The specification: one Sophia step for one tensor in float64, written to be read, never to be fast."""

from __future__ import annotations

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
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 3 of arXiv 2305.14342, in the form of the official code (ρ is the later paper's γ).

    Arguments are tensors of one shape; `estimate` is ĥ when a Hessian pass ran at this step, else None.
    A coordinate whose gradient is not finite keeps θ and m as they were.

    Returns:
        The new θ, m and h in float64.
    """
    theta, g, m, h = (x.detach().double() for x in (param, grad, exp_avg, hessian))
    if estimate is not None:
        h = beta2 * h + (1 - beta2) * estimate.double()
    g = -g if maximize else g
    new_m = beta1 * m + (1 - beta1) * g
    denominator = torch.clamp(rho * h, min=eps)
    new_theta = theta - lr * weight_decay * theta - lr * torch.clamp(new_m / denominator, -1, 1)
    usable = torch.isfinite(g)
    return torch.where(usable, new_theta, theta), torch.where(usable, new_m, m), h
