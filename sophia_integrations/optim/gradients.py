"""Gradients as the update takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def finite_mask(grad: Tensor) -> Tensor | None:
    """Which coordinates are finite; None: all, as far as can be told without waiting for the device."""
    if grad.device.type == "cpu" and math.isfinite(grad.sum(dtype=torch.float32)):
        return None
    return torch.isfinite(grad)


def usable_gradient(grad: Tensor, dtype: torch.dtype, maximize: bool) -> tuple[Tensor | None, Tensor]:
    """The `finite_mask`, and the gradient to descend in `dtype`, 0 where it is not finite; the gradient itself where
    nothing has to change."""
    usable = finite_mask(grad)
    if usable is not None:
        grad = torch.where(usable, grad, 0)
    grad = grad.to(dtype)
    return usable, -grad if maximize else grad


def all_finite(tensors: Sequence[Tensor]) -> Tensor | bool:
    """Whether everything in them is finite, as a 0-dim tensor that nobody has waited for."""
    finite = [x.isfinite() for t in tensors if t.numel() for x in t.aminmax()]
    return torch.stack([x.to(finite[0].device) for x in finite]).all() if finite else True
