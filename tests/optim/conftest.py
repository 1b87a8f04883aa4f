"""A scripted estimator, and the float64 specification as a one-step oracle for a whole optimizer."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from sophia_integrations.optim import Estimate, reference_step

TOLERANCE = {
    torch.float64: dict(rtol=1e-13, atol=1e-13),
    torch.float32: dict(rtol=1e-6, atol=1e-6),
    torch.float16: dict(rtol=2**-10, atol=1e-6),
    torch.bfloat16: dict(rtol=2**-7, atol=1e-6),
}


class ScriptedEstimator:
    """Supplies ĥ from `supply(step, params)`, a list of tensors or an Estimate, and logs what it is asked."""

    def __init__(self, supply):
        self.supply = supply
        self.armed, self.asked, self.theta = [], [], []

    def arm(self, due):
        self.armed.append(due)

    def estimate(self, params, step):
        self.asked.append(step)
        self.theta.append([p.detach().clone() for p in params])
        supplied = self.supply(step, params)
        return supplied if isinstance(supplied, Estimate) else Estimate(dict(zip(params, supplied, strict=True)), 1)


def random_curvature(step, params):
    """ĥ that clips about half of the coordinates at rho 0.05, beta2 0.9 and unit gradients; a function of `step`."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [
        (torch.rand(p.shape, generator=generator) + 0.5).mul_(8).to(torch.promote_types(p.dtype, torch.float32))
        for p in params
    ]


def step_like_reference(optimizer):
    """Take one step and require that θ, m and h are those of `reference_step` from where they stood."""
    groups = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    before = []
    for p, _ in groups:
        wide = torch.promote_types(p.dtype, torch.float32)
        state = optimizer.state.get(p) or {k: torch.zeros(p.shape, dtype=wide) for k in ("exp_avg", "hessian")}
        before.append((p.detach().clone(), state["exp_avg"].clone(), state["hessian"].clone()))
    estimator = optimizer.estimator
    asked = len(estimator.asked)
    step = optimizer.param_groups[0]["step"]
    optimizer.step()
    trained = [p for p, _ in groups if p.requires_grad]
    estimates = dict(zip(trained, estimator.supply(step, trained), strict=True)) if len(estimator.asked) > asked else {}
    for (p, group), (theta, m, h) in zip(groups, before, strict=True):
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        beta1, beta2 = group["betas"]
        options = {k: group[k] for k in ("rho", "eps", "weight_decay", "maximize")}
        new_theta, new_m, new_h = reference_step(
            theta, grad, m, h, estimates.get(p), lr=float(group["lr"]), beta1=beta1, beta2=beta2, **options
        )
        if p.grad is None:
            new_theta, new_m = theta.double(), m.double()
        wide = torch.promote_types(p.dtype, torch.float32)
        torch.testing.assert_close(p.detach(), new_theta.to(p.dtype), **TOLERANCE[p.dtype])
        if p in optimizer.state:
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], new_m.to(wide), **TOLERANCE[wide])
            torch.testing.assert_close(optimizer.state[p]["hessian"], new_h.to(wide), **TOLERANCE[wide])


@pytest.fixture
def scripted():
    """The class: `scripted(supply)`."""
    return ScriptedEstimator


@pytest.fixture
def curvature():
    """A new estimator with random ĥ that depends on the step alone."""
    return ScriptedEstimator(random_curvature)


@pytest.fixture
def constant_curvature():
    """`constant_curvature(value)`: an estimator whose every ĥ is `value`."""
    return lambda value: ScriptedEstimator(
        lambda step, params: [torch.full(p.shape, float(value), dtype=p.dtype) for p in params]
    )


@pytest.fixture
def reference():
    return step_like_reference


@pytest.fixture
def official():
    """The official package, forgotten afterwards: LightningCLI finds classes by name, and its class has ours."""
    module = importlib.import_module("sophia_opt")
    yield module
    module.SophiaG.__module__ = "__main__"
    del sys.modules["sophia_opt"]
