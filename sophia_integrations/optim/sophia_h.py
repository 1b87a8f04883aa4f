"""SophiaH: the same update as SophiaG, with the ρ that fits Hutchinson's estimate of the Hessian diagonal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .sophia import SophiaG


class SophiaH(SophiaG):
    """Sophia with the Hutchinson estimator (arXiv 2305.14342, Algorithms 1 and 3): `SophiaG` with ρ = 0.01.

    Give it `estimator=Hutchinson(model)`, or `Hutchinson(model, loss=…)` where the model does not compute its own
    loss; any other estimator works as well. Args, state and errors are those of `SophiaG`.

    Args:
        rho: ρ; the paper's value for this estimator, whose h is the Hessian's and not the Gauss-Newton's.
        options: `hessian_interval`, `estimator` and the other keyword arguments of `SophiaG`.

    Example:
        >>> import torch
        >>> SophiaH(torch.nn.Linear(4, 3).parameters(), lr=1e-3).param_groups[0]["rho"]
        0.01
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, rho, eps, weight_decay, **options)
