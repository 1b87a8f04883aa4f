"""Where a setting stands in a resolved recipe: one table of each framework for all who read, name or turn it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Settings = dict[str, Any]
Keys = tuple[str | int, ...]

_OPTIMIZER = ("model", "init_args", "optimizer", "init_args")
_GROUPS = ("model", "init_args", "groups")
_CALLBACK = ("trainer", "callbacks", "SophiaCallback", "init_args")
_IN_TRAINING = ("learning_rate", "weight_decay", "warmup_steps", "warmup_ratio", "max_grad_norm", "max_steps", "seed",
                "adam_beta1")  # fmt: skip
_IN_OPTIM_ARGS = ("rho", "eps", "noise_floor", "hessian_interval", "unclipped_start", "unclipped_end", "basis",
                  "basis_warmup", "beta1")  # fmt: skip
_HF: dict[str, Keys] = {
    **{name: ("training", name) for name in _IN_TRAINING},
    **{name: ("training", "optim_args", name) for name in _IN_OPTIM_ARGS},
    "fraction": ("training", "optim_args", "hessian_fraction"),
    "units": ("training", "optim_args", "hessian_units"),
    "epochs": ("training", "num_train_epochs"),
    "pretrained": ("model", "pretrained"),
    "peft": ("model", "peft"),
}
_LIGHTNING: dict[str, Keys] = {
    "learning_rate": (*_OPTIMIZER, "lr"),
    "weight_decay": (*_OPTIMIZER, "weight_decay"),
    "hessian_interval": (*_OPTIMIZER, "hessian_interval"),
    "momentum": (*_OPTIMIZER, "momentum"),
    "warmup_steps": ("model", "init_args", "warmup_steps"),
    "max_grad_norm": ("trainer", "gradient_clip_val"),
    "max_steps": ("trainer", "max_steps"),
    "epochs": ("trainer", "max_epochs"),
    "seed": ("seed_everything",),
    "fraction": (*_CALLBACK, "fraction"),
    "units": (*_CALLBACK, "units"),
    "pretrained": ("model", "init_args", "pretrained"),
    "peft": ("model", "init_args", "peft"),
    **{name: (*_GROUPS, name) for name in ("basis", "basis_warmup", "rho", "eps", "noise_floor", "unclipped")},
}
_DEFAULTS: dict[str, Any] = {"fraction": 0.0625, "units": 8, "hessian_interval": 10}
"""Of both frameworks; those of the others depend on the optimizer."""


def is_lightning(settings: Mapping[str, Any]) -> bool:
    """Whether a resolved recipe is a LightningCLI config; the Trainer's say ``framework: hf``, or have ``training``."""
    return bool(settings) and settings.get("framework") != "hf" and "training" not in settings


def path_of(settings: Mapping[str, Any], name: str) -> Keys:
    """Where a setting stands, or would: its keys, down to that in ``optim_args``.

    What can stand in a Lightning recipe's `groups` stands in its optimizer where there are none.

    Args:
        settings: a resolved recipe.
        name: as in TrainingArguments or of `SophiaG`; ``epochs``, ``pretrained`` and ``peft`` beside.
    """
    path = (_LIGHTNING if is_lightning(settings) else _HF).get(name, (name,))
    if path[: len(_GROUPS)] == _GROUPS and not at(settings, _GROUPS):
        return (*_OPTIMIZER, *path[len(_GROUPS) :])
    if path[: len(_CALLBACK)] == _CALLBACK:
        callbacks = at(settings, ("trainer", "callbacks")) or []
        ours = [i for i, c in enumerate(callbacks) if str(c.get("class_path", "")).endswith("SophiaCallback")]
        return ("trainer", "callbacks", ours[0] if ours else 0, *path[3:])
    return path


def value_of(settings: Mapping[str, Any], name: str) -> Any:
    """A setting by its name; the default where it is not set and both frameworks have the same, else None."""
    value = at(settings, path_of(settings, name))
    return _DEFAULTS.get(name) if value is None else value


def put(settings: Settings, name: str, value: Any) -> None:
    """Changes a setting in place."""
    *way, last = path_of(settings, name)
    if way[-1:] == ["optim_args"]:
        set_optim_args(settings["training"], **{str(last): value})
        return
    inner: Any = settings
    for key in way:
        if inner.get(key) is None:
            inner[key] = {}
        inner = inner[key]
    inner[last] = value


def at(settings: Mapping[str, Any], path: Keys) -> Any:
    """What stands at a path of keys, that of ``optim_args`` continued into its text; None where nothing does."""
    value: Any = settings
    for key in path:
        if isinstance(value, str):
            value = {word: _number(text) for word, text in optim_args(value).items()}
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def optim_args(text: str | None) -> dict[str, str]:
    """``optim_args`` of TrainingArguments as a mapping of words."""
    pairs = (pair.split("=", 1) for pair in (text or "").split(",") if "=" in pair)
    return {key.strip(): value.strip() for key, value in pairs}


def set_optim_args(training: dict[str, Any], **values: Any) -> None:
    """Changes some of them in place."""
    words = {**optim_args(training.get("optim_args")), **values}
    training["optim_args"] = ",".join(f"{key}={value}" for key, value in words.items())


def _number(text: str) -> Any:
    try:
        return float(text) if set(text) & set(".eE") else int(text)
    except ValueError:
        return text
