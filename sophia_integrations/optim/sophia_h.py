"""SophiaH: the same update as SophiaG, with the ρ that fits Hutchinson's estimate of the Hessian diagonal."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .estimator import HessianEstimator
from .sophia import SophiaG
from .trust import UNCLIPPED


class SophiaH(SophiaG):
    """Sophia with the Hutchinson estimator (arXiv 2305.14342, Algorithms 1 and 3): `SophiaG` with ρ = 0.01.

    Give it `estimator=Hutchinson(model)`, or `Hutchinson(model, loss=…)` where the model does not compute its own
    loss; any other estimator works as well. Args, state and errors are those of `SophiaG`.

    Args:
        rho: ρ; the paper's value for this estimator, whose h is the Hessian's and not the Gauss-Newton's.

    Example:
        >>> import torch
        >>> SophiaH(torch.nn.Linear(4, 3).parameters(), lr=1e-3).param_groups[0]["rho"]
        0.01
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float | str = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        *,
        hessian_interval: int = 10,
        estimator: HessianEstimator | None = None,
        maximize: bool = False,
        nesterov: bool = False,
        bias_correction: bool = False,
        noise_floor: float = 0.0,
        unclipped: tuple[float, float] = UNCLIPPED,
        momentum_dtype: str = "float32",
        basis: str | None = None,
        basis_interval: int = 10,
        basis_warmup: int = 100,
        basis_beta: float = 0.95,
        basis_factor_interval: int = 1,
        basis_max_dim: int | None = None,
        basis_flatten: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            rho,
            eps,
            weight_decay,
            hessian_interval=hessian_interval,
            estimator=estimator,
            maximize=maximize,
            nesterov=nesterov,
            bias_correction=bias_correction,
            noise_floor=noise_floor,
            unclipped=unclipped,
            momentum_dtype=momentum_dtype,
            basis=basis,
            basis_interval=basis_interval,
            basis_warmup=basis_warmup,
            basis_beta=basis_beta,
            basis_factor_interval=basis_factor_interval,
            basis_max_dim=basis_max_dim,
            basis_flatten=basis_flatten,
            fused=fused,
        )
