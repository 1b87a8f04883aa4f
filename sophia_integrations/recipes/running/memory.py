"""What a model and its training weigh, from shapes and types alone: a model without numbers is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...optim.basis import layout_of

_SIDES = (32, 48, 64, 80, 96)  # all different, so that a side of an optimizer's state tells where it comes from
_PACKED = ("8bit", "4bit", "bnb", "galore", "apollo", "lomo")  # their state depends on more than sides and types

_BY_GROUPS = "sophia_eigen"  # makes its own parameter groups, from the model


@dataclass(frozen=True)
class Weight:
    """Sizes in bytes, of one process.

    Attributes:
        parameters: how many numbers the model has.
        trained: how many of them are trained.
        weights: of all parameters.
        gradients: of the trained ones.
        state: of the optimizer; None when the optimizer cannot be asked.
        saved: of the weights in one checkpoint: with adapters only these.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    state: int | None
    saved: int

    def checkpoints(self, kept: int) -> int:
        """Bytes of `kept` checkpoints, one more while it is written, and the model at the end."""
        state = self.state if self.state is not None else 2 * self.gradients
        return (kept + 1) * (self.saved + state) + self.saved


def weigh(
    model: nn.Module,
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None,
    groups: list[dict[str, Any]] | None = None,
) -> Weight:
    """The sizes of `model` in training; `make_optimizer` makes its optimizer for any parameters.

    With `groups`, which `param_groups` made, the state is that of Sophia and AdamW on them.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights, gradients = _bytes(parameters), _bytes(trained)
    return Weight(
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() for parameter in trained),
        weights,
        gradients,
        _state_of_groups(groups) if groups is not None else _state_bytes(make_optimizer, trained),
        gradients if any(hasattr(module, "peft_config") for module in model.modules()) else weights,
    )


def optimizer_maker(arguments: Any) -> Callable[[list[nn.Parameter]], Optimizer] | None:
    """What makes the optimizer that TrainingArguments name, without its Hessian pass; None when its state depends on
    more than the parameters."""
    from transformers import Trainer

    optim = str(getattr(arguments.optim, "value", arguments.optim))
    if optim == _BY_GROUPS or any(sign in optim for sign in _PACKED):
        return None

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, nn.Linear(1, 1))
        return kind(parameters, **(options if "estimator" not in options else {**options, "estimator": None}))

    return make


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def groups_of(arguments: Any, model: nn.Module) -> list[dict[str, Any]] | None:
    """The parameter groups that the optimizer of TrainingArguments makes itself; None where the Trainer makes them."""
    from transformers import Trainer

    if getattr(arguments.optim, "value", arguments.optim) != _BY_GROUPS:
        return None
    return Trainer.get_optimizer_cls_and_kwargs(arguments, model)[1]["params"]


def _state_of_groups(groups: list[dict[str, Any]]) -> int:
    """m and h in float32, factors and eigenvectors; of AdamW two numbers of the parameter's dtype."""
    total = 0
    for group in groups:
        sophia = group.get("update", "sophia") == "sophia"
        for param in group["params"]:
            total += param.numel() * (8 if sophia else 2 * param.element_size())
            if sophia and group.get("basis"):
                layout = layout_of(param.shape, group.get("basis_max_dim"), group.get("basis_flatten", False))
                total += 4 * layout.floats if layout is not None else 0
    return total


def _state_bytes(
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None, parameters: Sequence[Tensor]
) -> int | None:
    """Asked of the optimizer itself: one step on small tensors shows which sides of a parameter its state has."""
    if make_optimizer is None:
        return None
    rules: dict[tuple[int, torch.dtype], list[tuple[list[int], int]]] = {}
    total = 0
    try:
        for parameter in parameters:
            key = (parameter.ndim, parameter.dtype)
            if key not in rules:
                rules[key] = _rule(make_optimizer, *key)
            total += sum(size * math.prod(parameter.shape[side] for side in sides) for sides, size in rules[key])
    except Exception:  # an optimizer that needs its device, a package, or another call
        return None
    return total


def _rule(
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer], sides: int, dtype: torch.dtype
) -> list[tuple[list[int], int]]:
    """For each tensor of the state of a parameter: the parameter's sides it has, and the bytes of a number."""
    sample = nn.Parameter(torch.zeros(_SIDES[:sides], dtype=dtype))
    sample.grad = torch.ones_like(sample)
    optimizer = make_optimizer([sample])
    optimizer.step()
    tensors = [value for value in optimizer.state[sample].values() if isinstance(value, Tensor) and value.ndim]
    return [([_SIDES.index(side) for side in tensor.shape if side > 1], tensor.element_size()) for tensor in tensors]
