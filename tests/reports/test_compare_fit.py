"""The mathematics of a comparison, on curves whose ratio is known."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from sophia_integrations.reports.compare.fit import (
    PowerLaw,
    crossing,
    fit_power_law,
    mean_curve,
    mean_interval,
    step_ratio,
    t_quantile,
)

LAW = PowerLaw(2.0, 30.0, 0.5)
STEPS = (300, 375, 450, 600)
OPTIONS = dict(confidence=0.95, resamples=200)


def losses(faster: float = 1.0, noise: float = 0.0, seeds: int = 3, seed: int = 0, law: PowerLaw = LAW):
    """Final losses of an optimizer that needs 1 / faster of the steps of the law."""
    draw = np.random.default_rng(seed)
    return {t: [law.at(t * faster) + noise * draw.standard_normal() for _ in range(seeds)] for t in STEPS}


def test_a_power_law_is_found_again():
    law = fit_power_law(STEPS, [LAW.at(t) for t in STEPS])
    assert (law.a, law.beta) == (pytest.approx(2.0, abs=0.01), pytest.approx(0.5, rel=0.01))
    assert law.steps_to(LAW.at(500)) == pytest.approx(500, rel=1e-4)
    assert law.steps_to(1.9) == math.inf


def test_no_power_law_through_losses_that_do_not_fall_or_are_not_there():
    assert fit_power_law(STEPS, [2.0, 2.1, 2.2, 2.3]) is None
    assert fit_power_law((300, 600), [2.2, 2.0]) is None
    assert math.isnan(step_ratio(losses(law=PowerLaw(2.0, -9.0, 0.5)), losses(), **OPTIONS).ratio.value)


@pytest.mark.parametrize("faster", [1 / 0.6, 1.0, 0.8])
def test_a_known_ratio_is_found_and_lies_in_its_interval(faster):
    exact = step_ratio(losses(), losses(faster), **OPTIONS)
    assert exact.ratio.value == pytest.approx(1 / faster, rel=1e-3)
    inside = 0
    for seed in range(20):
        found = step_ratio(losses(noise=0.005, seed=seed), losses(faster, 0.005, seed=seed + 100), **OPTIONS)
        inside += found.ratio.low <= 1 / faster <= found.ratio.high
        assert found.ratio.high / found.ratio.low < 1.6
    assert inside >= 18


def test_a_curve_never_falls_below_a_loss_of_zero():
    """Noise alone drives a below 0 in almost half of free fits here; with the best a ≥ 0 the ratio is found as well."""
    law = PowerLaw(0.5, 10.0, 0.2)
    laws = {}
    for seed in range(20):
        found = step_ratio(
            losses(noise=0.01, seed=seed, law=law), losses(1.25, 0.01, seed=seed + 100, law=law), **OPTIONS
        )
        laws[seed] = found.law.a
        assert found.unfit or found.ratio.low <= 0.8 <= found.ratio.high
        assert found.unfit or found.ratio.value == pytest.approx(0.8, abs=0.04)
    assert min(laws.values()) == 0.0 and sum(a == 0 for a in laws.values()) < 10


@pytest.mark.parametrize(
    ("measured", "why"),
    [
        # it falls ever faster, as no power law does
        (
            {300: 4.4, 375: 4.25, 450: 4.1, 600: 3.5},
            r"it misses the loss at 450 steps by 0\.1\d, .*spread explains 0\.0",
        ),
        ({300: 4.0, 375: 3.0, 450: 3.0, 600: 3.0}, "its exponent 20 is the highest that is tried"),
    ],
)
def test_a_curve_that_does_not_fit_gives_no_ratio(measured, why):
    draw = np.random.default_rng(1)
    reference = {t: [loss + 0.01 * draw.standard_normal() for _ in range(3)] for t, loss in measured.items()}
    found = step_ratio(reference, losses(), **OPTIONS)
    assert math.isnan(found.ratio.value) and re.match(why, found.unfit), found.unfit


def test_noise_of_the_seeds_is_no_misfit():
    """A refusal of a curve that is one is rare, however large the noise."""
    for noise in (0.0, 0.002, 0.01, 0.03):
        found = [step_ratio(losses(noise=noise, seed=s), losses(1.25), **OPTIONS) for s in range(20)]
        assert sum(bool(one.unfit) for one in found) <= 2


def test_an_optimizer_against_itself_is_never_told_from_itself():
    """Even where the power law does not fit and the seeds do not differ at all."""
    bent = {300: [3.9, 3.9], 375: [3.4, 3.4], 450: [3.38, 3.38], 600: [3.1, 3.1]}
    for same in (bent, losses(noise=0.01), losses(noise=0.0)):
        assert not step_ratio(same, same, **OPTIONS).ratio.excludes(1.0)


def test_beyond_the_horizons_of_the_reference_there_is_only_a_bound():
    much_faster = step_ratio(losses(), losses(4.0), **OPTIONS)
    assert (much_faster.bound, much_faster.ratio.value) == ("below", 0.5)
    never_reached = step_ratio(losses(), losses(0.2), **OPTIONS)
    assert (never_reached.bound, never_reached.ratio.value) == ("above", 2.0)


@pytest.mark.parametrize("lost", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_gives_no_ratio(lost):
    broken = losses()
    broken[600][1] = lost
    for pair in ((broken, losses()), (losses(), broken)):
        assert math.isnan(step_ratio(*pair, **OPTIONS).ratio.value)


def test_one_seed_gives_a_ratio_without_an_interval():
    found = step_ratio(losses(seeds=1), losses(1.25, seeds=1), **OPTIONS)
    assert found.ratio.value == pytest.approx(0.8, rel=1e-3)
    assert not found.ratio.excludes(1.0) and math.isnan(found.ratio.low)


def test_the_same_seeds_give_the_same_interval():
    pair = losses(noise=0.01), losses(1.3, 0.01, seed=1)
    assert step_ratio(*pair, **OPTIONS) == step_ratio(*pair, **OPTIONS)


def test_intervals_of_means_are_students():
    assert [round(t_quantile(0.95, n), 3) for n in (1, 2, 4, 100)] == [12.706, 4.303, 2.776, 1.984]
    assert round(t_quantile(0.99, 3), 3) == 5.841
    found = mean_interval([1.0, 2.0, 3.0], 0.95)
    assert (found.value, found.high - 2.0) == (2.0, pytest.approx(4.3027 / math.sqrt(3), rel=1e-4))
    assert not mean_interval([1.0], 0.95).excludes(0.0)
    assert math.isnan(mean_interval([1.0, math.inf], 0.95).value)


def test_where_a_curve_crosses_a_level():
    steps = [100, 200, 300]
    assert crossing(steps, [4.0, 3.0, 2.0], 2.5) == 250
    assert crossing(steps, [4.0, math.nan, 2.0], 3.0) == 200
    assert crossing(steps, [4.0, 3.0, 2.0], 1.0) is None
    assert crossing(steps, [2.0, 3.0, 1.0], 2.5) == 100
    assert crossing([], [], 1.0) is None


def test_curves_on_different_grids_are_averaged_where_both_are_known():
    steps, mean = mean_curve([[(100, 4.0), (300, 2.0)], [(200, 5.0), (300, 4.0), (400, 3.0)]])
    assert (steps, mean) == ([200, 300], [4.0, 3.0])
    assert mean_curve([]) == mean_curve([[]]) == mean_curve([[(1, 2.0)], [(3, 2.0)]]) == ([], [])
