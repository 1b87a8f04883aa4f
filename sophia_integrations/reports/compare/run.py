"""What one finished run of a comparison says, read from its run folder alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...recipes.running.events import read_metrics

Point = tuple[int, float]


@dataclass(frozen=True)
class Run:
    """One run, ended.

    Attributes:
        folder: its run folder.
        loss: validation loss at its last step, after the whole decay, in nats; infinite when it diverged.
        steps: optimizer steps.
        tokens: that it trained on.
        step_seconds: of one optimizer step, evaluations left out; NaN when too little was logged.
        pass_share: share of that time in Hessian passes; 0 without.
        curve: (step, validation loss) along the way.
        why: why it has no loss; empty when it has one.
        versions: of the packages that trained it.
    """

    folder: Path
    loss: float
    steps: int
    tokens: int
    step_seconds: float
    pass_share: float
    curve: tuple[Point, ...]
    why: str = ""
    versions: tuple[tuple[str, str], ...] = ()

    @property
    def diverged(self) -> bool:
        """Whether it has no finite loss."""
        return not math.isfinite(self.loss)


def read_run(folder: Path, why: str = "") -> Run:
    """A run whose folder is complete, or one that ended without a loss because of `why`."""
    events = read_events(folder)
    summary = read_json(folder / "summary.json")
    evaluations = [event for event in events if "eval_loss" in event]
    steps = int(summary.get("steps") or (events[-1]["step"] if events else 0))
    last = evaluations[-1]["eval_loss"] if evaluations and evaluations[-1]["step"] == steps else None
    if not why and last is None:
        why = "its last validation loss is not finite"
    trained = [event for event in events if "loss" in event]
    shares = [event.get("sophia/hessian_time_fraction") or 0.0 for event in trained]
    return Run(
        folder=folder,
        loss=math.inf if why or last is None else float(last),
        steps=steps,
        tokens=int(summary.get("tokens") or 0),
        step_seconds=step_seconds(events),
        pass_share=sum(shares) / len(shares) if shares else 0.0,
        curve=tuple((event["step"], event["eval_loss"]) for event in evaluations if event["eval_loss"] is not None),
        why=why,
        versions=tuple(sorted((summary.get("versions") or {}).items())),
    )


def step_seconds(events: list[dict[str, Any]]) -> float:
    """Mean time of an optimizer step between two logs without an evaluation between them; NaN without two such logs.

    The first log is left out: it holds what is done once. Evaluations, and checkpoints saved beside them, are not
    what optimizers differ in.
    """
    spent = steps = 0.0
    for before, after in zip(events, events[1:], strict=False):
        plain = "loss" in before and "loss" in after and after["step"] > before["step"]
        if plain and after.get("seconds", 0) > before.get("seconds", 0):
            spent += after["seconds"] - before["seconds"]
            steps += after["step"] - before["step"]
    return spent / steps if steps else math.nan


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events that the run in `folder` has logged by now."""
    return read_metrics(folder / "metrics.jsonl")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty when there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
