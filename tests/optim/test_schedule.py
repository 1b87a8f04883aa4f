"""The estimator is asked when it is due and at no other time, and Sophia is never silently Signum."""

import pytest
import torch

from sophia_integrations import SophiaG
from sophia_integrations.optim import Estimate


@pytest.fixture
def param():
    return torch.nn.Parameter(torch.arange(1.0, 6.0))


def steps(optimizer, count):
    for _ in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()


def test_asked_every_k_steps_before_the_update(param, curvature):
    optimizer = SophiaG([param], lr=0.1, hessian_interval=3, estimator=curvature)
    thetas = []
    for _ in range(8):
        thetas.append(param.detach().clone())
        steps(optimizer, 1)
    assert curvature.asked == [0, 3, 6]
    for asked, (seen,) in zip(curvature.asked, curvature.theta, strict=True):
        assert torch.equal(seen, thetas[asked])
    assert curvature.armed == [True, False, False, True, False, False, True, False, False]
    assert optimizer.stats()["hessian_updates"] == 3


def test_the_estimate_counts_in_the_very_step_it_was_made_for(param, constant_curvature):
    optimizer = SophiaG([param], lr=1.0, betas=(0, 0), rho=0.1, weight_decay=0, estimator=constant_curvature(100))
    steps(optimizer, 1)
    torch.testing.assert_close(param.detach(), torch.arange(1.0, 6.0) - 0.1)


def test_hessian_due_says_what_the_next_step_does(param, curvature):
    optimizer = SophiaG([param], hessian_interval=2, estimator=curvature)
    due = []
    for _ in range(5):
        due.append(optimizer.hessian_due)
        steps(optimizer, 1)
    assert due == [True, False, True, False, True]


def test_only_trainable_parameters_are_asked_for(param, curvature):
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    steps(SophiaG([param, frozen], estimator=curvature), 1)
    assert [len(seen) for seen in curvature.theta] == [1]


def test_an_estimator_may_be_attached_later(param, curvature):
    optimizer = SophiaG([param], hessian_interval=4)
    steps(optimizer, 2)
    optimizer.estimator = curvature
    assert optimizer.estimator is curvature and curvature.armed == [True]
    steps(optimizer, 4)
    assert curvature.asked == [2, 4]
    optimizer.estimator = None
    steps(optimizer, 4)
    assert curvature.asked == [2, 4]


def test_a_dropped_first_estimate_is_retried_at_the_next_step(param, scripted):
    def supply(step, params):
        return [torch.ones_like(p) for p in params] if step else Estimate(None, dropped="the labels were masked")

    estimator = scripted(supply)
    optimizer = SophiaG([param], hessian_interval=3, estimator=estimator)
    with pytest.warns(UserWarning, match=r"no Hessian estimate at step 0: the labels were masked\.$") as caught:
        steps(optimizer, 1)
    assert caught[0].filename == __file__, "a warning points at the line that called step()"
    steps(optimizer, 6)
    assert estimator.asked == [0, 1, 3, 6]
    assert estimator.armed[:4] == [True, True, False, True]
    stats = optimizer.stats()
    assert (stats["hessian_updates"], stats["hessian_skipped"]) == (3, 1)


def test_a_later_drop_keeps_h_is_counted_and_warns(param, scripted):
    dropped = {2: Estimate(None, dropped="it was not finite"), 4: Estimate(None, dropped="no batch", captured=False)}
    estimator = scripted(lambda step, params: dropped.get(step) or [torch.ones_like(p) for p in params])
    optimizer = SophiaG([param], hessian_interval=2, estimator=estimator)
    steps(optimizer, 2)
    before = optimizer.state[param]["hessian"].clone()
    with pytest.warns(UserWarning, match="no Hessian estimate at step 2: it was not finite"):
        steps(optimizer, 2)
    with pytest.warns(UserWarning, match="no Hessian estimate at step 4: no batch"):
        steps(optimizer, 1)
    assert torch.equal(optimizer.state[param]["hessian"], before)
    assert optimizer.stats()["hessian_skipped"] == 2
    steps(optimizer, 2)
    assert estimator.asked == [0, 2, 4, 6]


def test_raises_without_an_estimator(param):
    optimizer = SophiaG([param], hessian_interval=3)
    steps(optimizer, 3)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=r"3 steps without a single.*Cause: no estimator was given and update_hes"):
        steps(optimizer, 1)
    assert torch.equal(param.detach(), before)


