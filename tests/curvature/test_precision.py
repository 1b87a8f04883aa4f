"""Half precision: scaled losses, skipped steps, and float32 state."""

import pytest
import torch
import torch.nn.functional as F
from support import FixedLabels, Toy, toy_batches

from sophia_integrations import GaussNewtonBartlett, SophiaG
from sophia_integrations.curvature import Readout


def first_estimate(dtype=None, autocast=None, gain=1.0):
    torch.manual_seed(0)
    model = Toy()
    with torch.no_grad():
        model.net[2].weight.mul_(gain)
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


@pytest.mark.parametrize("gain", [1e-6, 4e3])
def test_float16_neither_underflows_nor_overflows(gain):
    exact, half = first_estimate(gain=gain), first_estimate(autocast=torch.float16, gain=gain)
    assert torch.isfinite(half).all()
    assert ((half > 0) >= (exact > exact.max() * 1e-16)).float().mean() > 0.98
    assert torch.linalg.norm(half - exact) <= 0.05 * torch.linalg.norm(exact)


def test_a_step_that_the_scaler_skips_ticks_nothing():
    torch.manual_seed(0)
    model = Toy()
    optimizer = SophiaG(
        model.parameters(), lr=1e-3, estimator=GaussNewtonBartlett(model, units=1), hessian_interval=2
    )
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
