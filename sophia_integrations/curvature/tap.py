"""The tap: remembers the micro-batches a model sees, by reference, and only while the next step needs them."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

MAX_REMEMBERED = 256
"""Micro-batches kept at most; a longer accumulation window is estimated from its last ones."""


@dataclass(frozen=True)
class MicroBatch:
    """The arguments of one training forward, the labels that belong to it, and the autocast state around it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None
    autocast_dtype: torch.dtype | None

    @property
    def num_rows(self) -> int:
        """Length of the batch dimension: dimension 0 of the first tensor argument."""
        for leaf in tree_flatten((self.args, self.kwargs))[0]:
            if isinstance(leaf, Tensor) and leaf.ndim > 0:
                return leaf.shape[0]
        return 1

    def rows(self, index: Tensor) -> MicroBatch:
        """The micro-batch restricted to the rows `index` [rows]; tensors without a batch dimension pass through."""
        size = self.num_rows
        if len(index) == size:
            return self

        def take(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == size:
                return leaf.index_select(0, index.to(leaf.device))
            return leaf

        args, kwargs, labels = tree_map(take, (self.args, self.kwargs, self.labels))
        return replace(self, args=args, kwargs=kwargs, labels=labels)


class Tap:
    """Remembers what `model` is called with, in training mode and with gradients enabled, while it is open."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.open = False
        self.noted_labels: Tensor | None = None
        self._remembered: deque[MicroBatch] = deque(maxlen=MAX_REMEMBERED)
        self._handle = model.register_forward_pre_hook(_Hook(self), with_kwargs=True)

    def take(self) -> list[MicroBatch]:
        """Hand over what was remembered and forget it."""
        taken = list(self._remembered)
        self._remembered.clear()
        return taken

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember one call of the model."""
        if module is self.model and module.training and torch.is_grad_enabled():
            self.remember(args, kwargs)

    def remember(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the arguments of one call."""
        if _passes_running or not self.open:
            return
        args, kwargs = tree_map(_detached, (args, kwargs))
        self._remembered.append(MicroBatch(args, kwargs, self.noted_labels, _autocast_dtype(self.model)))


_passes_running: list[None] = []


@contextlib.contextmanager
def taps_paused():
    """No tap of any model remembers inside: a Hessian pass calls the model itself."""
    _passes_running.append(None)
    try:
        yield
    finally:
        _passes_running.pop()


class _Hook:
    """The forward pre-hook. It holds the tap weakly; copies and pickles of the model carry an inert stand-in."""

    def __init__(self, tap: Tap) -> None:
        self._tap = weakref.ref(tap)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap = self._tap()
        if tap is not None:
            tap.see(module, args, kwargs)

    def __reduce__(self):
        # From the standard library alone, so that a saved model opens where this package is not installed:
        # a method that takes three arguments and returns None.
        return getattr, (contextlib.nullcontext(), "__exit__")


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _autocast_dtype(model: nn.Module) -> torch.dtype | None:
    device_type = model_device(model).type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
