"""Everything that a comparison found, and ``compare.json``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .dials import dials_of
from .fit import Interval, crossing, mean_curve, mean_interval
from .judge import Judged, Verdict
from .price import machine_of
from .protocol import Protocol
from .run import Run
from .tuning import Tuned

DIALS = ("rate", "weight_decay", "beta1")
_UNITS = {
    "loss, difference": "nats per prediction, on the validation text at a run's last step",
    "steps, tokens, flops, seconds of a verdict": "multiples of the reference's",
    "horizon, keys of finals": "shares of the recipe's steps",
    "seconds_per_step": "wall-clock, without evaluations; median of turns side by side",
    "flops_per_step": "multiply-adds of matrix products, times two",
    "rate": "learning rate at its peak",
    "load of machine": "processes that ran on average in the minute up to the end of the timed turns",
}
"""Of what is not plain from its name in ``compare.json``."""


@dataclass(frozen=True)
class Result:
    """A comparison, finished.

    Attributes:
        recipe: that was compared.
        command: that repeats it.
        protocol: by which.
        tuned: every side with its tuning runs.
        judged: every side with the runs that count, in the same order.
        reference: the one of them that the others are held against.
        verdicts: one for each of the others.
    """

    recipe: str
    command: str
    protocol: Protocol
    tuned: Sequence[Tuned]
    judged: Sequence[Judged]
    reference: Judged
    verdicts: Sequence[Verdict]

    def verdict(self, name: str) -> Verdict | None:
        """That on a side; None for the reference."""
        return next((verdict for verdict in self.verdicts if verdict.name == name), None)

    def final(self, side: Judged) -> Interval:
        """Its loss at the longest horizon that it was judged at."""
        return mean_interval([run.loss for run in side.finals[max(side.finals)]], self.protocol.confidence)

    def curve(self, side: Judged) -> tuple[list[float], list[float]]:
        """Its mean validation loss over the steps of those runs, along the way."""
        return mean_curve([run.curve for run in side.finals[max(side.finals)] if not run.diverged])

    def crossing(self, side: Judged) -> float | None:
        """The step at which that first reaches the reference's final loss; None for never."""
        return crossing(*self.curve(side), self.final(self.reference).value)

    @property
    def machine(self) -> dict[str, Any]:
        """On which the steps were timed; empty where that was not recorded."""
        return machine_of(side.price for side in self.judged)

    @property
    def versions(self) -> list[dict[str, str]]:
        """Of the packages that trained the runs; more than one where they were changed in between."""
        trained = [run for side in self.judged for runs in side.finals.values() for run in runs]
        trained += [trial.run for one in self.tuned for trial in one.trials]
        return [dict(versions) for versions in dict.fromkeys(run.versions for run in trained if run.versions)]

    @property
    def trained_with(self) -> str:
        """The same in a line, such as ``torch 2.9, transformers 5.0``; empty where no run says."""
        return "; ".join(", ".join(f"{name} {version}" for name, version in one.items()) for one in self.versions)


def to_json(result: Result) -> str:
    """The comparison as JSON, with all that repeats it: each side's tuned recipe, the protocol, versions and units.

    What is not finite is null.
    """
    sides = {}
    for tuned, judged in zip(result.tuned, result.judged, strict=True):
        settings = tuned.side.settings
        price = judged.price
        sides[judged.name] = {
            "about": tuned.side.about,
            "recipe": settings,
            "settings": {dial: dials_of(settings).get(settings, dial) for dial in DIALS},
            "tuning": [_trial(trial) for trial in tuned.trials],
            "at_edge": list(tuned.at_edge),
            "finals": {f"{share:g}": [_run(run) for run in runs] for share, runs in judged.finals.items()},
            "crosses_at_step": result.crossing(judged),
            "seconds_per_step": judged.step_seconds,
            "pass_seconds_per_step": judged.pass_seconds,
            "seconds_per_step_of_turns": price.turns if price else None,
            "clipped_share": judged.clipped,
            "state_bytes_per_parameter": price.state_bytes if price else None,
            "flops_per_step": price.flops if price else None,
            "pass_flops_per_step": price.pass_flops if price else None,
        }
    whole = {
        "recipe": result.recipe,
        "command": result.command,
        "protocol": result.protocol.model_dump(mode="json"),
        "reference": result.reference.name,
        "sides": sides,
        "verdicts": [_verdict(verdict) for verdict in result.verdicts],
        "versions": result.versions,
        "machine": result.machine,
        "units": _UNITS,
    }
    return json.dumps(_finite(whole), indent=1) + "\n"


def _trial(trial: Any) -> dict[str, Any]:
    return {"stage": trial.stage, "horizon": trial.share, "value": trial.value, **_run(trial.run)}


def _run(run: Run) -> dict[str, Any]:
    found = {"run": run.folder.name, "loss": run.loss, "steps": run.steps, "tokens": run.tokens}
    return {**found, "clipped_share": run.clipped, **({"why": run.why} if run.why else {})}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    found = dataclasses.asdict(verdict)
    steps, other = found.pop("equivalent")
    return {**found, "read_at": {"reference_steps": steps, "steps": other}}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
