"""Makes `optim="sophia"` known to transformers, when transformers is imported; no cost where it never is."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from wrapt import wrap_function_wrapper
from wrapt.importer import when_imported

from .arguments import NAMES, SOPHIAS

Builder = Callable[[Any, Any], "tuple[type, dict[str, Any]]"]
"""From TrainingArguments and a model: the class of an optimizer and its keyword arguments, `params` among them for
parameter groups of its own."""

_registered = False
_others: dict[str, Builder] = {}


def register() -> None:
    """Register Sophia with transformers, now or as soon as it is imported. Calling it again changes nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    when_imported("transformers.training_args")(_add_names)
    when_imported("transformers.modeling_utils")(_add_models)
    when_imported("transformers.trainer")(_extend_trainer)


def register_optimizer(name: str, build: Builder) -> None:
    """Make another `optim=name` known to the Trainers of this process, now or as soon as transformers is imported.

    Args:
        name: that neither transformers nor this package has.
        build: makes the optimizer.

    Raises:
        ValueError: the name is one of Sophia's.
    """
    if name in SOPHIAS:
        raise ValueError(f"optim={name!r} is Sophia's own; choose another name.")
    _others[name] = build
    if name not in NAMES:
        NAMES.append(name)
        when_imported("transformers.training_args")(lambda module: _add_enum_member(module.OptimizerNames, name))


def _add_names(training_args: ModuleType) -> None:
    for name in NAMES:
        _add_enum_member(training_args.OptimizerNames, name)


def _add_models(_: ModuleType) -> None:
    from ..curvature import register_readout
    from ..optim import register_conventions
    from .groups import conventions_of
    from .heads import resolve_readout

    register_readout(resolve_readout)
    register_conventions(conventions_of)


def _extend_trainer(trainer: ModuleType) -> None:
    from .callback import SophiaCallback
    from .integration import around_training_step, optimizer_cls_and_kwargs

    def get_optimizer_cls_and_kwargs(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> tuple[Any, dict]:
        build = _others.get(getattr(args[0].optim, "value", args[0].optim)) if args else None
        if build is not None:
            return build(*args, **kwargs)
        return optimizer_cls_and_kwargs(*args, **kwargs) or wrapped(*args, **kwargs)

    def training_step(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
        if getattr(instance, "notes_sophia_labels", False):
            return wrapped(*args, **kwargs)
        with around_training_step(instance, *args, **kwargs):
            return wrapped(*args, **kwargs)

    wrap_function_wrapper(trainer, "Trainer.get_optimizer_cls_and_kwargs", get_optimizer_cls_and_kwargs)
    wrap_function_wrapper(trainer, "Trainer.training_step", training_step)
    trainer.DEFAULT_CALLBACKS.append(SophiaCallback)


def _add_enum_member(enum: Any, value: str) -> None:
    """Add a real member to a string enum: iteration, lookup by value, argparse choices and copies see it."""
    if value in enum._value2member_map_:
        return
    name = value.upper()
    member = str.__new__(enum, value)
    member._name_, member._value_ = name, value
    # In a process that never imported this package the enum lacks the member, so it travels as a plain string.
    member.__reduce_ex__ = lambda protocol: (str, (value,))
    member.__deepcopy__ = lambda memo: member
    member.__copy__ = lambda: member
    setattr(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
