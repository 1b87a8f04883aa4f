"""The words of `TrainingArguments`: names for `optim`, and `optim_args`, parsed so that a typo gets our sentence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import nearest
from ..ranges import out_of_range

SOPHIAS = ("sophia", "sophia_g", "sophia_h", "sophia_eigen")
NAMES = list(SOPHIAS)
"""What `optim` may be besides transformers' own: ours, and what `register_optimizer` added in this process."""
DEFAULTS = {"beta1": 0.965, "beta2": 0.99}
"""β of `sophia`, `sophia_g` and `sophia_h`."""


def _number_or_auto(value: Any) -> float | str:
    return "auto" if value == "auto" else float(value)


def _flag(value: Any) -> bool:
    return value if isinstance(value, bool) else {"true": True, "false": False, "1": True, "0": False}[value.lower()]


def _name_or_none(value: Any) -> str | None:
    return None if value in (None, "none", "None") else str(value)


_KINDS: dict[Callable[[Any], Any], str] = {
    float: "a number",
    int: "a whole number",
    _number_or_auto: 'a number, or "auto"',
    _flag: "true or false",
    _name_or_none: "a name, or none",
}

OPTIMIZER_KEYS: dict[str, Callable[[Any], Any]] = {
    "rho": _number_or_auto,
    "eps": float,
    "beta1": float,
    "beta2": float,
    "hessian_interval": int,
    "nesterov": _flag,
    "bias_correction": _flag,
    "noise_floor": float,
    "unclipped_start": float,
    "unclipped_end": float,
    "momentum_dtype": str,
}
EIGEN_KEYS: dict[str, Callable[[Any], Any]] = {
    "basis": _name_or_none,
    "basis_interval": int,
    "basis_warmup": int,
    "basis_beta": float,
    "basis_factor_interval": int,
    "basis_max_dim": int,
    "adamw_lr": float,
}
"""Of `sophia_eigen` alone; `adamw_lr` is the learning rate of embeddings, norms and biases."""
ESTIMATOR_KEYS: dict[str, Callable[[Any], Any]] = {
    "hessian_fraction": float,
    "hessian_units": int,
    "hessian_seed": int,
    "hessian_probes": int,
}
HUTCHINSON_ONLY = ("hessian_probes",)
WITHOUT_ADAM = ("sophia", "sophia_g", "sophia_h")
"""The optimizers that update every parameter by Sophia's rule, so that arguments of AdamW have no effect."""
ADAM_ARGUMENTS = {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "eps"}
"""AdamW's own in `TrainingArguments`, and what Sophia calls them in `optim_args`."""

_ELSEWHERE = {
    "lr": "TrainingArguments.learning_rate",
    "learning_rate": "TrainingArguments.learning_rate",
    "weight_decay": "TrainingArguments.weight_decay",
    "betas": "beta1=… and beta2=…",
}


def parse_optim_args(optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Read `rho=0.05,hessian_interval=10` into typed values.

    Args:
        optim_args: the string of `TrainingArguments`, or a mapping with the same keys.

    Returns:
        The keys that were given, as the types of the tables above.

    Raises:
        ValueError: an unknown key (the nearest one is named), a value of the wrong type or out of range, a malformed
            string.
    """
    types = {**OPTIMIZER_KEYS, **EIGEN_KEYS, **ESTIMATOR_KEYS}
    parsed: dict[str, Any] = {}
    for key, value in _pairs(optim_args):
        if key not in types:
            raise ValueError(f"optim_args: {_unknown(key, list(types))}")
        if key in parsed:
            raise ValueError(f"optim_args: {key} is given twice.")
        try:
            parsed[key] = types[key](value)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"optim_args: {key} must be {_KINDS[types[key]]}, got {value!r}.") from None
        problem = out_of_range(key, parsed[key])
        if problem:
            raise ValueError(f"optim_args: {problem}")
    return parsed


def refuse_foreign_arguments(optim: str, given: Collection[str]) -> None:
    """Raise ValueError for arguments that belong to another of our optimizers than `optim`."""
    for owner, keys in (("sophia_h", HUTCHINSON_ONLY), ("sophia_eigen", tuple(EIGEN_KEYS))):
        foreign = [key for key in keys if key in given]
        if foreign and optim != owner:
            verb = "belongs" if len(foreign) == 1 else "belong"
            raise ValueError(f"optim_args: {', '.join(foreign)} {verb} to optim={owner!r}, not to {optim!r}.")


def without_effect(optim: str, given: Collection[str]) -> dict[str, str]:
    """What to say of each argument in `given` that only AdamW heeds, where `optim` would ignore it."""
    if optim not in WITHOUT_ADAM:
        return {}
    ignored = [name for name in ADAM_ARGUMENTS if name in given]
    return {n: f"has no effect with optim={optim!r}; use {ADAM_ARGUMENTS[n]}=… in optim_args" for n in ignored}


def _pairs(optim_args: str | Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    if not optim_args:
        return []
    if isinstance(optim_args, Mapping):
        return list(optim_args.items())
    pairs = []
    for part in optim_args.replace(" ", "").split(","):
        if not part:
            continue
        key, equals, value = part.partition("=")
        if not equals and pairs and pairs[-1][0] in _ELSEWHERE:
            break
        if not equals:
            raise ValueError(f"optim_args: expected key=value between commas, got {part!r} in {optim_args!r}.")
        pairs.append((key, value))
    return pairs


def _unknown(key: str, known: list[str]) -> str:
    if key in _ELSEWHERE:
        return f"{key!r} does not belong here; use {_ELSEWHERE[key]}."
    near = nearest(key, known)
    hint = f", did you mean {near!r}?" if near else f". Known: {', '.join(known)}."
    return f"unknown argument {key!r} of Sophia{hint}"
