"""``loss.png``: training and validation loss over steps, Sophia's shares beneath; reads a run folder only."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError
from .run_folder import Run, read_run

_TRAIN, _VALIDATION, _WIN, _CURVED = "#9db7d5", "#1f4e8c", "#c8553d", "#8a6d3b"
_GOOD = (0.3, 0.8)
"""Where the win rate of good runs lies: 0.6 to 0.8 in the middle, 0.3 to 0.4 at the end."""


def plot_run(run_dir: str | os.PathLike[str]) -> Path:
    """Draws ``loss.png`` in `run_dir` from the figures that it holds and returns its path.

    Raises `UserError` when the folder cannot be read, or has no loss to draw.
    """
    run = read_run(run_dir)
    train, validation, win_rate, curved = (
        _points(run, name) for name in ("loss", "eval_loss", "sophia/win_rate", "sophia/curvature_share")
    )
    if not train[0] and not validation[0]:
        raise UserError(f"{run.source} holds no finite loss, and there is nothing to draw")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [3, 1] if win_rate[0] else [1]
    figure = Figure(figsize=(8, 5.5 if win_rate[0] else 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    top = axes[0]
    if train[0]:
        top.plot(*train, color=_TRAIN, linewidth=1.6, label="training")
    if validation[0]:
        top.plot(*validation, color=_VALIDATION, linewidth=1.8, marker="o", markersize=4, label="validation")
        last = validation[1][-1]
        top.annotate(f"{last:.3f}", (validation[0][-1], last), (0, 9), textcoords="offset points", ha="right",
                     color=_VALIDATION, fontweight="bold")  # fmt: skip
    top.set_ylabel("loss (nats per token)")
    top.set_title(_title(run), loc="left", fontsize=11)
    top.legend(frameon=False)
    if win_rate[0]:
        bottom = axes[1]
        bottom.axhspan(*_GOOD, color=_WIN, alpha=0.1, linewidth=0)
        bottom.plot(*win_rate, color=_WIN, linewidth=1.4, label="win rate: not clipped (good runs: shaded, falling)")
        if curved[0]:
            bottom.plot(*curved, color=_CURVED, linewidth=1.2, linestyle="--", label="curvature share: ρh > ε")
        bottom.legend(frameon=False, fontsize=8, loc="lower left")
        bottom.set_ylim(0, 1.02)
        bottom.set_ylabel("share")
    axes[-1].set_xlabel("optimizer step")
    for axis in axes:
        axis.grid(True, color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.02)
    target = run.folder / "loss.png"
    figure.savefig(target)
    return target


def _points(run: Run, name: str) -> tuple[list[int], list[float]]:
    series = run.series(name)
    return list(series), list(series.values())


def _title(run: Run) -> str:
    size = run.summary.get("parameters")
    if not size:
        return run.folder.resolve().name
    millions = f"{size / 1e6:.1f} M" if size >= 1e6 else f"{size / 1e3:.0f} k"
    return f"{run.summary['model']} ({millions} parameters), optimizer {run.optimizer}"
