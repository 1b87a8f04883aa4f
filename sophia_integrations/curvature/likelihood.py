"""Likelihoods: how to draw labels from a model's predictions, their negative log-likelihood, and their count."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampling import sample_categorical

IGNORE_INDEX = -100
"""The label that does not count, as in `torch.nn.functional.cross_entropy`."""


class Likelihood(Protocol):
    """One likelihood p(y | prediction)."""

    def sample(self, prediction: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """Labels drawn from the prediction, masked where `labels` are masked; without gradient."""

    def nll_sum(self, prediction: Tensor, sampled: Tensor) -> Tensor:
        """0-dim: the summed negative log-likelihood of the sampled labels that count."""

    def count(self, prediction: Tensor, sampled: Tensor) -> Tensor:
        """0-dim int64: the number of predictions that count."""


class Categorical:
    """Softmax over the last dimension; the likelihood of cross-entropy.

    `prediction` is logits [rows, classes]; `labels` int64 [rows] with `ignore_index` where a row does not count,
    or None when every row counts.
    """

    def __init__(self, ignore_index: int = IGNORE_INDEX) -> None:
        self.ignore_index = ignore_index

    def sample(self, prediction: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        sampled = sample_categorical(prediction, generator)
        if labels is not None:
            sampled.masked_fill_(labels == self.ignore_index, self.ignore_index)
        return sampled

    def nll_sum(self, prediction: Tensor, sampled: Tensor) -> Tensor:
        return F.cross_entropy(prediction.float(), sampled, reduction="sum", ignore_index=self.ignore_index)

    def count(self, prediction: Tensor, sampled: Tensor) -> Tensor:
        return (sampled != self.ignore_index).sum()
