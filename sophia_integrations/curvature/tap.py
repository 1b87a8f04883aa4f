"""The tap: remembers the micro-batches a model sees, by reference, and only while the next step needs them."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .witness import Witness

MAX_REMEMBERED = 256
"""Micro-batches kept at most; a longer accumulation window is estimated from its last ones."""


@dataclass(frozen=True)
class MicroBatch:
    """The arguments of one training forward, the labels that belong to it, and the autocast state around it.

    Attributes:
        witness: what the training loss said at the predictions of this forward; None where nobody listened.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None
    autocast_dtype: torch.dtype | None
    witness: Witness | None = None


class Listener(Protocol):
    """A readout, as the tap knows it."""

    def listen(self, model: nn.Module, output: Any, batch: MicroBatch, seed: int) -> Witness | None:
        """A witness that waits for the gradient of the output of a training forward, or None."""


class Tap:
    """Remembers what `model` is called with, in training mode and with gradients enabled, while it is open."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.open = False
        self.noted_labels: Tensor | None = None
        self.listener: Listener | None = None
        self._remembered: deque[MicroBatch] = deque(maxlen=MAX_REMEMBERED)
        self._running: MicroBatch | None = None
        self._calls = 0
        for handle in (
            model.register_forward_pre_hook(_Hook(self, Tap.see), with_kwargs=True),
            model.register_forward_hook(_Hook(self, Tap.returned)),
        ):
            weakref.finalize(self, handle.remove).atexit = False

    def take(self) -> list[MicroBatch]:
        """Hand over what was remembered and forget it."""
        taken = list(self._remembered)
        self._remembered.clear()
        self._running = None
        return taken

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember one call of the model."""
        if module is self.model and module.training and torch.is_grad_enabled():
            self._running = self.remember(args, kwargs)

    def returned(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A call of the model has returned: where it is remembered, the listener waits for its gradient."""
        if not self.open or self.listener is None:
            return
        if not torch.compiler.is_compiling():
            self._listen(module, output)
        elif _graph_may_break():  # torch.compile traces the hooks of a module, and cannot trace one on a gradient
            _outside_the_graph(self, module, output)

    def _listen(self, module: nn.Module, output: Any) -> None:
        batch, self._running = self._running, None
        if module is self.model and batch is not None and self._remembered and self._remembered[-1] is batch:
            self._calls += 1
            self._remembered[-1] = replace(batch, witness=self.listener.listen(module, output, batch, self._calls))

    def remember(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MicroBatch | None:
        """Remember the arguments of one call."""
        if _passes_running or not self.open:
            return None
        args, kwargs = tree_map(_detached, (args, kwargs))
        self._remembered.append(MicroBatch(args, kwargs, self.noted_labels, _autocast_dtype(self.model)))
        return self._remembered[-1]


_passes_running: list[None] = []


@contextlib.contextmanager
def taps_paused():
    """No tap of any model remembers inside: a Hessian pass calls the model itself."""
    _passes_running.append(None)
    try:
        yield
    finally:
        _passes_running.pop()


_outside_the_graph = torch._disable_dynamo(Tap._listen)


def _graph_may_break() -> bool:
    """Whether the trace under way may leave the graph: not with `fullgraph=True`, which then goes without a witness."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        trace = InstructionTranslator.current_tx()
        return not (trace.output.root_tx.one_graph or getattr(trace, "error_on_graph_break", False))
    except Exception:  # torch's internals are not promised
        return False


_graph_may_break._dynamo_marked_constant = True  # asked while tracing, and a constant of the graph


class _Hook:
    """A forward hook that holds the tap weakly; copies and pickles of the model carry an inert stand-in."""

    def __init__(self, tap: Tap, method: Callable[[Tap, nn.Module, tuple[Any, ...], Any], None]) -> None:
        self._tap, self._method = weakref.ref(tap), method

    def __call__(self, module: nn.Module, args: tuple[Any, ...], third: Any) -> None:
        tap = self._tap()
        if tap is not None:
            self._method(tap, module, args, third)

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
