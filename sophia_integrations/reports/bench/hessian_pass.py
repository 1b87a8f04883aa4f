"""The Hessian pass beside the training step that it is part of."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from ...curvature import GaussNewtonBartlett
from ...optim import SophiaG, param_groups
from .models import task
from .step import CYCLE
from .timing import in_turns

UNITS = ((None, None), (1 / 16, 1), (1 / 4, 8), (1 / 4, 1))
"""(`fraction`, `units`) of the estimator, its defaults first."""


def measure(size: str, device: str, cycles: int) -> dict[str, Any]:
    """Time of one pass, and its share of `CYCLE` training steps and one pass, without and with the eigenbasis."""
    rows: list[dict[str, Any]] = []
    tokens = 0
    for (fraction, units), basis in itertools.product(UNITS, (None, "eigen")):
        training = task(size, device)
        tokens = training.tokens
        given = {} if fraction is None else {"fraction": fraction, "units": units}
        estimator = GaussNewtonBartlett(training.model, **given)
        groups = param_groups(training.model, basis=basis)
        optimizer = SophiaG(groups, lr=1e-6, hessian_interval=1, estimator=estimator, basis_warmup=0)
        passes: list[float] = []

        def step(optimizer: SophiaG = optimizer, passes: list[float] = passes) -> None:
            before = optimizer.hessian_seconds
            optimizer.step()
            passes.append(optimizer.hessian_seconds - before)

        training.backward()
        step()
        passes.clear()
        seconds = in_turns({"backward": training.backward, "step": step}, 2 * cycles, device)
        one = statistics.fmean(passes)  # of one row or of two, by chance
        ordinary = statistics.median(seconds["backward"]) + statistics.median(
            whole - own for whole, own in zip(seconds["step"], passes, strict=True)
        )
        rows.append(
            {
                "basis": basis or "none",
                "fraction": estimator.fraction,
                "units": estimator.units,
                "ms a pass": 1000 * one,
                "ms a training step": 1000 * ordinary,
                f"share at k = {CYCLE}": one / (CYCLE * ordinary + one),
            }
        )
    return {"title": f"Hessian pass, GPT-2 {size}, {tokens:,} tokens a step", "size": size, "rows": rows}
