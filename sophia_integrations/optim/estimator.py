"""What the optimizer asks of a curvature estimator; the optimizer never knows models, batches or trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch


@dataclass(frozen=True)
class Estimate:
    """One estimate of the Hessian diagonal of the mean loss, or the reason why there is none.

    Attributes:
        diagonal: ĥ for each parameter, float32, in loss / θ². None when the estimate was dropped.
        num_predictions: N, the predictions counted over all units and ranks.
        batch_predictions: predictions of the whole step's training batch over all ranks; 0 where they are not known.
        dropped: why the estimate was dropped, as half a sentence; None when it is good.
        captured: whether any rank had remembered a micro-batch.
    """

    diagonal: dict[torch.Tensor, torch.Tensor] | None
    num_predictions: int = 0
    dropped: str | None = None
    captured: bool = True
    batch_predictions: int = 0


class Coordinates(Protocol):
    """An orthonormal basis for the values of one parameter."""

    def into(self, x: torch.Tensor) -> torch.Tensor:
        """The coordinates of `x` in the basis, in the shape of `x`."""

    def out_of(self, x: torch.Tensor) -> torch.Tensor:
        """The value that has the coordinates `x`."""


class HessianEstimator(Protocol):
    """Supplies ĥ at the current parameters. Implementations live in `sophia_integrations.curvature`."""

    def arm(self, due: bool) -> None:
        """Called after every step: whether the next step will ask for an estimate."""

    def estimate(
        self,
        params: Sequence[torch.Tensor],
        step: int,
        coordinates: Mapping[torch.Tensor, Coordinates] = MappingProxyType({}),
    ) -> Estimate:
        """ĥ for `params` at optimizer step `step`, the same on every data-parallel rank.

        Args:
            coordinates: parameters whose diagonal is wanted in another basis; not given where there are none.
        """
