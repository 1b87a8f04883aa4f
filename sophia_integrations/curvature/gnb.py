"""The Gauss-Newton-Bartlett estimator: square the gradient of the loss at labels drawn from the model itself."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .engine import UnitEstimator
from .float16 import FLOAT16_LOSS_SCALES, runs_in_float16
from .reduction import ArrivedTwice, DiagonalSum
from .sampling import keyed_generator
from .tap import MicroBatch


class GaussNewtonBartlett(UnitEstimator):
    """ĥ = (Σ_u S_u²) / N, unbiased for the Gauss-Newton diagonal of the mean loss (arXiv 2305.14342, §2.3).

    A unit u is one backward pass over some rows of a remembered micro-batch: labels are drawn from the model's
    own predictions and S_u is the gradient of their *summed* loss. At sampled labels the expected gradient of
    every prediction is 0 (Bartlett's first identity), so cross terms vanish and E[S_u²] is the sum of the
    predictions' own Gauss-Newton diagonals, however the N predictions are split over units and ranks.

    The relative noise of one square is √2 whatever its rows; U units in all give √(2/U).

    The arguments are those of `UnitEstimator`: model, fraction, units, seed, readout, process_group.
    """

    _squares_on_arrival = True
    """False once a gradient of this model has come in parts."""

    hears_the_loss = True

    def _sum_of_units(self, batches: list[MicroBatch], params: Sequence[Tensor], step: int) -> DiagonalSum:
        for batch in batches:
            self.readout.ask(batch)
        try:
            return super()._sum_of_units(batches, params, step)
        except ArrivedTwice:
            self._squares_on_arrival = False
            return super()._sum_of_units(batches, params, step)

    def add_unit(self, batch: MicroBatch, key: tuple[int, ...], total: DiagonalSum, counts: bool) -> None:
        for scale in FLOAT16_LOSS_SCALES:
            with torch.enable_grad():
                loss, predictions, half = self._drawn_loss(batch, key)
            scale = scale if half else 1.0
            # Without predictions there is no backward, unless other ranks may wait for this one's gradients.
            if total.sharded or (counts and predictions):
                early = self._squares_on_arrival and not (half or total.sharded)
                with total.squared_on_arrival() if early else contextlib.nullcontext():
                    loss.backward(torch.full_like(loss, scale if counts else 0.0))
            if not half or scale == FLOAT16_LOSS_SCALES[-1] or total.gradients_are_finite():
                break
            total.discard_gradients()
        total.add_squared_gradients(scale)
        total.count(predictions if counts else 0)

    def _drawn_loss(self, batch: MicroBatch, key: tuple[int, ...]) -> tuple[Tensor, int, bool]:
        """The summed loss at labels drawn from the model, how many they are, and whether it ran in float16."""
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
        predictions = int(likelihood.count(detached, sampled))
        half = runs_in_float16(self.model, batch, prediction)
        return likelihood.nll_sum(prediction, sampled), predictions, half
