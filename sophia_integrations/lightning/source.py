"""Where the logits and targets of a LightningModule are: the model that the Hessian pass calls, and its readout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..curvature import Readout
from ..curvature.readout import find_logits, readout_for
from ..curvature.tap import MicroBatch

_HOW_TO = """SophiaCallback found no logits in {name}. Add this method to it:

    def sophia_logits(self, batch):
        '''logits [..., classes] and targets [...] of a batch; a target of -100 does not count.'''
        inputs, targets = batch
        logits = self(inputs)
        return logits, targets

or name the submodule that training_step calls: SophiaCallback(model="…")."""


@dataclass(frozen=True)
class Source:
    """What the pass calls.

    Attributes:
        model: called with the remembered arguments; its parameters and buffers are put aside meanwhile.
        readout: finds predictions and labels in what it returns.
        by_batch: whether `model` takes the whole batch of `training_step`, which nothing else calls it with.
    """

    model: nn.Module
    readout: Readout
    by_batch: bool = False


def find_source(module: nn.Module, model: str | nn.Module | None, readout: Readout | None) -> Source:
    """The source of `module`: the argument, else its method `sophia_logits`, else its one transformers model.

    Raises:
        ValueError: there is none, or several; the name is not one of a submodule.
    """
    if isinstance(model, str):
        model = _submodule(module, model)
    if model is module:
        raise ValueError(
            f"SophiaCallback(model=…) needs a submodule of {type(module).__name__}: strategies call the "
            "LightningModule itself with the arguments of training_step. Add sophia_logits(batch) to it instead."
        )
    if model is not None:
        return Source(model, readout or readout_for(model))
    if callable(getattr(module, "sophia_logits", None)):
        return Source(BatchLogits(module), LogitsAndTargets.like(readout), by_batch=True)
    models = list(_outermost(module, _is_transformers_model))
    if len(models) > 1:
        raise ValueError(
            f"{type(module).__name__} holds {len(models)} transformers models ("
            f"{', '.join(type(m).__name__ for m in models)}): say which one Sophia trains with "
            'SophiaCallback(model="name of the attribute").'
        )
    if not models:
        raise ValueError(_HOW_TO.format(name=type(module).__name__))
    return Source(models[0], readout or readout_for(models[0]))


class BatchLogits(nn.Module):
    """Calls `module.sophia_logits(batch)`; a module, so that the pass finds all parameters and buffers to guard."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        return self.module.sophia_logits(batch)


class LogitsAndTargets(Readout):
    """The output is (logits, targets), as `sophia_logits` returns them."""

    @classmethod
    def like(cls, readout: Readout | None) -> LogitsAndTargets:
        """With the likelihood and the dimensions of `readout`."""
        if readout is None:
            return cls()
        options = dict(batch_dim=readout.batch_dim, rows=readout._rows, class_dim=readout.class_dim)
        return cls(readout.likelihood, **options)

    def labels(self, model: nn.Module, batch: MicroBatch) -> None:
        return None

    def logits(self, output: Any) -> Tensor:
        if not isinstance(output, (tuple, list)) or len(output) != 2:
            raise ValueError(f"sophia_logits must return (logits, targets), got {type(output).__name__}.")
        return find_logits(output[0])

    def predictions(self, output: Any, labels: None, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        self.logits(output)
        return super().predictions(output, output[1], batch)

    def loss(self, output: Any, batch: MicroBatch) -> Tensor:
        """The mean loss at the real targets, for estimators that differentiate it."""
        prediction, targets = self.predictions(output, None, batch)
        return self.likelihood.nll_sum(prediction, targets) / self.likelihood.count(prediction, targets)


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = ", ".join(n for n, _ in module.named_children())
        raise ValueError(
            f"SophiaCallback(model={name!r}): {type(module).__name__} has no such submodule; it has {names or 'none'}."
        ) from None


def _is_transformers_model(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return False
    base = module.get_base_model() if callable(getattr(module, "get_base_model", None)) else module  # PEFT
    return isinstance(base, modeling.PreTrainedModel)


def _outermost(
    module: nn.Module, wanted: Callable[[nn.Module], bool], seen: set[nn.Module] | None = None
) -> Iterator[nn.Module]:
    seen = set() if seen is None else seen
    for child in module.children():
        if child in seen:
            continue
        seen.add(child)
        if wanted(child):
            yield child
        else:
            yield from _outermost(child, wanted, seen)
