"""The checks of `sophia doctor`, one function each: a run in, what is off with it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..run_folder import Run
from .finding import SEVERITIES, Finding
from .sophia import (
    curvature_share,
    estimates,
    pass_time,
    sophia_figures,
    unclipped_schedule,
    win_rate,
    zero_curvature,
)
from .training import finite, gradient_clipping, interrupted, learning_rate, spikes, warmup

CHECKS: tuple[Callable[[Run], Iterable[Finding]], ...] = (
    finite,
    learning_rate,
    sophia_figures,
    estimates,
    zero_curvature,
    gradient_clipping,
    curvature_share,
    win_rate,
    unclipped_schedule,
    warmup,
    spikes,
    pass_time,
    interrupted,
)
"""Causes before their consequences: findings of one severity keep this order."""


def examine(run: Run) -> list[Finding]:
    """Everything that is off, errors first."""
    found = [finding for check in CHECKS for finding in check(run)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


__all__ = ["CHECKS", "Finding", "examine"]
