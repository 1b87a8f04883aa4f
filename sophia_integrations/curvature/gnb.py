"""The Gauss-Newton-Bartlett estimator: square the gradient of the loss at labels drawn from the model itself."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..optim import Estimate
from .isolation import isolated
from .readout import Readout, readout_for
from .reduction import SquaredGradients, rank_of
from .sampling import choose_units, key_to_seed, keyed_generator
from .tap import MicroBatch, Tap, model_device


class GaussNewtonBartlett:
    """ĥ = (Σ_u S_u²) / N, unbiased for the Gauss-Newton diagonal of the mean loss (arXiv 2305.14342, §2.3).

    A unit u is one backward pass over some rows of a remembered micro-batch: labels are drawn from the model's
    own predictions and S_u is the gradient of their *summed* loss. At sampled labels the expected gradient of
    every prediction is 0 (Bartlett's first identity), so cross terms vanish and E[S_u²] is the sum of the
    predictions' own Gauss-Newton diagonals, however the N predictions are split over units and ranks.

    The relative noise of one square is √2 whatever its rows; U units in all give √(2/U).

    Args:
        model: the module that is called with the batch, not wrapped in DistributedDataParallel.
        fraction: share of the rows of the accumulation window used on each rank, in (0, 1].
        units: units to form from them on each rank. With batch normalization in training mode a unit is always a
            whole micro-batch, and `fraction` a share of the micro-batches.
        seed: key of the sampled labels, with the optimizer step, the rank and the unit.
        readout: where predictions and labels are; found from the model by default.
        process_group: ranks that hold different rows of the same batch; the default group when None.

    Raises:
        ValueError: `fraction` or `units` out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        fraction: float = 0.25,
        units: int = 8,
        seed: int = 0,
        readout: Readout | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, got {fraction!r}.")
        if not isinstance(units, int) or units < 1:
            raise ValueError(f"units must be a whole number of at least 1, got {units!r}.")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        self.model = model
        self.fraction, self.units, self.seed = fraction, units, seed
        self.readout = readout or readout_for(model)
        self.process_group = process_group
        self._tap = Tap(model)

    def arm(self, due: bool) -> None:
        """Remember the coming micro-batches when the next step is due, forget them otherwise."""
        self._tap.open = due
        self._tap.noted_labels = None
        self._tap.take()

    def note_labels(self, labels: Tensor | None) -> None:
        """Say which labels belong to the coming forward, when the model itself is not given them.

        Only their mask (-100) is read. Call it before the forward; it holds until the next call or step.
        """
        self._tap.noted_labels = labels

    def estimate(self, params: Sequence[Tensor], step: int) -> Estimate:
        """One estimate from the remembered micro-batches, the same on every rank of the process group.

        Raises:
            ValueError: the readout finds no predictions, or no labels where it needs them; the optimizer trains
                no parameter of the model.
        """
        own = set(self.model.parameters())
        if not any(param in own for param in params):
            raise ValueError(
                f"the optimizer trains no parameter of the {type(self.model).__name__} given to GaussNewtonBartlett: "
                "build both from the same model."
            )
        batches = self._tap.take()
        rank = rank_of(self.process_group)
        squares = SquaredGradients(params)
        if batches:
            chosen = self._choose_units(batches, keyed_generator(torch.device("cpu"), self.seed, step, rank, "rows"))
            with self._tap.paused(), isolated(self.model, params, key_to_seed(self.seed, step, rank, "forward")):
                for unit, (batch, index) in enumerate(chosen):
                    count = self._backward(batches[batch].rows(index), (self.seed, step, rank, unit))
                    squares.add_unit(count)
        predictions, finite, captured = squares.reduce(self.process_group, bool(batches))
        if not captured:
            return Estimate(None, dropped=self._nothing_seen(), captured=False)
        if not finite:
            return Estimate(None, predictions, dropped="the squared gradients were not finite")
        if predictions == 0:
            return Estimate(None, dropped="every label of the batch is masked")
        return Estimate(squares.diagonal(predictions), predictions)

    def _choose_units(self, batches: list[MicroBatch], generator: torch.Generator) -> list[tuple[int, Tensor]]:
        if not _rows_depend_on_each_other(self.model):
            return choose_units([b.num_rows for b in batches], self.fraction, self.units, generator)
        whole = choose_units([1] * len(batches), self.fraction, len(batches), generator)
        return [(batch, torch.arange(batches[batch].num_rows)) for batch, _ in whole]

    def _backward(self, batch: MicroBatch, key: tuple[int, ...]) -> int:
        """Backward of one unit's summed loss at sampled labels; returns the number of predictions that count."""
        likelihood = self.readout.likelihood
        device_type = model_device(self.model).type
        with torch.enable_grad():
            with _autocast(device_type, batch.autocast_dtype):
                labels = self.readout.labels(self.model, batch)
                args, kwargs = self.readout.inputs(self.model, batch)
                output = self.model(*args, **kwargs)
            prediction, labels = self.readout.predictions(output, labels, batch)
            del output
            detached = prediction.detach()
            sampled = likelihood.sample(detached, labels, keyed_generator(detached.device, *key))
            count = int(likelihood.count(detached, sampled))
            if count:
                likelihood.nll_sum(prediction, sampled).backward()
        return count

    def _nothing_seen(self) -> str:
        return (
            f"{type(self.model).__name__} was not called in training mode with gradients enabled before the step, so "
            "there is no batch to estimate from. Give the estimator the very module that the training loop calls, "
            "and call it (not a method of it) to compute the loss"
        )


def _rows_depend_on_each_other(model: nn.Module) -> bool:
    """Batch normalization in training mode: a part of a micro-batch would be another function of the parameters."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())


def _autocast(device_type: str, dtype: torch.dtype | None):
    return contextlib.nullcontext() if dtype is None else torch.autocast(device_type, dtype=dtype)