def test_raises_with_the_cause_when_every_estimate_is_dropped(param, scripted):
    estimator = scripted(lambda step, params: Estimate(None, dropped=f"reason {step}", captured=False))
    optimizer = SophiaG([param], hessian_interval=2, estimator=estimator)
    with pytest.warns(UserWarning, match="at step 0: reason 0") as caught:
        steps(optimizer, 2)
    assert len(caught) == 1, "retries between scheduled steps are quiet"
    with pytest.warns(UserWarning, match="reason 2"), pytest.raises(RuntimeError, match=r"Cause: reason 2\."):
        steps(optimizer, 1)
    assert optimizer.stats()["hessian_skipped"] == 3


def test_update_hessian_by_hand_is_enough(param):
    optimizer = SophiaG([param], hessian_interval=2)
    steps(optimizer, 1)
    optimizer.update_hessian(4)
    steps(optimizer, 4)
    assert optimizer.stats()["hessian_updates"] == 1


def test_learning_rate_schedulers_drive_it(curvature, scripted):
    def final(lr, schedule):
        param = torch.nn.Parameter(torch.ones(4))
        optimizer = SophiaG([param], lr=lr, hessian_interval=2, estimator=scripted(curvature.supply))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1)) if schedule else None
        for t in range(5):
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] if schedule else 0.1 / (t + 1)
            steps(optimizer, 1)
            if scheduler:
                scheduler.step()
        return param.detach()

    torch.testing.assert_close(final(0.1, True), final(0.1, False))
    torch.testing.assert_close(final(torch.tensor(0.1), True), final(0.1, False))


def test_the_closure_runs_first_with_gradients_enabled(scripted):
    model = torch.nn.Linear(3, 2)
    torch.nn.init.ones_(model.weight)
    calls = []
    estimator = scripted(lambda step, params: calls.append("estimate") or [torch.ones_like(p) for p in params])
    optimizer = SophiaG(model.parameters(), lr=0.1, hessian_interval=2, estimator=estimator)

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    before = model.weight.detach().clone()
    losses = [optimizer.step(closure) for _ in range(3)]
    assert calls == ["closure", "estimate", "closure", "closure", "estimate"]
    assert losses[0].requires_grad and losses[2] < losses[0]
    assert not torch.equal(model.weight.detach(), before)
    assert optimizer.step() is None


def test_curvature_that_grows_old_without_an_estimator_warns_and_then_stops(param, curvature):
    optimizer = SophiaG([param], hessian_interval=3, estimator=curvature)
    steps(optimizer, 4)
    optimizer.estimator = None
    steps(optimizer, 5)
    expected = (
        r"last Hessian estimate is 6 steps old, and one is due every 3; at 15 steps it stops\. Set optimizer\.estim"
    )
    with pytest.warns(UserWarning, match=expected) as caught:
        steps(optimizer, 1)
    assert len(caught) == 1 and caught[0].filename == __file__
    steps(optimizer, 8)
    before = param.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"is 15 steps old, and one is due every 3: it would train on with the curvat"
    ):
        steps(optimizer, 1)
    assert torch.equal(param.detach(), before)
    optimizer.estimator = curvature
    steps(optimizer, 1)
    assert optimizer.stats()["hessian_age"] == 0


def test_a_batch_that_never_comes_stops_too_and_says_why(param, scripted):
    def supply(step, params):
        return Estimate(None, dropped="there was no batch") if step else [torch.ones_like(p) for p in params]

    optimizer = SophiaG([param], hessian_interval=2, estimator=scripted(supply))
    with pytest.warns(UserWarning, match="no Hessian estimate at step .*: there was no batch"):
        steps(optimizer, 10)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="is 10 steps old.*Cause: there was no batch"):
        steps(optimizer, 1)


def test_an_estimate_by_hand_every_few_intervals_goes_on_for_ever(param):
    optimizer = SophiaG([param], hessian_interval=2)
    for step in range(20):
        param.grad = torch.ones_like(param)
        if step % 3 == 0:
            optimizer.update_hessian(4)
        optimizer.step()
    assert optimizer.stats()["hessian_updates"] == 7


def test_a_resumed_optimizer_without_an_estimator_is_old_as_well(param, curvature):
    optimizer = SophiaG([param], hessian_interval=2, estimator=curvature)
    steps(optimizer, 3)
    other = torch.nn.Parameter(param.detach().clone())
    resumed = SophiaG([other], hessian_interval=2)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match="is 4 steps old"):
        steps(resumed, 9)
    with pytest.raises(RuntimeError, match="is 10 steps old"):
        steps(resumed, 1)
