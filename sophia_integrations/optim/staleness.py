"""Never sign momentum, and never the curvature of another model, in silence: how old an estimate may be."""

from __future__ import annotations

from .checks import warn_caller
from .progress import Progress

_WARN_AFTER, _RAISE_AFTER = 2, 5
"""Intervals without an estimate until a sentence, and until an error."""


def is_stale(progress: Progress, interval: int) -> bool:
    """Whether there can be no step without a new estimate."""
    if progress.hessian_updates == 0:
        return progress.step >= interval
    return progress.step - progress.hessian_step >= _RAISE_AFTER * interval


def refuse_stale_curvature(progress: Progress, interval: int, last_drop: str, has_estimator: bool) -> None:
    """No estimate at all is sign momentum, and no more of them is the curvature of another model.

    Raises:
        RuntimeError: no estimate within an interval, or none within `_RAISE_AFTER` of them since the last.
    """
    age = progress.step - progress.hessian_step
    if progress.hessian_updates == 0 and is_stale(progress, interval):
        raise RuntimeError(
            f"Sophia has made {progress.step} steps without a single Hessian estimate, so it would be sign "
            f"momentum under another name. Cause: {last_drop}."
        )
    if not progress.hessian_updates or age < _WARN_AFTER * interval:
        return
    stale = f"Sophia's last Hessian estimate is {age} steps old, and one is due every {interval}"
    remedy = f"Cause: {last_drop}."
    if not has_estimator:
        remedy = "Set optimizer.estimator = GaussNewtonBartlett(model), or call update_hessian()."
    if is_stale(progress, interval):
        raise RuntimeError(f"{stale}: it would train on with the curvature of another model. {remedy}")
    if not has_estimator and age == _WARN_AFTER * interval:
        warn_caller(f"{stale}; at {_RAISE_AFTER * interval} steps it stops. {remedy}")
