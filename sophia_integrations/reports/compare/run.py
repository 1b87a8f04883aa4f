"""What one finished run of a comparison says, read from its run folder alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from ...errors import UserError
from ...recipes.running.events import read_metrics
from .. import run_folder

Point = tuple[int, float]


@dataclass(frozen=True)
class Run:
    """One run, ended.

    Attributes:
        folder: its run folder.
        loss: validation loss at its last step, after the whole decay, in nats; infinite when it diverged.
        steps: optimizer steps.
        tokens: that it trained on.
        pass_share: share of the time of a step in Hessian passes; 0 without.
        clipped: share of the logged steps whose gradient was clipped; NaN where it is not known.
        curve: (step, validation loss) along the way.
        why: why it has no loss; empty when it has one.
        versions: of the packages that trained it.
    """

    folder: Path
    loss: float
    steps: int
    tokens: int = 0
    pass_share: float = 0.0
    clipped: float = math.nan
    curve: tuple[Point, ...] = ()
    why: str = ""
    versions: tuple[tuple[str, str], ...] = ()

    @property
    def diverged(self) -> bool:
        """Whether it has no finite loss."""
        return not math.isfinite(self.loss)


def read_run(folder: Path, why: str = "") -> Run:
    """A run whose folder is complete, or one that ended without a loss because of `why`.

    Raises:
        UserError: it was never evaluated.
    """
    if why:
        events = read_metrics(folder / "metrics.jsonl")
        return Run(folder, math.inf, events[-1]["step"] if events else 0, why=why)
    logged = run_folder.read_run(folder)
    if "eval_loss" not in logged.names:
        raise UserError(f"{folder}: the run logged no validation loss, and runs are judged by it")
    last = logged.rows[logged.last_step].get("eval_loss", math.nan)
    shares = logged.series("sophia/hessian_time_fraction").values()
    return Run(
        folder=folder,
        loss=last if math.isfinite(last) else math.inf,
        steps=logged.last_step,
        tokens=int(logged.summary.get("tokens") or 0),
        pass_share=fmean(shares) if shares else 0.0,
        clipped=logged.clipped_share,
        curve=tuple(logged.series("eval_loss").items()),
        why="" if math.isfinite(last) else "its last validation loss is not finite",
        versions=tuple(sorted((logged.summary.get("versions") or {}).items())),
    )
