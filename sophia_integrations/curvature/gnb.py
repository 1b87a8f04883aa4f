"""The Gauss-Newton-Bartlett estimator: square the gradient of the loss at labels drawn from the model itself."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..optim.checks import warn_caller
from .engine import UnitEstimator
from .float16 import at_fitting_scale, runs_in_float16
from .graph import shows_all_weights
from .reduction import DiagonalSum, world_size_of
from .sampling import keyed_generator
from .tap import MicroBatch
from .transfer import known_to_be_zero
from .witness import Heard, bring_home


class GaussNewtonBartlett(UnitEstimator):
    """ĥ = (Σ_u S_u²) / N, unbiased for the Gauss-Newton diagonal of the mean loss (arXiv 2305.14342, §2.3).

    A unit u is one backward pass over some rows of a remembered micro-batch: labels are drawn from the model's
    own predictions and S_u is the gradient of their *summed* loss. At sampled labels the expected gradient of
    every prediction is 0 (Bartlett's first identity), so cross terms vanish and E[S_u²] is the sum of the
    predictions' own Gauss-Newton diagonals, however the N predictions are split over units and ranks.

    Before the pass, the gradient that the training loss sent into the remembered predictions is compared with that of
    the likelihood (`curvature.witness`): another loss or unequal weights raise, a constant factor far from 1 warns.

    The relative noise of one square is √2 whatever its rows; U units in all give √(2/U).

    The arguments are those of `UnitEstimator`: model, fraction, units, seed, readout, process_group.
    """

    _squares_on_arrival = True
    """False once a gradient of this model has come in parts."""

    _told_scale = False

    hears_the_loss = True

    def _add_units(self, batches: list[MicroBatch], total: DiagonalSum, step: int) -> None:
        bring_home([batch.witness for batch in batches if batch.witness is not None])
        self._check_scale([self.readout.ask(batch) for batch in batches])
        super()._add_units(batches, total, step)
        if total.squared_in_parts:
            self._squares_on_arrival = False
            total.clear()
            super()._add_units(batches, total, step)

    def _check_scale(self, heard: list[Heard | None]) -> None:
        """Warn once where the weights of the window's predictions add up to something far from 1.

        A count of micro-batches or processes, and a GradScaler's power of two, explain a factor.
        """
        told = [h for h in heard if h is not None and h.weight is not None and h.number is not None]
        if self._told_scale or not told or len(told) < len(heard):
            return
        scale = sum(h.weight * h.number for h in told)
        spread = len(heard) * world_size_of(self.process_group)
        if 0.01 / spread < scale < 10 * spread or _is_power_of_two(scale):
            return
        self._told_scale = True
        warn_caller(
            f"the training loss is {scale:,.4g} times the mean over its predictions, and Sophia's Hessian is that of "
            f"the mean: the momentum is {scale:,.4g} times as large beside it as rho expects. Take the mean "
            f"(reduction='mean'), or multiply rho by {scale:,.4g}."
        )

    def add_unit(self, batch: MicroBatch, key: tuple[int, ...], total: DiagonalSum, counts: bool) -> None:
        def backward(drawn: tuple[Tensor, Tensor | int], scale: float | None) -> tuple[Tensor | int, float]:
            loss, predictions = drawn
            total.discard_gradients()
            # Without predictions there is no backward, unless other ranks may wait for this one's gradients.
            if total.sharded or (counts and not known_to_be_zero(predictions)):
                early = scale is None and self._squares_on_arrival and not total.sharded
                wanted = None if total.sharded or not shows_all_weights(loss) else total.trainable
                with total.squared_on_arrival() if early else contextlib.nullcontext():
                    loss.backward(torch.full_like(loss, (scale or 1.0) if counts else 0.0), inputs=wanted)
            return predictions, scale or 1.0

        predictions, scale = at_fitting_scale(
            lambda: self._drawn_loss(batch, key), backward, lambda _: total.gradients_are_finite()
        )
        total.add_squared_gradients(scale)
        total.count(predictions if counts else 0)

    @torch.enable_grad()
    def _drawn_loss(self, batch: MicroBatch, key: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor | int], bool]:
        """The summed loss at labels drawn from the model and how many they are; and whether it ran in float16."""
        likelihood = self.readout.likelihood
        with self.autocast_of(batch):
            labels = self.readout.labels(self.model, batch)
            args, kwargs = self.readout.inputs(self.model, batch)
            output = self.model(*args, **kwargs)
        prediction, labels = self.readout.predictions(output, labels, batch)
        del output
        detached = tree_map(Tensor.detach, prediction)
        device = tree_leaves(detached)[0].device
        sampled = likelihood.sample(detached, labels, keyed_generator(device, *key))
        predictions = likelihood.count(detached, sampled)
        half = runs_in_float16(self.model, batch, prediction)
        return (likelihood.nll_sum(prediction, sampled), predictions), half


def _is_power_of_two(scale: float) -> bool:
    return abs(math.log2(scale) - round(math.log2(scale))) < 1e-3
