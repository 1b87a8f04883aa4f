"""The ranges of Sophia's options, and the sentence for a value outside its own.

It needs the standard library alone, so that a recipe is checked by the same ranges without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_SMALLEST_EPS = 2.0**-126
"""The smallest normal float32."""


def require_in_range(**options: Any) -> None:
    """Raise ValueError with the sentence of the first option that `out_of_range` has one for."""
    for name, value in options.items():
        problem = out_of_range(name, value)
        if problem:
            raise ValueError(problem)


def out_of_range(name: str, value: Any) -> str | None:
    """What is wrong with the value of an option, as one sentence that begins with its name; None when nothing is.

    Args:
        name: an option of `SophiaG` or of an estimator, there with or without ``hessian_`` before it. Others have no
            range.
        value: what was given for it.
    """
    if name == "betas":
        return _betas_out_of_range(value)
    check = _CHECKS.get(name) or _CHECKS.get(name.removeprefix("hessian_"))
    problem = check(value) if check is not None else None
    return None if problem is None else f"{name} must be {problem}, got {value!r}."


def _betas_out_of_range(value: Any) -> str | None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return f"betas must be two numbers, (beta1, beta2), got {value!r}."
    return out_of_range("beta1", value[0]) or out_of_range("beta2", value[1])


def _non_negative(value: Any) -> str | None:
    return None if _is_number(value) and math.isfinite(value) and value >= 0 else "a number of at least 0"


def _epsilon(value: Any) -> str | None:
    below = "at least 1.2e-38, or float32 rounds it to 0"
    return _non_negative(value) or (None if value >= _SMALLEST_EPS else below)


def _beta(value: Any) -> str | None:
    return None if _is_number(value) and 0 <= value < 1 else "at least 0 and below 1"


def _rho(value: Any) -> str | None:
    fits = value == "auto" if isinstance(value, str) else _non_negative(value) is None
    return None if fits else 'a number of at least 0, or "auto"'


def _one_of(*allowed: Any) -> Callable[[Any], str | None]:
    sentence = " or ".join(repr(a) for a in allowed)
    return lambda value: None if any(value is a or value == a and isinstance(value, str) for a in allowed) else sentence


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def _side(value: Any) -> str | None:
    fits = value is None or (_count(value) is None and value > 1)
    return None if fits else "a whole number of at least 2, or None"


def _steps(value: Any) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return None if whole else "a whole number of at least 0"


def _shares(value: Any) -> str | None:
    two = isinstance(value, (tuple, list)) and len(value) == 2
    fit = two and all(_share_below_one(v) is None for v in value)
    return None if fit else "two shares above 0 and below 1, (at the peak of the learning rate, at its end)"


def _share(value: Any) -> str | None:
    return None if _is_number(value) and 0 < value <= 1 else "above 0 and at most 1"


def _share_below_one(value: Any) -> str | None:
    return None if _share(value) is None and value < 1 else "above 0 and below 1"


def _count(value: Any) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return None if whole else "a whole number of at least 1"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "lr": _non_negative,
    "lr_scale": _non_negative,
    "adamw_lr": _non_negative,
    "update": _one_of("sophia", "adamw"),
    "rho": _rho,
    "noise_floor": _non_negative,
    "nesterov": _flag,
    "bias_correction": _flag,
    "maximize": _flag,
    "unclipped": _shares,
    "unclipped_start": _share_below_one,
    "unclipped_end": _share_below_one,
    "momentum_dtype": _one_of("float32", "bfloat16"),
    "basis": _one_of(None, "eigen"),
    "basis_interval": _count,
    "basis_warmup": _steps,
    "basis_beta": _beta,
    "basis_factor_interval": _count,
    "basis_max_dim": _side,
    "basis_flatten": _flag,
    "weight_decay": _non_negative,
    "eps": _epsilon,
    "beta1": _beta,
    "beta2": _beta,
    "hessian_interval": _count,
    "fraction": _share,
    "units": _count,
    "probes": _count,
}
