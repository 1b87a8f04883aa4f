"""How the Trainer's pieces meet the engine: the optimizer it should build, and the labels it takes away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..curvature import GaussNewtonBartlett, Hutchinson, UnitEstimator
from ..optim import EIGEN_DEFAULTS, UNCLIPPED, SophiaG, SophiaH, param_groups
from .arguments import (
    ADAM_ARGUMENTS,
    DEFAULTS,
    ESTIMATOR_KEYS,
    SOPHIAS,
    parse_optim_args,
    refuse_foreign_arguments,
    without_effect,
)
from .loss_scale import divide_once, divided_by_accelerate
from .parallelism import check_parallelism

OLDEST_TRANSFORMERS = (4, 46)
_LOSS_IS_NO_LIKELIHOOD = frozenset(
    "CPOConfig DPOConfig DistillationConfig GKDConfig GRPOConfig KTOConfig NashMDConfig OnlineDPOConfig ORPOConfig "
    "PPOConfig PRMConfig RewardConfig RLOOConfig XPOConfig".split()
)
"""TRL's training arguments whose trainers minimise something else than the likelihood of labels."""


def optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[type[SophiaG], dict] | None:
    """The class and keyword arguments for `Trainer.create_optimizer`, or None when `args.optim` is not ours.

    Raises:
        ValueError: an unknown or malformed `optim_args`, one of AdamW's arguments that the optimizer would ignore, no
            model, an old transformers, a trainer whose loss is not a likelihood of labels, or a parallelism that
            hides the parameters.
    """
    name = getattr(args.optim, "value", args.optim)
    if name not in SOPHIAS:
        return None
    _check_supported(args, model)
    ignored = without_effect(name, _given_adam_arguments(args))
    if ignored:
        raise ValueError("; ".join(f"{argument} {sentence}" for argument, sentence in ignored.items()) + ".")
    given = parse_optim_args(args.optim_args)
    refuse_foreign_arguments(name, given)
    estimator_options = {k.removeprefix("hessian_"): v for k, v in given.items() if k in ESTIMATOR_KEYS}
    estimator_options.setdefault("seed", args.seed)
    options = _optimizer_options({k: v for k, v in given.items() if k not in ESTIMATOR_KEYS}, name)
    optimizer: type[SophiaG] = SophiaG
    estimator: type[UnitEstimator] = GaussNewtonBartlett
    if name == "sophia_h":
        optimizer, estimator = SophiaH, Hutchinson
    kwargs: dict[str, Any] = {"lr": args.learning_rate, "estimator": estimator(model, **estimator_options)}
    if name != "sophia_eigen":
        return optimizer, {**kwargs, **options}
    adamw = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if "adamw_lr" in options:
        adamw["lr"] = options.pop("adamw_lr")
    if "hessian_interval" in options:
        kwargs["hessian_interval"] = options.pop("hessian_interval")
    kwargs["params"] = param_groups(model, weight_decay=args.weight_decay, adamw=adamw, **options)
    return optimizer, kwargs


def _optimizer_options(given: dict[str, Any], name: str) -> dict[str, Any]:
    """The words of `optim_args` as those of `SophiaG`, over the defaults of `name`."""
    eigen = name == "sophia_eigen"
    options = {**(EIGEN_DEFAULTS if eigen else {}), **given}
    betas = EIGEN_DEFAULTS["betas"] if eigen else tuple(DEFAULTS.values())
    options["betas"] = (options.pop("beta1", betas[0]), options.pop("beta2", betas[1]))
    shares = [options.pop(f"unclipped_{end}", None) for end in ("start", "end")]
    if shares != [None, None]:
        options["unclipped"] = tuple(
            default if share is None else share
            for share, default in zip(shares, options.get("unclipped", UNCLIPPED), strict=True)
        )
    return options


def _given_adam_arguments(args: Any) -> list[str]:
    """Those that are not as their class has them: `TrainingArguments` cannot tell a default from a value given."""
    fields = getattr(args, "__dataclass_fields__", {})
    return [name for name in ADAM_ARGUMENTS if name in fields and getattr(args, name) != fields[name].default]


def _check_supported(args: Any, model: nn.Module | None) -> None:
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise ValueError(
            f"Sophia needs transformers {oldest} or newer, and this is {transformers.__version__}: "
            f"pip install 'transformers>={oldest}'."
        )
    if model is None:
        raise ValueError("Sophia needs the model: call get_optimizer_cls_and_kwargs(args, model).")
    check_parallelism(args, model, second_derivatives=getattr(args.optim, "value", args.optim) == "sophia_h")
    other = next((c.__name__ for c in type(args).__mro__ if c.__name__ in _LOSS_IS_NO_LIKELIHOOD), None)
    if other is not None:
        raise ValueError(
            f"optim={getattr(args.optim, 'value', args.optim)!r} estimates the curvature of the model's own loss, and "
            f"{other} trains another one: for that loss pass optimizers=(SophiaH(model.parameters(), lr=…, estimator="
            "Hutchinson(model, loss=lambda output, batch: …)), None), or to use the model's own likelihood all the "
            "same, SophiaG with estimator=GaussNewtonBartlett(model)."
        )


@contextlib.contextmanager
def around_training_step(
    trainer: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None, *_: Any, **__: Any
) -> Iterator[None]:
    """Around one `Trainer.training_step`: what the engine must know of the batch, and the scale of its loss.

    The estimator is told the labels, which the Trainer may keep from the model.
    """
    sophia = find_sophia(trainer.optimizer)
    note = getattr(sophia.estimator, "note_labels", None) if sophia is not None else None
    if note is None:
        yield
        return
    batch = inputs if isinstance(inputs, Mapping) else {}
    divide_once(trainer, batch, num_items_in_batch)
    note(batch.get("labels"))
    try:
        with divided_by_accelerate(trainer):
            yield
    finally:
        note(None)


def find_sophia(optimizer: Any) -> SophiaG | None:
    """The Sophia optimizer inside wrappers such as `AcceleratedOptimizer`, or None."""
    while optimizer is not None and not isinstance(optimizer, SophiaG):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
