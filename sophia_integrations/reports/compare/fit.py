"""The mathematics of a comparison: intervals over seeds, a power law through losses, ratios of steps, crossings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Losses = Mapping[int, Sequence[float]]
"""Final losses by the steps of a run, one for each seed, in the order of the seeds."""
EXTRAPOLATED = 1.25
"""How far beyond its own horizons, as a factor of steps, a fitted curve is believed."""
_BETAS = np.geomspace(1e-3, 20.0, 1000)
"""The exponents that a fit tries, one per cent apart; a best one at either end is none."""
_EXACT = 1e-4
"""What a fit on that grid misses of an exact curve at most, in nats."""


@dataclass(frozen=True)
class Interval:
    """A value and its bounds; without two seeds there are none, and they are NaN."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def excludes(self, point: float) -> bool:
        """Whether `point` lies outside; never without bounds."""
        return self.low > point or self.high < point


@dataclass(frozen=True)
class PowerLaw:
    """a + b·T^−β: the final loss of runs of T steps, each with its own full schedule."""

    a: float
    b: float
    beta: float

    def at(self, steps: float) -> float:
        """The loss after `steps`."""
        return self.a + self.b * steps**-self.beta

    def steps_to(self, loss: float) -> float:
        """The steps that a loss takes; infinite for one that is never reached."""
        return ((loss - self.a) / self.b) ** (-1 / self.beta) if loss > self.a and math.isfinite(loss) else math.inf


