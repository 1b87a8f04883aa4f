"""Likelihoods: how to draw labels from a model's predictions, their negative log-likelihood, and their count.

A loss ℓ(f, y) = −log p(y | f) + const has a likelihood p. With y drawn from p, E[∂ℓ/∂f] = 0 and
E[∂ℓ/∂f ∂ℓ/∂fᵀ] = E[∂²ℓ/∂f²], and for the four here ∂²ℓ/∂f² does not depend on y. So squared gradients at drawn
labels average to the Gauss-Newton diagonal of the loss that is trained, whatever the real labels are
(J. Martens, New Insights and Perspectives on the Natural Gradient Method, arXiv 1412.1193, §9).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampling import sample_categorical

IGNORE_INDEX = -100
"""The label that does not count, as in `torch.nn.functional.cross_entropy`."""


class Likelihood(Protocol):
    """One likelihood p(y | prediction); any object with these three methods is one.

    `prediction` is what `Readout.predictions` returns: a tensor, or a tuple of tensors for `Product`.

    Example: counts with a Poisson likelihood, for `torch.nn.PoissonNLLLoss` (prediction = log rate).

        >>> class Poisson:
        ...     def sample(self, prediction, labels, generator):
        ...         return torch.poisson(prediction.exp(), generator)
        ...     def nll_sum(self, prediction, sampled):
        ...         return F.poisson_nll_loss(prediction, sampled, reduction="sum")
        ...     def count(self, prediction, labels):
        ...         return labels.numel()
        >>> from sophia_integrations import GaussNewtonBartlett
        >>> from sophia_integrations.curvature import Readout
        >>> estimator = GaussNewtonBartlett(torch.nn.Linear(4, 1), readout=Readout(Poisson()))
    """

    def sample(self, prediction: Any, labels: Any | None, generator: torch.Generator) -> Any:
        """Labels drawn from the prediction, masked where `labels` are masked; without gradient."""

    def nll_sum(self, prediction: Any, sampled: Any) -> Tensor:
        """0-dim: the summed negative log-likelihood of the sampled labels that count."""

    def count(self, prediction: Any | None, labels: Any) -> Tensor | int:
        """How many predictions count: the terms that the loss is a mean over.

        Args:
            prediction: None where an estimator needs the count without a forward.
            labels: sampled or real ones; both are masked alike.
        """


class Categorical:
    """Softmax over classes: p(y | f) = softmax(f)_y, for `torch.nn.CrossEntropyLoss` with its mean reduction.

    N is the number of rows whose label is not `ignore_index`. ∂²ℓ/∂f² = diag(p) − p pᵀ. Multiple choice is this
    likelihood with logits [rows, choices]. Class weights and label smoothing are outside it.

    Shapes: prediction: logits [rows, classes]; labels: int64 [rows], or None when every row counts.

    Args:
        ignore_index: the label of a row that does not count.

    Raises:
        ValueError: `ignore_index` is a class. In the pass: the logits or labels have other shapes, or one class.
    """

    def __init__(self, ignore_index: int = IGNORE_INDEX) -> None:
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index must be negative, got {ignore_index!r}: a drawn label may be that class and would not "
                "count. Give the estimator labels.masked_fill(labels == ignore_index, -100), with note_labels()."
            )
        self.ignore_index = ignore_index

    def __repr__(self) -> str:
        return f"Categorical(ignore_index={self.ignore_index})"

    def sample(self, prediction: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        if prediction.ndim != 2:
            raise ValueError(f"Categorical needs logits [rows, classes], got {list(prediction.shape)}.")
        if prediction.shape[1] == 1:
            raise ValueError(
                "the logits have one class, which has no categorical curvature: pass readout=Readout(likelihood) "
                "with the likelihood of the loss, for example Gaussian() or Bernoulli()."
            )
        sampled = sample_categorical(prediction, generator)
        if labels is not None:
            _check_shape(labels, prediction.shape[:1], prediction)
            sampled.masked_fill_(labels == self.ignore_index, self.ignore_index)
        return sampled

    def nll_sum(self, prediction: Tensor, sampled: Tensor) -> Tensor:
        return F.cross_entropy(_full(prediction), sampled, reduction="sum", ignore_index=self.ignore_index)

    def count(self, prediction: Tensor | None, labels: Tensor) -> Tensor:
        return (labels != self.ignore_index).sum()


class Bernoulli:
    """Independent yes/no outcomes: p(1 | f) = sigmoid(f), for `torch.nn.BCEWithLogitsLoss` with its mean reduction.

    That loss is a mean over all elements, so N is the number of elements, not of rows. ∂²ℓ/∂f² = p (1 − p). An
    element does not count where its label is NaN or -100. `pos_weight` and `weight` are outside it.

    Shapes: prediction: logits [...]; labels: the same shape, any dtype, or None when every element counts.
    """

    def __repr__(self) -> str:
        return "Bernoulli()"

    def sample(self, prediction: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        sampled = torch.bernoulli(_full(prediction).sigmoid(), generator=generator)
        return sampled if labels is None else _masked(sampled, labels, self._counts(labels))

    def nll_sum(self, prediction: Tensor, sampled: Tensor) -> Tensor:
        counts = self._counts(sampled)
        prediction, sampled = _full(prediction).where(counts, 0), sampled.where(counts, 0)
        losses = F.binary_cross_entropy_with_logits(prediction, sampled, reduction="none")
        return losses.where(counts, 0).sum()

    def count(self, prediction: Tensor | None, labels: Tensor) -> Tensor:
        return self._counts(labels).sum()

    def _counts(self, labels: Tensor) -> Tensor:
        return ~labels.isnan() & (labels != IGNORE_INDEX)


class Gaussian:
    """Normal noise of a fixed variance v: y ~ N(f, v), for a mean of (f − y)² / (2v) over all elements.

    v = ½ matches `torch.nn.MSELoss` (no ½ in front, Hugging Face's regression loss), v = 1 matches half of it.
    N is the number of elements. ∂²ℓ/∂f² = 1/v. An element does not count where its label is NaN.

    Shapes: prediction: [...]; labels: the same shape, or None when every element counts.

    Args:
        variance: v.

    Raises:
        ValueError: `variance` is not a positive number.
    """

    def __init__(self, variance: float = 0.5) -> None:
        if not (math.isfinite(variance) and variance > 0):
            raise ValueError(f"variance must be a positive number, got {variance!r}.")
        self.variance = variance

    def __repr__(self) -> str:
        return f"Gaussian(variance={self.variance})"

    def sample(self, prediction: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        mean = _full(prediction)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        sampled = mean + self.variance**0.5 * noise
        return sampled if labels is None else _masked(sampled, labels, ~labels.isnan())

    def nll_sum(self, prediction: Tensor, sampled: Tensor) -> Tensor:
        errors = (_full(prediction) - sampled).where(~sampled.isnan(), 0)
        return errors.square().sum() / (2 * self.variance)

    def count(self, prediction: Tensor | None, labels: Tensor) -> Tensor:
        return (~labels.isnan()).sum()


class Product:
    """Independent parts: p(y₁, …, yₙ | f₁, …, fₙ) = Π pᵢ(yᵢ | fᵢ), for a mean over the terms of all parts together.

    Question answering is `Product(Categorical(), Categorical())` over (start logits, end logits). Its loss
    is (mean start loss + mean end loss) / 2. With B starts and B ends that count it is

        ½ (1/B Σ_b s_b + 1/B Σ_b e_b) = 1/(2B) Σ_b (s_b + e_b),

    the mean of 2B terms, so N = 2B and S = ∇ Σ_b (s_b + e_b): counts and sums just add, without another factor.
    Given the predictions the parts are drawn independently, so their cross terms have mean 0. Where more starts
    than ends count (an answer that ends outside the window), that loss weighs an end more than a start and this
    one does not; the two differ by the ratio of the counts.

    Shapes: prediction, labels: tuples with one entry per part; an entry of labels may be None.
    """

    def __init__(self, *parts: Likelihood) -> None:
        self.parts = parts

    def __repr__(self) -> str:
        return f"Product({', '.join(map(repr, self.parts))})"

    def sample(self, prediction: tuple, labels: tuple | None, generator: torch.Generator) -> tuple:
        labels = labels or (None,) * len(self.parts)
        zipped = zip(self.parts, prediction, labels, strict=True)
        return tuple(part.sample(f, y, generator) for part, f, y in zipped)

    def nll_sum(self, prediction: tuple, sampled: tuple) -> Tensor:
        return sum(part.nll_sum(f, y) for part, f, y in zip(self.parts, prediction, sampled, strict=True))

    def count(self, prediction: tuple | None, labels: tuple) -> Tensor | int:
        prediction = prediction or (None,) * len(self.parts)
        return sum(part.count(f, y) for part, f, y in zip(self.parts, prediction, labels, strict=True))


def _full(prediction: Tensor) -> Tensor:
    """At least float32: losses and samples are not rounded to bf16."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


def _masked(sampled: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    _check_shape(labels, sampled.shape, sampled)
    return sampled.where(counts, math.nan)


def _check_shape(labels: Tensor, expected: torch.Size, prediction: Tensor) -> None:
    if labels.shape != expected:
        raise ValueError(
            f"labels of shape {list(labels.shape)} do not match predictions of shape {list(prediction.shape)}, which "
            f"need labels of shape {list(expected)}: pass readout= with the likelihood of the loss."
        )
