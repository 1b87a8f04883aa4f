"""Checks of Sophia's own figures; none has anything to say of a run that logged none, but the first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist, median

from ..run_folder import Run
from .finding import Finding
from .training import gradient_clipping

PAPER_WIN_RATE = (0.1, 0.5)
"""Where the official README (Liuhong99/Sophia) wants `win_rate`, by tuning ρ; one is proposed for the middle of it."""
EIGEN_WIN_RATE = (0.1, 0.9)
"""With ρ by hand in the eigenbasis: below, curvature is unused; above, long runs stalled (README, "Reading the win
rate"; 3,400 steps at ρ 0.3 ended with 0.99 unclipped, behind ρ 0.05 with 0.43)."""
AUTO_MIDDLE, AUTO_END = (0.4, 0.9), (0.15, 0.5)
"""With rho="auto": good runs have 0.6 to 0.8 in the middle and 0.3 to 0.4 at the end. Starts of 0.6 to 0.9 and ends of
0.2 to 0.5 were as good (recipes/RESULTS.md, "One change at a time"); the margin is for the schedule between them."""
AUTO_PROPOSED = {"unclipped_start": 0.8, "unclipped_end": 0.3}
"""The defaults of the eigenbasis (`optim.groups.EIGEN_DEFAULTS`)."""
CURVATURE_SHARE = 0.5
"""Below it the floor is the denominator of most coordinates (README, "Reading the win rate")."""
EPSILON = {"paper": 1e-12, "eigen": 1e-8}
"""The defaults of `SophiaG` and of `optim.groups.EIGEN_DEFAULTS`."""
PASS_TIME, PASS_TARGET = 0.10, 0.05
"""Share of the time in Hessian passes: warned of above the first; the second is the paper's "< 5 %" overhead."""
LEAST_FRACTION = 1 / 16
"""Of the rows: good enough every 10 steps, by final loss 2.582 against 2.571 with a quarter in 4 units (400 steps)."""
_FEWEST = 3  # logs without which a median means little


def sophia_figures(run: Run) -> Iterator[Finding]:
    """Sophia was asked for and never logged a figure."""
    if "sophia" in (run.optimizer or "").lower() and not run.sophia and run.series("loss"):
        yield Finding(
            "no-figures",
            "error",
            f"the optimizer is {run.optimizer}, and no sophia/… figure was logged beside the loss: SophiaCallback was "
            "not in this run",
        )


def estimates(run: Run) -> Iterator[Finding]:
    """Estimates of the Hessian diagonal that were dropped, or that never came."""
    interval = run.recipe.value("hessian_interval")
    due = max(1, run.last_step // interval)
    dropped = run.series("sophia/hessian_skipped")
    if dropped:
        count = int(max(dropped.values()))
        rose, before = [], 0.0
        for step, value in dropped.items():
            if value > before:
                rose.append(step)
            before = value
        many = count >= due / 2
        of = f" of about {due}" if count <= due else ""
        assumed = "" if run.recipe.found else f" (at hessian_interval {interval}, its default)"
        yield Finding(
            "estimates",
            "error" if many else "warning",
            f"{count}{of} Hessian estimates{assumed if of else ''} were dropped: "
            f"h is {'mostly missing' if many else 'older there'}. The run's own warnings say why: a batch without a "
            "label that counts, or figures that are not finite",
            tuple(rose[:5]),
        )
    made = run.summary.get("hessian_updates", due)
    still = _standing(run.series("sophia/hessian_norm"), 2 * interval)
    if not dropped and run.sophia and (made < due / 2 or still):
        said = f"h stays the same from step {still[0]} to {still[-1]}" if still else f"only {made} Hessian estimates"
        yield Finding(
            "estimates",
            "error",
            f"{said}, and an estimate is due every {interval} steps: give the optimizer its estimator, "
            "SophiaG(…, estimator=GaussNewtonBartlett(model)), or call update_hessian()",
            still,
        )


def zero_curvature(run: Run) -> Iterator[Finding]:
    """h is 0 everywhere: sign momentum under another name."""
    norms = run.series("sophia/hessian_norm")
    zeros = [step for step, norm in norms.items() if norm == 0]
    if zeros and zeros[-1] == max(norms):
        yield Finding(
            "zero-curvature",
            "error",
            "h is 0 in every coordinate, so every step is sign momentum: the loss does not depend on Sophia's "
            "parameters through the logits, or no label counts",
            (zeros[0], zeros[-1]),
        )


def curvature_share(run: Run) -> Iterator[Finding]:
    """ε or the noise floor is the denominator, not ρh."""
    shares = run.over(run.middle, "sophia/curvature_share")
    if len(shares) < _FEWEST or median(shares) >= CURVATURE_SHARE:
        return
    won = median(run.over(run.middle, "sophia/win_rate") or [0.0])
    rule = "clipped momentum SGD" if won >= PAPER_WIN_RATE[0] else "sign momentum"
    floor = run.recipe.value("noise_floor")
    if floor:
        edit, which = run.recipe.edit("noise_floor", _rounded(floor / 4)), "the noise floor"
    else:
        default = EPSILON["eigen" if run.eigen else "paper"]
        eps = run.recipe.value("eps") or default
        edit, which = run.recipe.edit("eps", default if eps > default else _rounded(eps / 1000), eps), "ε"
    yield Finding(
        "curvature-share",
        "warning",
        f"curvature share {median(shares):.2f} in the middle of the run: {which} is the denominator of the other "
        f"coordinates, which makes it {rule}",
        _ends(run.middle),
        (edit,),
    )


def win_rate(run: Run) -> Iterator[Finding]:
    """With ρ by hand: the share of coordinates that the clip leaves alone is outside its healthy range.

    Not where ε, or a clip that shrinks every gradient and m with it, is the cause.
    """
    rates = run.over(run.middle, "sophia/win_rate")
    if run.automatic or len(rates) < _FEWEST or any(curvature_share(run)) or any(gradient_clipping(run)):
        return
    low, high = EIGEN_WIN_RATE if run.eigen else PAPER_WIN_RATE
    rate = median(rates)
    if low <= rate <= high:
        return
    meaning = "sign momentum, curvature unused" if rate < low else "the clip hardly protects, and long runs stall"
    number = proposed_rho(run, (low + high) / 2)
    proposals = ("auto", number) if run.eigen else (number, "auto")
    yield Finding(
        "win-rate",
        "warning",
        f"win rate {rate:.2g} in the middle of the run, good runs have {low} to {high}: {meaning}",
        _ends(run.middle),
        tuple(run.recipe.edit("rho", rho) for rho in proposals if rho is not None),
    )


def unclipped_schedule(run: Run) -> Iterator[Finding]:
    """With rho="auto": the shares that it was told to leave alone are not those of good runs."""
    for where, steps, (low, high), key in (
        ("in the middle", run.middle, AUTO_MIDDLE, "unclipped_start"),
        ("at the end", run.end, AUTO_END, "unclipped_end"),
    ):
        rates = run.over(steps, "sophia/win_rate")
        told = run.recipe.value(key)
        if not run.automatic or not rates or (run.recipe.found and told is None) or low <= median(rates) <= high:
            continue
        yield Finding(
            "win-rate",
            "warning",
            f"win rate {median(rates):.2g} {where} of the run, good runs with rho=auto have {low} to {high}: "
            + ("curvature is hardly used" if median(rates) < low else "the clip hardly protects"),
            _ends(steps),
            (run.recipe.edit(key, AUTO_PROPOSED[key]),),
        )


def pass_time(run: Run) -> Iterator[Finding]:
    """The Hessian pass takes too much of the time."""
    logged = list(run.series("sophia/hessian_time_fraction").items())[1:]  # the first holds the start-up
    if not logged or (share := sum(value for _, value in logged) / len(logged)) <= PASS_TIME:
        return
    factor = share / (1 - share) / (PASS_TARGET / (1 - PASS_TARGET))
    fraction, units, interval = (run.recipe.value(name) for name in ("fraction", "units", "hessian_interval"))
    smaller = min(fraction, max(LEAST_FRACTION, _rounded(fraction / factor)))
    fewer = max(1, round(units * smaller / fraction))
    rest = factor * smaller / fraction
    edits = []
    if smaller < fraction:
        edits += [run.recipe.edit("fraction", smaller, fraction), run.recipe.edit("units", fewer, units)]
    if rest > 1.1:
        edits.append(run.recipe.edit("hessian_interval", math.ceil(interval * rest), interval))
    if not run.recipe.found:  # what these settings are is not known then
        edits = [run.recipe.edit("hessian_interval", f"{factor:.1f} times as many steps as now")]
    yield Finding(
        "pass-time",
        "warning",
        f"the Hessian passes take {share:.0%} of the time; these lines bring them to about {PASS_TARGET:.0%}",
        (logged[0][0], logged[-1][0]),
        tuple(edits),
    )


def proposed_rho(run: Run, share: float) -> float | None:
    """The ρ that would leave `share` of the coordinates alone in the middle of the run; None where nothing tells.

    From the logged quantiles of |m|/h at 10 and 50 %, whose logarithm is taken to be normally distributed.
    """
    low, half = (run.over(run.middle, f"sophia/ratio_q{percent}") for percent in (10, 50))
    if not low or not half:
        return None
    z10, z = (NormalDist().inv_cdf(s) for s in (0.1, share))
    log10, log50 = math.log(median(low)), math.log(median(half))
    return _rounded(math.exp(log50 + (log50 - log10) * z / -z10))


def _ends(steps: list[int]) -> tuple[int, ...]:
    return (steps[0], steps[-1]) if steps else ()


def _standing(norms: dict[int, float], steps: int) -> tuple[int, ...]:
    """The first stretch of more than `steps` steps over which a norm above 0 stays the same to the last bit."""
    start = None
    for step, norm in norms.items():
        if start is None or norm != norms[start]:
            start = step
        elif norm > 0 and step - start > steps:
            return (start, step)
    return ()


def _rounded(value: float) -> float:
    """To two digits, as one would write it."""
    return float(f"{value:.2g}")
