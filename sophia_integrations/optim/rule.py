"""The numbers of one update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .progress import Progress
from .rounding import momentum_seed


@dataclass(frozen=True)
class Rule:
    """The numbers of one update; `reference_step` is the rule in readable form.

    Attributes:
        lr: learning rate per step.
        momentum_scale: 1 / (1 − β₁ᵗ) with bias correction, else 1.
        hessian_scale: 1 / (1 − β₂ⁿ) after n estimates with bias correction, else 1.
        noise: c / √N of the noise floor, 0 for none.
        seed: 32 bits for the rounding of a bfloat16 m.
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
    seed: int = 0

    @classmethod
    def of(cls, group: Mapping[str, Any], progress: Progress) -> Rule:
        """The numbers of a parameter group in the coming step."""
        (beta1, beta2), corrected = group["betas"], group["bias_correction"]
        predictions, updates = progress.batch_predictions, progress.hessian_updates
        return cls(
            lr=group["lr"],
            beta1=beta1,
            rho=progress.auto_rho if group["rho"] == "auto" else group["rho"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            nesterov=group["nesterov"],
            momentum_scale=1 / (1 - beta1 ** (progress.step + 1)) if corrected else 1.0,
            hessian_scale=1 / (1 - beta2**updates) if corrected and updates else 1.0,
            noise=group["noise_floor"] / math.sqrt(predictions) if predictions else 0.0,
            seed=momentum_seed(progress.step),
        )
