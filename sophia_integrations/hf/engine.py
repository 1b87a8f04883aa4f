"""How the Trainer's pieces meet the engine: the optimizer it should build, and the labels it takes away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..curvature import GaussNewtonBartlett
from ..optim import SophiaG
from .arguments import DEFAULTS, ESTIMATOR_KEYS, OPTIMIZER_KEYS, parse_optim_args
from .registration import NAMES


def optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[type[SophiaG], dict] | None:
    """The class and keyword arguments for `Trainer.create_optimizer`, or None when `args.optim` is not ours.

    Raises:
        ValueError: an unknown or malformed `optim_args`, no model, or a parallelism that hides the parameters.
    """
    if getattr(args.optim, "value", args.optim) not in NAMES:
        return None
    given = parse_optim_args(args.optim_args)
    if model is None:
        raise ValueError("Sophia needs the model: call get_optimizer_cls_and_kwargs(args, model).")
    if getattr(args, "deepspeed", None):
        raise ValueError("Sophia does not run under DeepSpeed, which owns the gradients: use DDP.")
    if getattr(args, "fsdp", None):
        raise ValueError("Sophia does not run under FSDP yet: use DDP.")
    estimator_options = {k.removeprefix("hessian_"): v for k, v in given.items() if k in ESTIMATOR_KEYS}
    estimator_options.setdefault("seed", args.seed)
    options = {k: v for k, v in {**DEFAULTS, **given}.items() if k in OPTIMIZER_KEYS}
    betas = (options.pop("beta1"), options.pop("beta2"))
    estimator = GaussNewtonBartlett(model, **estimator_options)
    return SophiaG, {"lr": args.learning_rate, "betas": betas, **options, "estimator": estimator}


@contextlib.contextmanager
def noting_labels(optimizer: Any, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Iterator[None]:
    """Around one `Trainer.training_step`: tell the estimator the labels, which the Trainer may keep from the model."""
    sophia = find_sophia(optimizer)
    note = getattr(sophia.estimator, "note_labels", None) if sophia is not None else None
    if note is None:
        yield
        return
    note(inputs.get("labels"))
    try:
        yield
    finally:
        note(None)


def find_sophia(optimizer: Any) -> SophiaG | None:
    """The Sophia optimizer inside wrappers such as `AcceleratedOptimizer`, or None."""
    while optimizer is not None and not isinstance(optimizer, SophiaG):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
