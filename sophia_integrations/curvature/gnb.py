"""The Gauss-Newton-Bartlett estimator: square the gradient of the loss at labels drawn from the model itself."""

from __future__ import annotations

import torch

from .engine import UnitEstimator
from .reduction import DiagonalSum
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

    def add_unit(self, batch: MicroBatch, key: tuple[int, ...], total: DiagonalSum, counts: bool) -> None:
        likelihood = self.readout.likelihood
        with torch.enable_grad():
            with self.autocast_of(batch):
                labels = self.readout.labels(self.model, batch)
                args, kwargs = self.readout.inputs(self.model, batch)
                output = self.model(*args, **kwargs)
            prediction, labels = self.readout.predictions(output, labels, batch)
            del output
            detached = prediction.detach()
            sampled = likelihood.sample(detached, labels, keyed_generator(detached.device, *key))
            predictions = int(likelihood.count(detached, sampled)) if counts else 0
            if predictions or total.sharded:
                loss = likelihood.nll_sum(prediction, sampled)
                (loss if counts else 0 * loss).backward()
        total.add_squared_gradients()
        total.count(predictions)
