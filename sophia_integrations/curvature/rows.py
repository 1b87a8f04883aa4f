"""Rows of a micro-batch: how many there are, a part of them, and whether a part gives what it gave in the whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from .isolation import isolated
from .tap import MicroBatch

EXACT, ROUNDED = 1e-3, 5e-2
"""How far predictions of the same rows may be apart, of the largest; between the two bf16 and fp16 cannot tell."""


def count_rows(batch: MicroBatch, dim: int) -> int | None:
    """Length of dimension `dim` of the first tensor argument; None where the arguments do not tell it."""
    leaves = _leaves(batch.args, batch.kwargs)[0]
    if any(not _is_plain(leaf) for leaf in leaves):
        return None
    return next((_length(leaf, dim) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0), None)


def take_rows(batch: MicroBatch, index: Tensor, dim: int, size: int) -> MicroBatch:
    """The micro-batch restricted to the rows `index`, as views of new tensors; a full index returns it as it is.

    Tensors have their rows in dimension `dim`, those of one dimension in dimension 0. Those of another length pass
    through.
    """
    if len(index) == size:
        return batch
    leaves, structure = _leaves(batch.args, batch.kwargs, batch.labels)
    args, kwargs, labels = tree_unflatten([select(leaf, index, dim, size) for leaf in leaves], structure)
    return replace(batch, args=args, kwargs=kwargs, labels=labels, witness=part_of_witness(batch, index, dim, size))


def part_of_witness(batch: MicroBatch, index: Tensor, dim: int, size: int) -> Any:
    """What the batch's witness says about the rows `index` alone."""
    return None if batch.witness is None else batch.witness.rows(index, dim, size)


def select(leaf: Any, index: Tensor, dim: int, size: int) -> Any:
    """The rows `index` of a tensor that has `size` of them; anything else as it is."""
    if isinstance(leaf, Tensor) and leaf.ndim > 0 and _length(leaf, dim) == size:
        return leaf.index_select(_dim(leaf, dim), index.to(leaf.device, non_blocking=True))
    return leaf


def shape_of_selection(batch: MicroBatch, dim: int, size: int) -> tuple[bool, ...]:
    """Which of the arguments `take_rows` takes rows of."""
    leaves = _leaves(batch.args, batch.kwargs)[0]
    return tuple(isinstance(leaf, Tensor) and leaf.ndim > 0 and _length(leaf, dim) == size for leaf in leaves)


def rows_stand_alone(
    model: nn.Module,
    predict: Callable[[MicroBatch], Tensor],
    whole: MicroBatch,
    part: MicroBatch,
    index: Tensor,
    dim: int,
    size: int,
) -> bool | None:
    """Whether the model predicts for `part` what it predicts for the rows `index` of `whole`; None if it cannot tell.

    Both are called once, without gradients, in evaluation mode, so that dropout does not hide the answer. It is no
    for time steps taken for rows, for an argument that has no rows, and for rows that look at each other.
    """
    with isolated(model, [], 0), torch.no_grad(), _evaluating(model):
        try:
            expected = predict(whole)
        except Exception:  # it may only run in training mode
            return None
        try:
            found = predict(part)
        except Exception:  # the whole micro-batch went through, so it is the choice of rows that broke it
            return False
    off = [
        float((rows - found).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))
        for rows in _rows_of_output(expected, index.to(expected.device), dim, size)
        if rows.shape == found.shape and rows.numel()
    ]
    if expected.dtype in (torch.bfloat16, torch.float16) and off and EXACT < min(off) < ROUNDED:
        return None
    return bool(off) and min(off) <= EXACT


def _rows_of_output(output: Tensor, index: Tensor, dim: int, size: int) -> Iterator[Tensor]:
    """The rows `index` of predictions, wherever they may be: in dimension `dim` or 0, or flattened into the first."""
    for candidate in {dim, 0}:
        if output.ndim > candidate and output.shape[candidate] == size:
            yield output.index_select(candidate, index)
    if output.ndim and size and output.shape[0] % size == 0 and output.shape[0] > size:
        split = output.unflatten(0, (size, -1) if dim == 0 else (-1, size))
        yield split.index_select(dim if dim < 2 else 0, index).flatten(0, 1)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without the modules' own `eval` and `train`, which may do more."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any], *more: Any) -> tuple[list[Any], Any]:
    return tree_flatten((args, kwargs, *more), is_leaf=lambda node: node is not args and _is_one_piece(node))


def _is_one_piece(node: Any) -> bool:
    """A packed sequence, or a list of records: containers whose tensors have no dimension of rows in common."""
    if isinstance(node, PackedSequence):
        return True
    records = isinstance(node, (list, tuple)) and len(node) > 0 and not isinstance(node[0], (Tensor, list, tuple))
    return records and _holds_tensors(node[0], 3) and all(type(x) is type(node[0]) for x in node)


def _is_plain(leaf: Any) -> bool:
    """Whether rows can be taken from a leaf, or need not."""
    if isinstance(leaf, Tensor):
        return leaf.layout == torch.strided and not leaf.is_nested
    return not _holds_tensors(leaf, 3)


def _holds_tensors(value: Any, depth: int) -> bool:
    if isinstance(value, Tensor):
        return True
    if depth == 0 or isinstance(value, (str, bytes, int, float, type, nn.Module)):
        return False
    if isinstance(value, Mapping):
        return any(_holds_tensors(v, depth - 1) for v in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(_holds_tensors(v, depth - 1) for v in value)
    return any(_holds_tensors(v, depth - 1) for v in getattr(value, "__dict__", {}).values())


def _dim(leaf: Tensor, dim: int) -> int:
    return dim if leaf.ndim > dim else 0


def _length(leaf: Tensor, dim: int) -> int:
    return leaf.shape[_dim(leaf, dim)]
