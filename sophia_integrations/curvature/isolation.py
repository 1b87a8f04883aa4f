"""The guarantee that the Hessian pass changes nothing but h: gradients, random states and buffers come back."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def isolated(model: nn.Module, params: Sequence[Tensor], seed: int) -> Iterator[None]:
    """Run the body with empty gradients and its own random streams; restore all of it bit for bit.

    Args:
        model: its parameters' `.grad` and its modules' buffers are put aside.
        params: the optimizer's parameters, whose `.grad` is put aside as well.
        seed: seeds the global generators inside, so dropout of the pass does not depend on the training's.
    """
    with _gradients_aside([*model.parameters(), *params]), _buffers_restored(model), _random_states_forked(model, seed):
        yield


@contextlib.contextmanager
def _gradients_aside(params: Sequence[Tensor]) -> Iterator[None]:
    grads = {param: param.grad for param in params}
    try:
        for param in grads:
            param.grad = None
        yield
    finally:
        for param, grad in grads.items():
            param.grad = grad


@contextlib.contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    registered = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    contents = [(b, b.clone()) for _, buffers in registered for b in buffers.values() if b is not None]
    try:
        yield
    finally:
        for module, buffers in registered:
            module._buffers.update(buffers)
        for buffer, saved in contents:
            buffer.copy_(saved)


@contextlib.contextmanager
def _random_states_forked(model: nn.Module, seed: int) -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
