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
from torch.utils._pytree import tree_flatten, tree_unflatten

from .proportion import fit, ragged_by
from .transfer import on_host

SAMPLED_ROWS, SAMPLED_ELEMENTS = 48, 1 << 20
"""Whole rows of logits kept until the backward pass: at most so many, and so many numbers."""

SUM_TOLERANCE = 0.05
"""|Σ over classes| beside Σ |entries|, over all rows; rounding and a small penalty on the logits stay below it."""

FORM_TOLERANCE = 0.08
"""Relative error of a row against w·p, up to which its weight is read from it; bf16 needs that much."""

WEIGHT_TOLERANCE, WEIGHT_TOLERANCE_IN_HALF = 0.01, 0.1
"""Relative distance of a weight from the others that is allowed, beside four times the error of its own row."""

EXACT = 0.01
"""Relative error below which a row with few classes has w·p beside its label, and no soft target."""

OTHER_FORM = 0.1
"""Relative error of a row with one label from which it is another function of the logits than a softmax."""

MANY_CLASSES, CLASSES_OF_SMOOTHED, MANY_ROWS = 6, 32, 8
"""A row has enough numbers to tell its weight, and to do so with a smoothed label; rows that make a rule."""

MEMORISED = 0.05
"""A row whose label has a probability this close to 1 sends little but rounding errors, and tells nothing."""


@dataclass(frozen=True)
class Heard:
    """What the loss turned out to be.

    Attributes:
        class_dim: the dimension of the classes; None where there are no logits.
        counts: bool, the shape of the logits without it: the rows that have a gradient; None where float16 may have
            lost some.
        number: how many count; None where `counts` is.
        weight: of a row, where one could be measured.
        complaint: why it is no softmax likelihood with equal weights, as half a sentence; None when nothing is wrong.
    """

    class_dim: int | None
    counts: Tensor | None
    number: int | None = None
    weight: float | None = None
    complaint: str | None = None


@dataclass
class Witness:
    """What the training loss says about the predictions of one forward.

    Attributes:
        shape: of the predictions of the whole forward; None for a fused head, which has none.
        share: rows of a part of it, over all its rows; 1 for the whole.
        counts, class_dim, number: what was learned, once it was asked; of the part's rows, but not the number.
    """

    shape: torch.Size | None
    share: tuple[int, int] = (1, 1)
    counts: Tensor | None = None
    class_dim: int | None = None
    number: int | None = None
    _kept: dict[int, tuple[tuple[Tensor, ...], Tensor]] = field(default_factory=dict)
    _read: dict[int, _Reading] = field(default_factory=dict)
    _weights: Tensor | None = None
    _calls: int = 0
    _dtype: torch.dtype | None = None

    def rows(self, index: Tensor, dim: int, size: int) -> Witness:
        """The witness of the rows `index`, of `size` in dimension `dim`: how many they are, and which count."""
        part = Witness(self.shape, (len(index), size), class_dim=self.class_dim)
        if self.counts is not None:
            part.counts = _part(self.counts, index.to(self.counts.device, non_blocking=True), dim, size)
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

    def hear_weights(self, gradient: Tensor) -> None:
        """Keep the gradient of the labels' log-probabilities, which is minus the weight of each."""
        self._calls += 1
        self._weights, self._dtype = -gradient, gradient.dtype

    def heard(self) -> Heard | None:
        """What was heard, measured against a softmax likelihood; None when there is nothing to go by."""
        if self._weights is not None:
            return self._heard_weights()
        if self._calls != 1 or not all(bool(reading.finite) for reading in self._read.values()) or not self._read:
            return None
        dim = min(self._read, key=lambda dim: float(self._read[dim].off_balance))
        reading = self._read[dim]
        # Float16 may have lost a small gradient, and a row of zeros would no longer say that the row does not count.
        lost = self._dtype == torch.float16
        told = (None, None) if lost else (reading.counts, int(reading.number))
        return Heard(dim, *told, *reading.judge(self._tolerance))

    def _heard_weights(self) -> Heard | None:
        weights = self._weights[self._weights != 0].float()
        if self._calls != 1 or not len(weights) or not bool(weights.isfinite().all()):
            return None
        return Heard(None, None, None, _median(weights), _unequal(weights, torch.zeros_like(weights), self._tolerance))

    @property
    def _tolerance(self) -> float:
        return WEIGHT_TOLERANCE_IN_HALF if self._dtype in (torch.bfloat16, torch.float16) else WEIGHT_TOLERANCE


def bring_home(witnesses: Sequence[Witness]) -> None:
    """Let the host have what all of them have read, but for the masks of the rows, by one transfer."""
    readings = [(witness, dim) for witness in witnesses for dim in witness._read]
    weighed = [witness for witness in witnesses if witness._weights is not None]
    leaves, structure = tree_flatten([vars(w._read[dim]) | {"counts": None} for w, dim in readings])
    sent = [x for x in leaves if isinstance(x, Tensor)]
    arrived = on_host(sent + [witness._weights for witness in weighed])
    for witness, weights in zip(weighed, arrived[len(sent) :], strict=True):
        witness._weights = weights
    there = iter(arrived)
    told = tree_unflatten([next(there) if isinstance(x, Tensor) else x for x in leaves], structure)
    for (witness, dim), fields in zip(readings, told, strict=True):
        witness._read[dim] = _Reading(**fields | {"counts": witness._read[dim].counts})


