"""The witness: the gradient that the training loss sends into the predictions says what that loss is.

A softmax likelihood sends w (p − t) into the logits of a row: p are the probabilities, t the target (one class, or
smoothed), w the weight of the row, 1/N in a mean over N rows. The entries sum to 0 over the classes and over no other
dimension; a row that does not count gets 0 everywhere; and the entries beside the label's are proportional to p. So
the gradient names the dimension of the classes, the rows that count and their weights, with no assumption about
labels, shifts or masks.

It is read once, in a hook of the backward pass, and reduced there to three numbers a row and a few whole rows. The
hook returns nothing: the training gradient stays what it is. Numbers are compared when the pass begins, not in the
hook, which never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import Node

SAMPLED_ROWS, SAMPLED_ELEMENTS = 256, 1 << 22
"""Whole rows of logits kept until the backward pass: at most so many, and so many numbers."""

SUM_TOLERANCE = 0.1
"""|Σ over classes| beside the largest entry, over all rows: rounding and a small penalty on the logits stay below."""

FORM_TOLERANCE = 0.02, 0.08
"""Relative error of a row against w·p, in float32 and in bf16 or fp16, up to which its weight is read from it."""

WEIGHT_TOLERANCE = 0.15, 0.3
"""Relative spread of the weights that rounding is allowed."""

OTHER_FORM = 0.25
"""Relative error of a row with one label from which it is another function of the logits than a softmax."""

MEMORISED = 1e-3
"""Rows whose label has a probability this close to 1 send rounding errors; they tell nothing about the form."""


@dataclass(frozen=True)
class Heard:
    """What the loss turned out to be.

    Attributes:
        class_dim: the dimension of the classes.
        counts: bool, the shape of the logits without it: the rows that have a gradient; None where float16 may have
            lost some.
        weight: of a row, where one could be measured.
        complaint: why it is no softmax likelihood with equal weights, as half a sentence; None when nothing is wrong.
    """

    class_dim: int
    counts: Tensor | None
    weight: float | None = None
    complaint: str | None = None


@dataclass
class Witness:
    """What the training loss says about the predictions of one forward.

    Attributes:
        shape: of the predictions of the whole forward.
        share: rows of a part of it, over all its rows; 1 for the whole.
        counts, class_dim: what was learned, once it was asked; of the part's rows.
    """

    shape: torch.Size
    share: tuple[int, int] = (1, 1)
    counts: Tensor | None = None
    class_dim: int | None = None
    _kept: dict[int, tuple[tuple[Tensor, ...], Tensor]] = field(default_factory=dict)
    _read: dict[int, _Reading] = field(default_factory=dict)
    _calls: int = 0
    _dtype: torch.dtype | None = None

    def rows(self, index: Tensor, dim: int, size: int) -> Witness:
        """The witness of the rows `index`, of `size` in dimension `dim`: how many they are, and which count."""
        part = Witness(self.shape, (len(index), size), class_dim=self.class_dim)
        if self.counts is not None:
            part.counts = _part(self.counts, index.to(self.counts.device), dim, size)
        return part

    @property
    def expected(self) -> float:
        """Numbers in the predictions of these rows."""
        return self.shape.numel() * self.share[0] / self.share[1]

    def hear(self, gradient: Tensor) -> None:
        """Reduce the gradient of the predictions; they may have only one."""
        self._calls += 1
        kept, self._kept = self._kept, {}
        if self._calls == 1 and type(gradient) is Tensor and gradient.shape == self.shape:
            self._dtype = gradient.dtype
            self._read = {dim: _Reading.of(gradient.movedim(dim, -1), *rows) for dim, rows in kept.items()}

    def softmax(self) -> Heard | None:
        """What was heard, measured against a softmax likelihood; None when there is nothing to go by."""
        if self._calls != 1 or not all(bool(reading.finite) for reading in self._read.values()) or not self._read:
            return None
        dim = min(self._read, key=lambda dim: float(self._read[dim].off_balance))
        reading = self._read[dim]
        # Float16 may have lost a small gradient, and a row of zeros would no longer say that the row does not count.
        counts = None if self._dtype == torch.float16 else reading.counts
        return Heard(dim, counts, *reading.judge(self._dtype in (torch.bfloat16, torch.float16)))


@dataclass(frozen=True)
class _Reading:
    """The gradient along one dimension that may be that of the classes, reduced; all on its device.

    Attributes:
        counts: bool [rows], whether the row has a gradient.
        finite: 0-dim, whether all of it is finite.
        off_balance: 0-dim, |Σ over classes| beside the largest entry, over all rows; 0 without any gradient.
        classes: how many there are.
        telling, weights, off, one_label, label: [sampled rows]; whether the row says something, its weight from the
            entries beside the label's, how far these are from weight · p, whether one entry is negative, and which.
    """

    counts: Tensor
    finite: Tensor
    off_balance: Tensor
    classes: int
    telling: Tensor
    weights: Tensor
    off: Tensor
    one_label: Tensor
    label: Tensor

    @classmethod
    def of(cls, gradient: Tensor, index: tuple[Tensor, ...], logits: Tensor) -> _Reading:
        """From a gradient [rows, classes], and the `logits` of the rows `index`."""
        total = gradient.sum(-1).float()
        low, high = gradient.amin(-1), gradient.amax(-1)
        largest = torch.maximum(high, -low).float().norm()
        wide = torch.promote_types(gradient.dtype, torch.float32)
        g, p = gradient[index].to(wide), logits.to(wide).softmax(-1)
        label = g.argmin(-1, keepdim=True)
        telling = (g != 0).any(-1) & (p.gather(-1, label) < 1 - MEMORISED)[:, 0]
        one_label = (g < 0).sum(-1) == 1
        p, g = p.scatter(-1, label, 0), g.scatter(-1, label, 0)
        tiny = torch.finfo(wide).tiny
        weights = (p * g).sum(-1) / p.square().sum(-1).clamp_min(tiny)
        off = (g - weights[:, None] * p).norm(dim=-1) / g.norm(dim=-1).clamp_min(tiny)
        off_balance = total.norm() / largest.clamp_min(torch.finfo(torch.float32).tiny)
        counts, finite = (low < 0) | (high > 0), total.isfinite().all()
        return cls(counts, finite, off_balance, p.shape[-1], telling, weights, off, one_label, label[:, 0])

    def judge(self, half: bool) -> tuple[float | None, str | None]:
        """The weight of a row, and the complaint."""
        if not bool(self.telling.any()):
            return None, None
        if float(self.off_balance) > SUM_TOLERANCE:
            return None, f"its gradient does not sum to 0 over the classes (off by {float(self.off_balance):.0%})"
        weights, off = self.weights[self.telling], self.off[self.telling]
        if self.classes == 2:
            return self._judge_two(weights, half)
        middle = float(off.median())
        if len(off) > 3 and bool(self.one_label[self.telling].all()) and middle > OTHER_FORM:
            return None, f"beside its label a row's gradient is not proportional to the softmax (off by {middle:.0%})"
        weights = weights[off <= FORM_TOLERANCE[half]]
        return (float(weights.median()), _unequal(weights, half)) if len(weights) else (None, None)

    def _judge_two(self, weights: Tensor, half: bool) -> tuple[float | None, str | None]:
        """Two classes: a row has one number, and an uneven one may be a soft target as well as a weight.

        What is one weight for either label, and not the same for both, is a class weight.
        """
        label = self.label[self.telling]
        each = [weights[label == one] for one in (0, 1)]
        if any(len(w) < 2 or _spread(w) > FORM_TOLERANCE[half] for w in each):
            return None, None
        return float(weights.median()), _unequal(weights, half)


def listen(predictions: Tensor, class_dims: Sequence[int], counts: Tensor | None, seed: int) -> Witness | None:
    """A witness of the gradient of `predictions`, or None when they will get none that can be read.

    Args:
        predictions: logits of a training forward, with their graph.
        class_dims: the dimensions that may be that of the classes.
        counts: bool, as many as there are rows: those whose label is known to count are looked at first.
        seed: of the choice of rows to keep whole.
    """
    if type(predictions) is not Tensor or predictions.grad_fn is None or predictions.layout != torch.strided:
        return None
    witness = Witness(predictions.shape)
    detached = predictions.detach()
    for dim in class_dims:
        moved = detached.movedim(dim, -1)
        index = _choose_rows(moved, counts, seed)
        witness._kept[dim % predictions.ndim] = index, moved[index]
    _on_gradient(predictions, witness.hear)
    return witness


def _choose_rows(logits: Tensor, counts: Tensor | None, seed: int) -> tuple[Tensor, ...]:
    """Indices of the rows to keep whole, of logits [..., classes]; the same seed chooses the same rows."""
    shape = logits.shape[:-1]
    number = min(shape.numel(), SAMPLED_ROWS, max(16, SAMPLED_ELEMENTS // max(logits.shape[-1], 1)))
    score = torch.rand(shape.numel(), generator=torch.Generator().manual_seed(seed)).to(logits.device)
    if counts is not None and counts.numel() == shape.numel():
        score = score + counts.flatten().to(score.device)
    return torch.unravel_index(score.topk(number).indices, shape)


def _on_gradient(predictions: Tensor, hear: Callable[[Tensor], None]) -> None:
    """Call `hear` with the gradient of `predictions`, or of the tensor that they are a cast of.

    accelerate casts what a forward returns to float32 after the model has computed its loss from the original.
    """
    node, slot = predictions.grad_fn, predictions.output_nr
    while node.name() == "ToCopyBackward0":
        following, slot = node.next_functions[0]
        if following is None or following.name() == "torch::autograd::AccumulateGrad":
            break
        node = following
    _hook(node, slot, hear)


def _hook(node: Node, slot: int, hear: Callable[[Tensor], None]) -> None:
    def before(gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[slot] is not None:
            with torch.no_grad():
                hear(gradients[slot].detach())

    node.register_prehook(before)


def _spread(weights: Tensor) -> float:
    return float((weights.max() - weights.min()) / weights.abs().median())


def _unequal(weights: Tensor, half: bool) -> str | None:
    if len(weights) < 2 or _spread(weights) <= WEIGHT_TOLERANCE[half]:
        return None
    ratio = float(weights.max() / weights.min())
    return f"it weighs one prediction {ratio:,.3g} times as much as another"


def _part(counts: Tensor, index: Tensor, dim: int, size: int) -> Tensor | None:
    for candidate in (dim, 0):
        if counts.ndim > candidate and counts.shape[candidate] == size:
            return counts.index_select(candidate, index)
    if counts.ndim and counts.shape[0] % size == 0:
        split = counts.unflatten(0, (size, -1) if dim == 0 else (-1, size))
        return split.index_select(min(dim, 1), index).flatten(0, 1)
    return None
