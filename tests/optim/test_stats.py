"""Diagnostics on numbers worked out by hand, and `update_hessian`, the official loop's manual way."""

import dataclasses
import math

import pytest
import torch

from sophia_integrations import SophiaG

pytestmark = pytest.mark.usefixtures("backend")


def test_stats_by_hand(scripted):
    a, b = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(()))
    curvature = [torch.tensor([40.0, 30.0, 80.0, 5.0]), torch.tensor(100.0)]
    optimizer = SophiaG(
        [{"params": [a]}, {"params": [b], "rho": 0.01}],
        betas=(0, 0),
        rho=0.05,
        estimator=scripted(lambda step, params: curvature),
    )
    # rho * h: 2, 1.5, 4, 0.25 and 1; so the 1st, 3rd and 5th of five coordinates are not clipped
    a.grad, b.grad = torch.tensor([1.0, 2.0, -3.0, 0.5]), torch.tensor(-0.5)
    optimizer.step()
    stats = optimizer.stats()
    assert stats["win_rate"] == pytest.approx(3 / 5)
    assert stats["hessian_norm"].item() == pytest.approx(math.sqrt(40**2 + 30**2 + 80**2 + 5**2 + 100**2))
    assert (stats["hessian_updates"], stats["hessian_skipped"]) == (1, 0)
    assert stats["nonfinite_gradients"] == 0 and stats["hessian_seconds"] > 0
    assert all(isinstance(stats[k], torch.Tensor) for k in ("hessian_norm", "nonfinite_gradients"))


def test_stats_before_the_first_step():
    stats = SophiaG([torch.nn.Parameter(torch.ones(3))]).stats()
    assert stats.pop("hessian_age") is None and not stats.pop("hessian_quantiles").any()
    assert stats.pop("ratio_quantiles") is None and stats.pop("rho") == 0.05
    assert all(float(value) == 0 for value in stats.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_update_hessian_averages_n_times_the_squared_gradient(dtype):
    param = torch.nn.Parameter(torch.zeros(1000, dtype=dtype))
    unused = torch.nn.Parameter(torch.zeros(2))
    optimizer = SophiaG([param, unused], betas=(0.9, 0.75))
    expected = torch.zeros(1000, dtype=torch.float64)
    for seed, count in enumerate([8, 32.0, torch.tensor(5)]):
        param.grad = torch.randn(1000, generator=torch.Generator().manual_seed(seed)).to(dtype)
        optimizer.update_hessian(count)
        expected = 0.75 * expected + 0.25 * float(count) * param.grad.double().square()
    torch.testing.assert_close(optimizer.state[param]["hessian"].double(), expected, rtol=1e-6, atol=0)
    assert unused not in optimizer.state and optimizer.stats()["hessian_updates"] == 3


@pytest.mark.parametrize("count", [0, -3, math.nan, math.inf])
def test_update_hessian_refuses_a_bad_number(count):
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = SophiaG([param])
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=f"num_predictions must be a positive number, got {count}"):
        optimizer.update_hessian(count)
    assert optimizer.stats()["hessian_skipped"] == 0 and param not in optimizer.state


def test_update_hessian_drops_and_counts_what_is_not_finite():
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = SophiaG([param], hessian_interval=2)
    with pytest.warns(UserWarning, match="at step 0: no parameter has a gradient") as caught:
        optimizer.update_hessian(4)
    assert caught[0].filename == __file__
    for bad in (math.nan, math.inf, 1e30):
        param.grad = torch.tensor([1.0, bad, 1.0])
        with pytest.warns(UserWarning, match="at step 0: it was not finite"):
            optimizer.update_hessian(4)
    assert optimizer.stats()["hessian_skipped"] == 4 and param not in optimizer.state
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match="Cause: it was not finite"):
        optimizer.step()

    optimizer.update_hessian(4)
    before = optimizer.state[param]["hessian"].clone()
    param.grad = torch.full((3,), math.nan)
    with pytest.warns(UserWarning, match="at step 2: it was not finite"):
        optimizer.update_hessian(4)
    assert torch.equal(optimizer.state[param]["hessian"], before)
    assert (optimizer.stats()["hessian_updates"], optimizer.stats()["hessian_skipped"]) == (1, 5)


def test_age_zeros_and_quantiles_of_the_curvature():
    param = torch.nn.Parameter(torch.zeros(101))
    optimizer = SophiaG([param], lr=0.1, betas=(0.9, 0.0), hessian_interval=3)
    param.grad = torch.arange(101, dtype=torch.float32).sqrt()
    ages = []
    for step in range(5):
        if step % 3 == 0:
            optimizer.update_hessian(2)
        optimizer.step()
        ages.append(optimizer.stats()["hessian_age"])
    assert ages == [0, 1, 2, 0, 1]
    stats = optimizer.stats()
    assert float(stats["hessian_zero_fraction"]) == pytest.approx(1 / 101)
    torch.testing.assert_close(stats["hessian_quantiles"], torch.tensor([10.0, 50.0, 100.0, 150.0, 190.0]))


def test_printing_shows_what_was_given_and_not_what_was_counted():
    optimizer = SophiaG(torch.nn.Linear(3, 2).parameters(), lr=1e-3, rho=0.07)
    shown = repr(optimizer)
    assert shown.startswith("SophiaG (\nParameter Group 0\n") and shown.endswith(")")
    assert "    rho: 0.07\n" in shown and "    hessian_interval: 10\n" in shown
    assert not any(f"    {field.name}:" in shown for field in dataclasses.fields(optimizer.progress))
