"""What a step of each optimizer costs, from one short run of it: seconds for the plan, operations for the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .dials import Settings, dials_of
from .rivals import Side
from .run import read_events
from .runs import Runs

_WARM = 5
"""Steps before anything is measured."""


@dataclass(frozen=True)
class Price:
    """Of one optimizer on this machine.

    Attributes:
        step: seconds of an optimizer step.
        once: seconds of a run besides its steps and further evaluations.
        evaluation: seconds.
        steps_per_epoch: of the recipe.
        flops: multiply-adds of matrix products, times two, in a step; None where they could not be counted.
        pass_flops: of these, what Hessian passes took.
    """

    step: float
    once: float
    evaluation: float
    steps_per_epoch: float
    flops: float | None
    pass_flops: float | None

    def steps(self, settings: Settings) -> int:
        """How many steps a run has."""
        steps, epochs = dials_of(settings).length(settings)
        return steps if steps is not None else max(1, math.ceil((epochs or 0) * self.steps_per_epoch))

    def seconds(self, settings: Settings) -> float:
        """How long a run is expected to take."""
        steps = self.steps(settings)
        evaluations = dials_of(settings).evaluations(settings, steps)
        return self.once + steps * self.step + (evaluations - 1) * self.evaluation


def short_run(side: Side) -> tuple[Settings, tuple[int, int]]:
    """The recipe of the run that is measured, and the optimizer steps whose operations are counted in it.

    Counting slows a run down, so the time is that of as many steps before.
    """
    dials = dials_of(side.settings)
    period = dials.interval(side.settings)
    steps = _WARM + 2 * period + 1
    return dials.measured(side.settings, steps), (_WARM + period, _WARM + 2 * period)


def measure(runs: Runs, side: Side) -> Price:
    """Executes or finds the short run of a side."""
    settings, window = short_run(side)
    run = runs.get(settings, f"{side.name} measured", window)
    events = read_events(run.folder)
    trained = {event["step"]: event for event in events if "loss" in event}
    at, until = (trained.get(step, {}).get("seconds", math.nan) for step in (_WARM, window[0]))
    step = (until - at) / (window[0] - _WARM)
    ends = [event["seconds"] for event in events if event["step"] == run.steps]
    evaluation = ends[-1] - ends[0] if len(ends) > 1 else 0.0
    if not math.isfinite(step) or step <= 0:
        step = events[-1]["seconds"] / run.steps
    epoch = events[-1].get("epoch") or 0.0
    counted = runs.flops(settings)
    return Price(
        step=step,
        once=max(0.0, runs.seconds(settings) - run.steps * step),
        evaluation=evaluation,
        steps_per_epoch=run.steps / epoch if epoch else math.nan,
        flops=counted.get("flops"),
        pass_flops=counted.get("pass_flops"),
    )
