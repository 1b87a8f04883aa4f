"""What the finished runs say: differences and ratios against the reference, each with its interval, and the headline
or why there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..bench.timing import ratio
from .fit import Interval, PowerLaw, StepRatio, log_interval, mean_interval, step_ratio
from .price import Price, machine_of, other_work
from .protocol import Protocol
from .run import Run

Finals = Mapping[float, Sequence[Run]]
"""The runs that count, by share of the horizon, one for each seed in the order of the seeds."""
_MEND = "give the recipe more steps or compare.horizons more shares; the ways same and half need no curve"


@dataclass(frozen=True)
class Judged:
    """One side as it ended.

    Attributes:
        name: of the side.
        finals: its runs on the seeds that tuned nothing.
        price: of a step; None when it was not measured.
        at_edge: stages of its tuning that ended at the edge of their grid.
    """

    name: str
    finals: Finals
    price: Price | None = None
    at_edge: Sequence[str] = ()

    @property
    def step_seconds(self) -> float:
        """NaN where it was not measured."""
        return self.price.step if self.price is not None else math.nan

    @property
    def pass_seconds(self) -> float:
        """Of a step, in Hessian passes."""
        return self.step_seconds * _mean([run.pass_share for runs in self.finals.values() for run in runs])

    @property
    def clipped(self) -> float:
        """Share of the logged steps of its runs whose gradient was clipped; NaN where nothing says."""
        return _mean([run.clipped for runs in self.finals.values() for run in runs])


@dataclass(frozen=True)
class Verdict:
    """A side against the reference.

    Attributes:
        name: of the side.
        difference: of the final losses, in nats; below 0 where it is better.
        steps, tokens, flops, seconds: what it takes, in multiples of what the reference does: of `fit` to the same
            loss, otherwise of the runs that are compared. NaN where it is not known.
        bound: see `StepRatio`.
        headline: the one sentence that may be said; empty when there is none.
        refusal: why there is none.
        equivalent: steps of the reference to the loss at which the ratio is read, and the side's steps there.
        disturbed: `price.other_work` of the machine that `seconds` was measured on.
    """

    name: str
    difference: Interval
    steps: Interval
    tokens: Interval
    flops: Interval
    seconds: Interval
    bound: str = ""
    headline: str = ""
    refusal: str = ""
    equivalent: tuple[float, float] = (math.nan, math.nan)
    disturbed: str = ""
    law: PowerLaw | None = field(default=None, compare=False)


def judge(protocol: Protocol, reference: Judged, other: Judged) -> Verdict:
    """The verdict on one side by the way of judging that the protocol names."""
    share = protocol.shares(reference=False)[-1] if protocol.judge == "half" else 1.0
    here, there = reference.finals[1.0], other.finals[share]
    difference = mean_interval(
        [b.loss - a.loss if not (a.diverged or b.diverged) else math.nan for a, b in zip(here, there, strict=True)],
        protocol.confidence,
    )
    if protocol.judge == "fit":
        found = step_ratio(
            _losses(reference.finals),
            _losses(other.finals),
            confidence=protocol.confidence,
            resamples=protocol.bootstrap,
        )
    else:
        found = StepRatio(Interval(there[0].steps / here[0].steps), there[0].steps, here[0].steps)
    verdict = Verdict(
        name=other.name,
        difference=difference,
        steps=found.ratio,
        tokens=_times(found, _per_step(there, "tokens") / _per_step(here, "tokens"), 0.0, len(here), protocol),
        flops=_times(found, _flops(other) / _flops(reference), 0.0, len(here), protocol),
        seconds=_times(found, *_time_ratio(other.price, reference.price), len(here), protocol),
        bound=found.bound,
        equivalent=(found.equivalent, found.steps),
        disturbed=other_work(machine_of([reference.price, other.price])),
        law=found.law,
    )
    refusal = _refusal(protocol, reference, other, verdict, found.unfit)
    headline = "" if refusal else _headline(protocol, reference, verdict)
    return Verdict(**{**vars(verdict), "headline": headline, "refusal": refusal})


def _refusal(protocol: Protocol, reference: Judged, other: Judged, verdict: Verdict, unfit: str) -> str:
    for side in (reference, other):
        runs = [run for runs in side.finals.values() for run in runs]
        lost = sum(run.diverged for run in runs)
        if lost:
            return f"{side.name} ended without a loss in {lost} of {len(runs)} runs"
        if side.at_edge:
            return f"{side.name} is not tuned: its best value lies at the edge of what was tried ({side.at_edge[-1]})"
    if len(protocol.seeds) < 2:
        return "one seed says nothing of how much another would differ"
    point, interval = (0.0, verdict.difference)
    if protocol.judge == "fit":
        if unfit:
            return f"a + b·T^−β is no curve through {reference.name}'s losses ({unfit}): {_MEND}"
        if math.isnan(verdict.steps.value):
            return f"{reference.name}'s losses do not fall with the steps: {_MEND}"
        if verdict.bound:
            return _bound_refusal(protocol, reference, other, verdict)
        point, interval = 1.0, verdict.steps
    if not interval.excludes(point):
        return f"the interval, {interval.low:.3f} to {interval.high:.3f}, contains {point:g}"
    return ""


def _bound_refusal(protocol: Protocol, reference: Judged, other: Judged, verdict: Verdict) -> str:
    """A bound is sure where the losses between which it lies differ surely."""
    ends = (min, max) if verdict.bound == "below" else (max, min)
    there, here = (pick(side.finals) for pick, side in zip(ends, (other, reference), strict=True))
    pairs = zip(reference.finals[here], other.finals[there], strict=True)
    gap = mean_interval([b.loss - a.loss for a, b in pairs], protocol.confidence)
    sure = gap.high < 0 if verdict.bound == "below" else gap.low > 0
    return "" if sure else f"the losses lie beyond {reference.name}'s horizons, and not surely"


def _headline(protocol: Protocol, reference: Judged, verdict: Verdict) -> str:
    name, than, by = verdict.name, reference.name, verdict.difference
    spread = f"{protocol.confidence:.0%} interval over {len(protocol.seeds)} seeds"
    steps = reference.finals[1.0][0].steps
    if protocol.judge != "fit":
        which = "lower" if by.value < 0 else "higher"
        where = f"at {steps:,} steps" if protocol.judge == "same" else f"with half of its {steps:,} steps"
        return (
            f"{name} ends {abs(by.value):.4f} nats {which} than {than} {where} ({spread}: {by.low:+.4f} to "
            f"{by.high:+.4f})"
        )
    if verdict.bound:
        word = "less" if verdict.bound == "below" else "more"
        return f"{name} needs {word} than {verdict.steps.value:.2f} of the steps of {than} to the same loss"
    ratio = verdict.steps
    time = f"time{f' ({verdict.disturbed})' if verdict.disturbed else ''}"
    cost = [f"{one.value:.2f} of its {what}" for what, one in (("operations", verdict.flops), (time, verdict.seconds))
            if one.excludes(1.0)]  # fmt: skip
    return (
        f"{name} needs {ratio.value:.2f} of the steps of {than} to the same loss ({spread}: {ratio.low:.2f} to "
        f"{ratio.high:.2f})" + (f", {' and '.join(cost)}" if cost else "")
    )


def _times(found: StepRatio, factor: float, jitter: float, n: int, protocol: Protocol) -> Interval:
    """A ratio of steps as one of something that each step takes, whose own relative standard error is `jitter`."""
    value = found.ratio.value * factor
    if not found.samples or not math.isfinite(value):
        return Interval(value)
    samples = [sample * factor for sample in found.samples]
    return log_interval(value, samples, n, protocol.confidence, math.hypot(found.missed, jitter))


def _time_ratio(price: Price | None, reference: Price | None) -> tuple[float, float]:
    """Of the times of a step, from turns that were measured side by side, and its relative standard error."""
    if price is None or reference is None or not price.together:
        return math.nan, 0.0
    logs = np.log(price.turns) - np.log(reference.turns)
    of_median = math.sqrt(math.pi / 2 / len(logs))  # in standard deviations
    return ratio(price.turns, reference.turns), of_median * float(np.std(logs, ddof=1)) if len(logs) > 1 else 0.0


def _losses(finals: Finals) -> dict[int, list[float]]:
    return {runs[0].steps: [run.loss for run in runs] for runs in finals.values()}


def _per_step(runs: Sequence[Run], figure: str) -> float:
    return _mean([getattr(run, figure) / run.steps for run in runs if run.steps and getattr(run, figure)])


def _flops(side: Judged) -> float:
    flops = side.price.flops if side.price is not None else None
    return flops if flops else math.nan


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
