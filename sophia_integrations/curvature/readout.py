"""Readouts: how to call a model without its labels, and where its predictions and labels are in what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .likelihood import Categorical, Likelihood
from .tap import MicroBatch

LABEL_NAMES = ("labels", "targets", "target", "label")


class Readout:
    """The convention for a plain `nn.Module`; subclass it, or pass one, for other models.

    The output is a tensor of predictions, or a tuple whose first element is, or has `.logits`. Labels are what was
    noted by `note_labels`, or the argument called `labels` or `targets`; without any, every prediction counts.

    Args:
        likelihood: the likelihood of the loss, `Categorical` by default.
    """

    batch_arguments: tuple[str, ...] = ("num_items_in_batch",)
    """Arguments that tell how the loss of a whole batch is computed; a unit of it goes without them."""

    def __init__(self, likelihood: Likelihood | None = None) -> None:
        self.likelihood = likelihood or Categorical()

    def inputs(self, model: nn.Module, batch: MicroBatch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for a forward whose labels are drawn afterwards."""
        return batch.args, batch.kwargs

    def loss_inputs(self, model: nn.Module, batch: MicroBatch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for a forward that computes the mean loss itself: the training call's, and noted labels."""
        kwargs = {k: v for k, v in batch.kwargs.items() if k not in self.batch_arguments}
        has_labels = bound_arguments(model, batch).get("labels") is not None
        if batch.labels is not None and not has_labels and "labels" in inspect.signature(model.forward).parameters:
            kwargs["labels"] = batch.labels
        return batch.args, kwargs

    def labels(self, model: nn.Module, batch: MicroBatch) -> Any | None:
        """The labels of the micro-batch, read for their mask only."""
        if batch.labels is not None:
            return batch.labels
        named = bound_arguments(model, batch)
        return next((named[n] for n in LABEL_NAMES if isinstance(named.get(n), Tensor)), None)

    def aligned(self, labels: Any) -> Any:
        """The labels with one entry per prediction; override it for a model that shifts them."""
        return labels

    def count(self, model: nn.Module, batch: MicroBatch) -> int:
        """N of the micro-batch from its labels, without a forward; its rows when it has no labels."""
        labels = self.labels(model, batch)
        return batch.num_rows if labels is None else int(self.likelihood.count(None, self.aligned(labels)))

    def predictions(self, output: Any, labels: Any | None, batch: MicroBatch) -> tuple[Any, Any | None]:
        """What the likelihood takes, from what the forward returned.

        Returns:
            Predictions [rows, classes], and labels [rows] or [rows, classes] (or None), as many as they were.

        Raises:
            ValueError: there are no predictions, or the labels do not match them.
        """
        logits = find_logits(output)
        rows = logits.flatten(0, -2) if logits.ndim > 2 else logits
        if labels is None:
            return rows, None
        labels = self.aligned(labels).to(logits.device)
        if labels.numel() == logits.numel():
            return rows, labels.reshape(rows.shape)
        if labels.shape == logits.shape[:-1]:
            return rows, labels.reshape(-1)
        raise ValueError(
            f"labels of shape {list(labels.shape)} do not match logits of shape {list(logits.shape)}: pass readout= "
            "with a Readout whose aligned() or predictions() aligns them."
        )


def find_logits(output: Any) -> Tensor:
    """The predictions in a model's output.

    Raises:
        ValueError: there are none.
    """
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(logits, Tensor) or logits.ndim < 1 or not logits.is_floating_point():
        raise ValueError(
            f"no logits [..., classes] in the model's output ({type(output).__name__}): pass readout= with a "
            "Readout whose predictions() finds them."
        )
    return logits


def bound_arguments(model: nn.Module, batch: MicroBatch) -> dict[str, Any]:
    """The arguments of the call by name, positional ones included where the signature tells their names."""
    if not batch.args:
        return batch.kwargs
    try:
        bound = inspect.signature(model.forward).bind_partial(*batch.args, **batch.kwargs)
    except TypeError:
        return batch.kwargs
    return {**bound.arguments.pop("kwargs", {}), **bound.arguments}


ReadoutResolver = Callable[[nn.Module], "Readout | None"]
_resolvers: list[ReadoutResolver] = []


def register_readout(resolver: ReadoutResolver) -> None:
    """Let `resolver` name the readout of the models it knows; a framework's row registers its own here."""
    if resolver not in _resolvers:
        _resolvers.append(resolver)


def readout_for(model: nn.Module) -> Readout:
    """The readout of the first resolver that knows `model`, else the plain convention."""
    for resolver in _resolvers:
        readout = resolver(model)
        if readout is not None:
            return readout
    return Readout()
