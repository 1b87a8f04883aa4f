"""Gradients as the update takes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def usable_gradient(grad: Tensor, dtype: torch.dtype, maximize: bool) -> tuple[Tensor | None, Tensor]:
    """Which coordinates are finite (None: all, as far as can be told without waiting for the device), and the gradient
    to descend in `dtype`, 0 where it is not finite. The gradient itself where nothing has to change."""
    usable = None
    if grad.device.type != "cpu" or not math.isfinite(grad.sum(dtype=torch.float32)):
        usable = torch.isfinite(grad)
        grad = torch.where(usable, grad, 0)
    grad = grad.to(dtype)
    return usable, -grad if maximize else grad
