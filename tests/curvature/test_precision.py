"""Half precision: scaled losses, skipped steps, and float32 state."""

import pytest
import torch
import torch.nn.functional as F
from support import FixedLabels, Toy, toy_batches

from sophia_integrations import GaussNewtonBartlett, SophiaG
from sophia_integrations.curvature import Categorical, Readout


class OneClass(Categorical):
    def sample(self, prediction, labels, generator):
        return torch.zeros(len(prediction), dtype=torch.int64)


def first_estimate(dtype=None, autocast=None):
    torch.manual_seed(0)
    model = Toy()
    if dtype is not None:
        model.to(dtype)
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=2, readout=Readout(FixedLabels()))
    optimizer = SophiaG(model.parameters(), lr=0.0, betas=(0.9, 0.0), estimator=estimator)
    x, labels = toy_batches(0, 0, rows=16)[0]
    x = x.to(dtype or x.dtype)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss = F.cross_entropy(model(x, labels=labels).float(), labels)
    loss.backward()
    optimizer.step()
    assert all(optimizer.state[p]["hessian"].dtype == torch.float32 for p in model.parameters())
    return torch.cat([optimizer.state[p]["hessian"].flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dtype": torch.bfloat16}, 0.05),
        ({"autocast": torch.bfloat16}, 0.05),
        ({"dtype": torch.float16}, 0.01),
        ({"autocast": torch.float16}, 0.01),
    ],
)
def test_half_precision_estimate_is_close_to_float32(options, tolerance):
    exact, half = first_estimate(), first_estimate(**options)
    assert torch.linalg.norm(half - exact) <= tolerance * torch.linalg.norm(exact)


@pytest.mark.parametrize(("inputs", "gain"), [(1e-5, 1e-3), (2e4, 1e-3)], ids=["small", "large"])
def test_float16_neither_underflows_nor_overflows(inputs, gain):
    def hessian(autocast):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 10, bias=False), torch.nn.Linear(10, 7, bias=False))
        with torch.no_grad():
            model[1].weight.mul_(gain)
        labels = torch.zeros(16, dtype=torch.int64)
        x = inputs * (1 + 0.1 * torch.randn(16, 6))
        estimator = GaussNewtonBartlett(model, fraction=1.0, units=1, readout=Readout(OneClass()))
        optimizer = SophiaG(model.parameters(), lr=0.0, betas=(0.9, 0.0), estimator=estimator)
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        optimizer.step()
        assert optimizer.stats()["hessian_updates"] == 1
        return [optimizer.state[p]["hessian"] for p in model.parameters()]

    for half, exact in zip(hessian(True), hessian(False), strict=True):
        assert torch.linalg.norm(half - exact) <= 0.05 * torch.linalg.norm(exact)


def test_a_step_that_the_scaler_skips_ticks_nothing():
    torch.manual_seed(0)
    model = Toy()
    optimizer = SophiaG(model.parameters(), lr=1e-3, estimator=GaussNewtonBartlett(model, units=1), hessian_interval=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    updates = []
    for step in range(6):
        optimizer.zero_grad()
        x, labels = toy_batches(step, 0)[0]
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x, labels=labels).float(), labels)
        scaler.scale(loss).backward()
        if step in (0, 3):
            model.net[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        updates.append((optimizer.param_groups[0]["step"], optimizer.stats()["hessian_updates"]))
    assert updates == [(0, 0), (1, 1), (2, 1), (2, 1), (3, 2), (4, 2)]
    assert optimizer.stats()["hessian_skipped"] == 0