@dataclass(frozen=True)
class _Reading:
    """The gradient along one dimension that may be that of the classes, reduced; all on its device.

    Attributes:
        counts, number: bool [rows], whether the row has a gradient; and how many have.
        finite: 0-dim, whether all of it is finite.
        off_balance: 0-dim, |Σ over classes| beside Σ |entries|, over all rows; 0 without any gradient.
        classes: how many there are.
        telling, one_label, label: [sampled rows]; whether the row says something, whether one entry is negative, and
            which is the lowest.
        ragged: [sampled rows], how far the middle entry beside the lowest is from the middle ratio of g to p; 0 in
            float16, which has too few small numbers.
        plain, shifted: ([sampled rows], [sampled rows]); the weight of the row and the relative error of its entries
            beside the lowest against w · p, and against w · p + constant, which label smoothing adds.
    """

    counts: Tensor
    number: Tensor
    finite: Tensor
    off_balance: Tensor
    classes: int
    telling: Tensor
    one_label: Tensor
    label: Tensor
    ragged: Tensor
    plain: tuple[Tensor, Tensor]
    shifted: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, gradient: Tensor, index: tuple[Tensor, ...], logits: Tensor) -> _Reading:
        """From a gradient [rows, classes], and the `logits` of the rows `index`."""
        total = gradient.sum(-1).float()
        size = torch.linalg.vector_norm(gradient, 1, dim=-1).float()
        wide = torch.promote_types(gradient.dtype, torch.float32)
        g, p = gradient[index].to(wide), logits.to(wide).softmax(-1)
        label = g.argmin(-1, keepdim=True)
        telling = ((g.gather(-1, label) < 0) & (p.gather(-1, label) < 1 - MEMORISED))[:, 0]
        one_label = (g < 0).sum(-1) == 1
        p = p.where(g != 0, 0)  # an entry may have come to nothing in half precision
        off_balance = total.norm() / size.norm().clamp_min(torch.finfo(torch.float32).tiny)
        ragged = torch.zeros_like(telling, dtype=wide) if gradient.dtype == torch.float16 else ragged_by(p, g, label)
        fits = fit(p, g, label, False), fit(p, g, label, True)
        finite = total.isfinite().all()
        counts = size > 0
        return cls(
            counts, counts.sum(), finite, off_balance, p.shape[-1], telling, one_label, label[:, 0], ragged, *fits
        )

    def judge(self, tolerance: float) -> tuple[float | None, str | None]:
        """The weight of a row, and the complaint."""
        if not bool(self.telling.any()):
            return None, None
        if float(self.off_balance) > SUM_TOLERANCE:
            return None, f"its gradient does not sum to 0 over the classes (off by {float(self.off_balance):.0%})"
        one_label = bool(self.one_label[self.telling].all())
        weights, off = (x[self.telling] for x in self.plain)
        many = len(off) >= MANY_ROWS
        if self.classes < MANY_CLASSES:
            if self.classes == 2 or not (many and one_label and bool((off <= EXACT).all())):
                return self._judge_few(weights, off, tolerance)
        elif many and one_label and (ragged := float(self.ragged[self.telling].median())) > OTHER_FORM:
            return None, f"beside its label a row's gradient is not proportional to the softmax (off by {ragged:.0%})"
        elif not one_label:
            if self.classes < CLASSES_OF_SMOOTHED:
                return None, None
            weights, off = (x[self.telling] for x in self.shifted)
        read = off <= FORM_TOLERANCE
        return _median(weights[read]), _unequal(weights[read], off[read], tolerance)

    def _judge_few(self, weights: Tensor, off: Tensor, tolerance: float) -> tuple[float | None, str | None]:
        """A row with few classes has too few numbers to tell a soft or smoothed target from a weight.

        What is one weight for each label, and not the same for all, is a class weight.
        """
        label = self.label[self.telling]
        each = [(weights[label == one], off[label == one]) for one in range(self.classes)]
        each = [(w, o) for w, o in each if len(w)]
        if len(each) < 2 or any(len(w) < 2 or bool((o > EXACT).any()) or _unequal(w, o, EXACT) for w, o in each):
            return None, None
        return _median(weights), _unequal(weights, off, tolerance)


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


def listen_to_log_probabilities(log_probs: Tensor) -> Witness | None:
    """A witness of the labels' log-probabilities [...] that a fused head returns in place of logits."""
    if type(log_probs) is not Tensor or log_probs.grad_fn is None:
        return None
    witness = Witness(None)
    _on_gradient(log_probs, witness.hear_weights)
    return witness


def _choose_rows(logits: Tensor, counts: Tensor | None, seed: int) -> tuple[Tensor, ...]:
    """Indices of the rows to keep whole, of logits [..., classes]; the same seed chooses the same rows."""
    shape = logits.shape[:-1]
    number = min(shape.numel(), SAMPLED_ROWS, max(16, SAMPLED_ELEMENTS // max(logits.shape[-1], 1)))
    score = torch.rand(shape.numel(), generator=torch.Generator().manual_seed(seed)).to(
        logits.device, non_blocking=True
    )
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


def _median(weights: Tensor) -> float | None:
    return float(weights.median()) if len(weights) else None


def _unequal(weights: Tensor, off: Tensor, tolerance: float) -> str | None:
    """Half a sentence where a weight is farther from the middle one than the errors of the rows explain."""
    if len(weights) < 2:
        return None
    allowed = tolerance + 4 * (off + off.median())
    if bool(((weights / weights.median() - 1).abs() <= allowed).all()):
        return None
    return f"it weighs one prediction {float(weights.max() / weights.min()):,.3g} times as much as another"


def _part(counts: Tensor, index: Tensor, dim: int, size: int) -> Tensor | None:
    for candidate in (dim, 0):
        if counts.ndim > candidate and counts.shape[candidate] == size:
            return counts.index_select(candidate, index)
    if counts.ndim and counts.shape[0] % size == 0:
        split = counts.unflatten(0, (size, -1) if dim == 0 else (-1, size))
        return split.index_select(min(dim, 1), index).flatten(0, 1)
    return None
