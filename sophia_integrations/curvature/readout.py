"""Readouts: how to call a model without its labels, and where its predictions and labels are in what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .likelihood import Categorical, Likelihood
from .rows import count_rows, part_of_witness, take_rows
from .tap import MicroBatch
from .witness import Heard, Witness, listen

LABEL_NAMES = ("labels", "targets", "target", "label")


class Readout:
    """The convention for a plain `nn.Module`; subclass it, or pass one, for other models.

    The output is a tensor of predictions, or a tuple whose first element is, or has `.logits`. Labels are what was
    noted by `note_labels`, or the argument called `labels` or `targets`; without any, every prediction counts that
    the training loss sends a gradient to.

    Args:
        likelihood: the likelihood of the loss, `Categorical` by default.
        batch_dim: the dimension of the arguments that numbers the rows of a batch (those of one dimension have their
            rows in dimension 0); 1 for modules with `batch_first=False`. None: no dimension does, and the pass takes
            whole micro-batches.
        rows: (micro-batch, index [rows]) -> micro-batch, in place of `batch_dim`, for arguments that are no tensors
            with such a dimension: graphs, packed sequences, lists. Its rows are those of the predictions.
        class_dim: the dimension of the logits that numbers the classes. Found by default: from the shape of labels,
            from the gradient of the training loss; else it is the last.
        check: whether to compare the training loss with the likelihood (`curvature.witness`). False uses the
            likelihood on your word.

    Example: an LSTM over inputs [time, batch, features].

        >>> from sophia_integrations import GaussNewtonBartlett
        >>> estimator = GaussNewtonBartlett(nn.LSTM(4, 3), readout=Readout(batch_dim=1))
    """

    batch_arguments: tuple[str, ...] = ("num_items_in_batch",)
    """Arguments that tell how the loss of a whole batch is computed; a unit of it goes without them."""

    rows_are_known = False
    """Whether the arguments that have rows are known for certain, and need no trial."""

    batch_dim: int | None = 0
    class_dim: int | None = None
    check = True
    _rows: Callable[[MicroBatch, Tensor], MicroBatch] | None = None

    def __init__(
        self,
        likelihood: Likelihood | None = None,
        *,
        batch_dim: int | None = 0,
        rows: Callable[[MicroBatch, Tensor], MicroBatch] | None = None,
        class_dim: int | None = None,
        check: bool = True,
    ) -> None:
        self.likelihood = likelihood or Categorical()
        self.batch_dim, self._rows, self.check = batch_dim, rows, check
        if rows is not None:
            self.rows_are_known = True
        if class_dim is not None:
            self.class_dim = class_dim

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.likelihood!r}, batch_dim={self.batch_dim}, class_dim={self.class_dim})"

    def num_rows(self, model: nn.Module, batch: MicroBatch) -> int | None:
        """How many rows the micro-batch has; None where nobody knows, and it is used as a whole."""
        if self._rows is not None:
            shape = batch.witness.shape if batch.witness is not None else None
            shape = shape or getattr(batch.labels, "shape", None)
            return shape[0] if shape else None
        return None if self.batch_dim is None else count_rows(batch, self.batch_dim)

    def rows(self, model: nn.Module, batch: MicroBatch, index: Tensor) -> MicroBatch:
        """The micro-batch restricted to the rows `index` [rows]."""
        size = self.num_rows(model, batch)
        if self._rows is None:
            return take_rows(batch, index, self.batch_dim, size)
        return replace(self._rows(batch, index), witness=part_of_witness(batch, index, 0, size))

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

    def count(self, model: nn.Module, batch: MicroBatch) -> Tensor | int:
        """N of the micro-batch from its labels, without a forward; its rows when it has no labels."""
        labels = self.labels(model, batch)
        if labels is None:
            return self.num_rows(model, batch) or 1
        return self.likelihood.count(None, self.aligned(labels))

    def logits(self, output: Any) -> Tensor:
        """The predictions in what the forward returned, as they are there.

        Raises:
            ValueError: there are none.
        """
        return find_logits(output)

    def predictions(self, output: Any, labels: Any | None, batch: MicroBatch) -> tuple[Any, Any | None]:
        """What the likelihood takes, from what the forward returned.

        Returns:
            Predictions [rows, classes], and labels [rows] or [rows, classes] (or None), as many as they were.

        Raises:
            ValueError: there are no predictions, there are not as many as the training forward made, or the labels do
                not match them.
        """
        logits = self.logits(output)
        witness = getattr(batch, "witness", None)
        if witness is not None and witness.shape is not None:
            _check_number(logits, witness)
        if labels is not None:
            labels = self.aligned(labels).to(logits.device)
        dim = self._class_dim(logits, labels, witness)
        moved = logits.movedim(dim, -1)
        rows = moved.flatten(0, -2) if logits.ndim > 2 else moved
        if labels is not None:
            if labels.numel() == logits.numel():
                return rows, labels.reshape(logits.shape).movedim(dim, -1).reshape(rows.shape)
            if labels.shape != moved.shape[:-1]:
                raise ValueError(
                    f"labels of shape {list(labels.shape)} do not match logits of shape {list(logits.shape)}: pass "
                    "readout= with a Readout whose aligned() or predictions() aligns them."
                )
            labels = labels.reshape(-1)
        return rows, self._counting(labels, rows, witness)

    def softmax(self, labels: Any | None) -> Categorical | None:
        """The likelihood, if it is a softmax over classes."""
        return self.likelihood if isinstance(self.likelihood, Categorical) else None

    def listen(self, model: nn.Module, output: Any, batch: MicroBatch, seed: int) -> Witness | None:
        """A witness of the training loss at the predictions of `output`; None where there is nothing to compare."""
        if not self.check:
            return None
        try:
            logits, labels = self.logits(output), self.labels(model, batch)
        except ValueError:
            return None
        softmax = self.softmax(labels)
        if softmax is None or logits.ndim < 2:
            return None
        labels = None if labels is None else self.aligned(labels)
        dims = [self._class_dim(logits, labels, None)]
        if self.class_dim is None and logits.ndim > 2 and (labels is None or logits.shape[1] == logits.shape[-1]):
            dims = [-1] if self.batch_dim == 1 else [-1, 1]
        counts = None if labels is None else labels != softmax.ignore_index
        return listen(logits, dims, counts, seed)

    def ask(self, batch: MicroBatch) -> Heard | None:
        """What the training loss turned out to be; from now on the batch knows its classes and the rows that count.

        Raises:
            ValueError: it is another loss than the mean negative log-likelihood.
        """
        heard = batch.witness.heard() if batch.witness is not None else None
        if heard is None:
            return None
        if heard.complaint is not None:
            raise ValueError(_ANOTHER_LOSS.format(heard.complaint))
        batch.witness.class_dim = heard.class_dim
        batch.witness.counts, batch.witness.number = heard.counts, heard.number
        return heard

    def _class_dim(self, logits: Tensor, labels: Tensor | None, witness: Witness | None) -> int:
        if self.class_dim is not None:
            return self.class_dim
        if witness is not None and witness.class_dim is not None:
            return witness.class_dim
        if labels is not None and labels.shape != logits.shape[:-1] and logits.ndim > 2:
            return 1 if labels.shape == logits.shape[:1] + logits.shape[2:] else -1
        return -1

    def _counting(self, labels: Tensor | None, rows: Tensor, witness: Witness | None) -> Tensor | None:
        """The labels, masked where the training loss sent no gradient and nowhere else."""
        counts = witness.counts if witness is not None else None
        softmax = self.softmax(labels)
        if counts is None or counts.numel() != len(rows) or softmax is None:
            return labels
        counts, masked = counts.flatten().to(rows.device), softmax.ignore_index
        labels = torch.zeros_like(counts, dtype=torch.int64) if labels is None else labels
        return labels.masked_fill(labels == masked, 0).masked_fill(~counts, masked)


def _check_number(logits: Tensor, witness: Witness) -> None:
    if logits.numel() != witness.expected:
        part, whole = witness.share
        raise ValueError(
            f"the pass got predictions of shape {list(logits.shape)} for {part} of {whole} rows, and the training "
            f"forward made {list(witness.shape)} for all of them: the rows were not chosen as the model has them. Pass "
            "readout=Readout(batch_dim=…) with the dimension that numbers the rows of the batch, Readout(rows=…) that "
            "chooses them, or Readout(batch_dim=None) to use whole micro-batches."
        )


_ANOTHER_LOSS = (
    "the training loss is not the mean negative log-likelihood of a softmax over the model's logits, which this "
    "estimator takes it for: {}. For another likelihood pass readout=Readout(likelihood); for weights, a focal loss or "
    "any other loss use SophiaH with Hutchinson(model, loss=lambda output, batch: …); to use the plain likelihood all "
    "the same, readout= with check=False."
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
