"""The figure of a comparison: validation loss over steps, tokens and seconds, and where a curve crosses the
reference's final loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .judge import Judged
from .result import Result

_COLOURS = ("#c8553d", "#1f4e8c", "#4b7f52", "#8a6d3b", "#7b4b94", "#2a9d8f", "#b5838d", "#555555")


def draw(result: Result, target: Path) -> None:
    """Writes the figure; each curve is the mean over the seeds of the longest runs that count.

    A dot is a final loss after the whole decay, at every horizon of a fit; a cross is where a curve first reaches the
    reference's final loss, on its way and so before its own decay has ended. Command and versions stand below.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    level = result.final(result.reference).value
    for side, colour in zip(result.judged, _COLOURS * len(result.judged), strict=False):
        for axis, unit in zip(panels, _units(side), strict=True):
            _draw_side(axis, result, side, unit, colour)
    _draw_law(panels[0], result)
    lows = [loss for side in result.judged for loss in result.curve(side)[1]]
    if lows:
        top = sorted(lows)[int(0.8 * (len(lows) - 1))]
        panels[0].set_ylim(min(lows) - 0.05 * (top - min(lows) + 1e-3), top + 0.2 * (top - min(lows) + 1e-3))
    for axis, label in zip(panels, ("optimizer steps", "tokens", "seconds of training"), strict=True):
        if math.isfinite(level):
            axis.axhline(level, color="#999999", linewidth=0.8, linestyle=":")
        axis.set_xlabel(label)
        axis.grid(True, color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss (nats)")
    panels[0].legend(frameon=False, fontsize=8)
    headlines = [verdict.headline for verdict in result.verdicts if verdict.headline]
    figure.suptitle("\n".join(headlines) or "no headline", fontsize=9)
    figure.supxlabel(
        "\n".join(filter(None, (result.command, result.trained_with))), fontsize=6, color="#777777", wrap=True
    )
    figure.savefig(target)


def _draw_side(axis: Any, result: Result, side: Judged, unit: float, colour: str) -> None:
    steps, losses = result.curve(side)
    if not steps or not math.isfinite(unit):
        return
    axis.plot([at * unit for at in steps], losses, color=colour, linewidth=1.6, label=side.name)
    for runs in side.finals.values():
        finite = [run.loss for run in runs if not run.diverged]
        if finite:
            axis.plot(runs[0].steps * unit, sum(finite) / len(finite), "o", color=colour, markersize=4)
    at = result.crossing(side)
    if at is not None and side is not result.reference:
        axis.plot(at * unit, np.interp(at, steps, losses), "x", color=colour, markersize=9, markeredgewidth=2)


def _draw_law(axis: Any, result: Result) -> None:
    law = next((verdict.law for verdict in result.verdicts if verdict.law is not None), None)
    if law is None:
        return
    ends = [runs[0].steps for runs in result.reference.finals.values()]
    steps = [min(ends) * 0.8 + (max(ends) * 1.25 - min(ends) * 0.8) * i / 60 for i in range(61)]
    axis.plot(steps, [law.at(t) for t in steps], color="#999999", linestyle="--", linewidth=1.2,
              label=f"a + b·T^−β through {result.reference.name}'s dots")  # fmt: skip


def _units(side: Judged) -> tuple[float, float, float]:
    """What a step is on each axis."""
    runs = [run for run in side.finals[max(side.finals)] if run.tokens and run.steps]
    return 1.0, runs[0].tokens / runs[0].steps if runs else math.nan, side.step_seconds