def mean_interval(values: Sequence[float], confidence: float) -> Interval:
    """Student's interval of the mean of independent values."""
    if not np.all(np.isfinite(values)):
        return Interval(math.nan)
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Interval(mean)
    half = t_quantile(confidence, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def fit_power_law(steps: Sequence[float], losses: Sequence[float]) -> PowerLaw | None:
    """Least squares of a + b·T^−β with a ≥ 0, as losses are, and b > 0.

    None where the losses are not finite or do not fall with the steps, and where fewer than three steps differ.
    """
    return fit_power_laws(steps, np.asarray(losses, float)[None])[0]


def fit_power_laws(steps: Sequence[float], rows: np.ndarray) -> list[PowerLaw | None]:
    """`fit_power_law` of each row of losses, by the best a and b for each β of a grid."""
    t = np.asarray(steps, float)
    if len(np.unique(t)) < 3:
        return [None] * len(rows)
    x = (t / t.max()) ** -_BETAS[:, None]
    x_mean, y_mean = x.mean(1), rows.mean(1, keepdims=True)
    b = (rows - y_mean) @ (x - x_mean[:, None]).T / ((x - x_mean[:, None]) ** 2).sum(1)
    a = y_mean - b * x_mean
    b = np.where(a < 0, rows @ x.T / (x**2).sum(1), b)  # the best line through the origin
    a = np.maximum(a, 0.0)
    error = ((rows[:, None] - a[:, :, None] - b[:, :, None] * x) ** 2).sum(2)
    found: list[PowerLaw | None] = []
    for row, best in enumerate(np.argmin(error, axis=1)):
        slope, beta = float(b[row, best]), float(_BETAS[best])
        found.append(PowerLaw(float(a[row, best]), slope * float(t.max()) ** beta, beta) if slope > 0 else None)
    return found


def misfit(law: PowerLaw, losses: Losses, confidence: float) -> str:
    """Why the curve is none through `losses`; empty where it is one.

    Its exponent is at the end of what is tried, or it misses the mean loss at a horizon by more than the half-width of
    that mean's interval, by the spread of the seeds, which is pooled over the horizons.
    """
    if law.beta in (_BETAS[0], _BETAS[-1]):
        return f"its exponent {law.beta:g} is the {'lowest' if law.beta < 1 else 'highest'} that is tried"
    table = _table(losses)
    horizons, n = table.shape
    if n < 2:
        return ""
    error = math.sqrt(float(np.mean(np.var(table, axis=1, ddof=1))) / n)
    explained = t_quantile(confidence, horizons * (n - 1)) * error
    missed = {steps: abs(law.at(steps) - float(row.mean())) for steps, row in zip(sorted(losses), table, strict=True)}
    worst = max(missed, key=missed.__getitem__)
    if missed[worst] <= explained + _EXACT:
        return ""
    return (
        f"it misses the loss at {worst:,} steps by {missed[worst]:.2g}, and the seeds' spread explains {explained:.2g}"
    )


@dataclass(frozen=True)
class StepRatio:
    """Steps to a loss, in those of the reference.

    Attributes:
        ratio: below 1 where fewer are needed; NaN where nothing can be said.
        steps: the horizon of the other optimizer at which it is read.
        equivalent: the reference's steps to the same loss, by its fitted curve.
        bound: "below" or "above" where that lies beyond the horizons of the reference: then `ratio` is no estimate, and
            all that is known is that the true one is below or above it.
        law: the reference's curve.
        samples: the ratio in each resample of the seeds.
        missed: standard error of the curve itself, as a relative one of the ratio.
        unfit: why that curve tells nothing (`misfit`); then there is no ratio. Empty where it does.
    """

    ratio: Interval
    steps: int = 0
    equivalent: float = math.nan
    bound: str = ""
    law: PowerLaw | None = None
    samples: tuple[float, ...] = ()
    missed: float = 0.0
    unfit: str = ""


def step_ratio(reference: Losses, other: Losses, *, confidence: float, resamples: int, seed: int = 0) -> StepRatio:
    """How many steps `other` needs for the reference's loss: the power law through the reference's mean losses,
    inverted at the mean loss of `other` at that of its horizons whose equivalent is nearest to the reference's longest.

    The interval is Student's, in the logarithm. Its standard error is that of a bootstrap over the seeds, which are
    resampled together on both sides, for they share initial weights and the order of the data; and what the power law
    misses of the reference's own losses.

    Args:
        reference, other: final losses; the seeds are the same in all.
        confidence: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    lengths = sorted(reference)
    here, there = (_table(losses) for losses in (reference, other))
    if not (np.isfinite(here).all() and np.isfinite(there).all()):
        return StepRatio(Interval(math.nan))
    law = fit_power_law(lengths, here.mean(1))
    if law is None:
        return StepRatio(Interval(math.nan))
    if unfit := misfit(law, reference, confidence):
        return StepRatio(Interval(math.nan), law=law, unfit=unfit)
    longest, shortest = lengths[-1], lengths[0]
    equivalents = {t: law.steps_to(float(row.mean())) for t, row in zip(sorted(other), there, strict=True)}
    steps = min(equivalents, key=lambda t: abs(math.log(min(equivalents[t], 1e300) / longest)))
    equivalent = equivalents[steps]
    if equivalent > longest * EXTRAPOLATED:
        return StepRatio(Interval(steps / longest), steps, equivalent, "below", law)
    if equivalent < shortest / EXTRAPOLATED:
        return StepRatio(Interval(steps / shortest), steps, equivalent, "above", law)
    ratio = steps / equivalent
    n = here.shape[1]
    if n < 2:
        return StepRatio(Interval(ratio), steps, equivalent, "", law)
    chosen = np.random.default_rng(seed).integers(n, size=(resamples, n))
    wanted = there[sorted(other).index(steps)][chosen].mean(1)
    laws = fit_power_laws(lengths, here[:, chosen].mean(2).T)
    found = [law.steps_to(float(loss)) if law else math.nan for law, loss in zip(laws, wanted, strict=True)]
    samples = tuple(steps / t if math.isfinite(t) else math.nan for t in found)
    missed = _missed(law, lengths, here.mean(1)) / (law.beta * law.b * equivalent**-law.beta)
    interval = log_interval(ratio, samples, n, confidence, missed)
    return StepRatio(interval, steps, equivalent, "", law, samples, missed)


def log_interval(value: float, samples: Sequence[float], n: int, confidence: float, missed: float = 0.0) -> Interval:
    """An interval of a ratio from bootstrap samples over `n` seeds.

    The bootstrap's standard error is too small by √((n−1)/n), which is mended here; `missed` is another, independent
    one. There are no bounds when more than one sample in twenty says nothing.
    """
    logs = np.log([s for s in samples if math.isfinite(s) and s > 0])
    if n < 2 or len(logs) < 0.95 * len(samples):
        return Interval(value)
    error = math.hypot(float(np.std(logs)) * math.sqrt(n / (n - 1)), missed)
    half = t_quantile(confidence, n - 1) * error
    return Interval(value, value * math.exp(-half), value * math.exp(half))


def crossing(x: Sequence[float], losses: Sequence[float], level: float) -> float | None:
    """Where a curve first comes down to `level`, between its points by a straight line; None when it never does.

    A curve that begins below it crosses at its first point. Points that are not finite are left out.
    """
    points = [(at, loss) for at, loss in zip(x, losses, strict=True) if math.isfinite(loss)]
    before: tuple[float, float] | None = None
    for at, loss in points:
        if loss <= level:
            if before is None:
                return at
            return before[0] + (at - before[0]) * (before[1] - level) / (before[1] - loss)
        before = at, loss
    return None


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """The mean of curves over the points that all have been measured at or lie between; their grids may differ."""
    if not curves or any(len(curve) < 1 for curve in curves):
        return [], []
    start, end = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
    grid = sorted({at for curve in curves for at, _ in curve if start <= at <= end})
    mean = np.mean([np.interp(grid, *np.transpose(curve)) for curve in curves], axis=0) if grid else []
    return grid, [float(value) for value in mean]


def t_quantile(confidence: float, freedom: int) -> float:
    """The half-width in standard errors of Student's two-sided interval, by bisection of its integral.

    Example:
        >>> round(t_quantile(0.95, 2), 3), round(t_quantile(0.95, 30), 3)
        (4.303, 2.042)
    """
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def inside(bound: float) -> float:
        # x = √ν·tan(u) makes the integrand smooth and the range finite
        u = np.linspace(0, math.atan(bound / math.sqrt(freedom)), 2001)
        return 2 * norm * math.sqrt(freedom) * float(np.trapezoid(np.cos(u) ** (freedom - 1), u))

    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return high


def _missed(law: PowerLaw, steps: Sequence[int], losses: np.ndarray) -> float:
    """Standard deviation of the losses around the curve, which has three parameters of its own."""
    rest = np.array([law.at(t) for t in steps]) - losses
    return math.sqrt(float(rest @ rest) / max(1, len(steps) - 3))


def _table(losses: Losses) -> np.ndarray:
    """[horizons, seeds], horizons in order."""
    return np.array([losses[steps] for steps in sorted(losses)], float)
