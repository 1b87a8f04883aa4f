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
    """The convention for a plain `nn.Module` classifier; subclass it, or pass one, for other models.

    The output is a tensor of logits [..., classes], or a tuple whose first element is, or has `.logits`. Labels
    are what was noted by `note_labels`, or the argument called `labels` or `targets`, one per logits row; without
    any, every row counts.
    """

    def __init__(self, likelihood: Likelihood | None = None) -> None:
        self.likelihood = likelihood or Categorical()

    def inputs(self, model: nn.Module, batch: MicroBatch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the forward of the Hessian pass."""
        return batch.args, batch.kwargs

    def labels(self, model: nn.Module, batch: MicroBatch) -> Tensor | None:
        """The labels of the micro-batch, read for their mask only."""
        if batch.labels is not None:
            return batch.labels
        named = bound_arguments(model, batch)
        return next((named[n] for n in LABEL_NAMES if isinstance(named.get(n), Tensor)), None)

    def predictions(self, output: Any, labels: Tensor | None, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Logits [rows, classes] and labels [rows] (or None), from what the forward returned.

        Raises:
            ValueError: there are no usable logits, or the labels do not match their rows.
        """
        logits = find_logits(output)
        classes = logits.shape[-1]
        if labels is not None and labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels of shape {list(labels.shape)} do not match logits of shape {list(logits.shape)}, one label "
                "per row: pass readout= with a Readout whose predictions() aligns them."
            )
        return logits.reshape(-1, classes), None if labels is None else labels.reshape(-1).to(logits.device)


def find_logits(output: Any) -> Tensor:
    """The logits in a model's output.

    Raises:
        ValueError: there are none, or they have a single class.
    """
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(logits, Tensor) or logits.ndim < 2 or not logits.is_floating_point():
        raise ValueError(
            f"no logits [..., classes] in the model's output ({type(output).__name__}): pass readout= with a "
            "Readout whose predictions() finds them."
        )
    if logits.shape[-1] == 1:
        raise ValueError("the logits have one class, which has no categorical curvature: pass a Readout for the loss.")
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
