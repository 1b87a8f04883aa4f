"""Half precision: scaled losses, skipped steps, and float32 state."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from support import FixedLabels, Toy, toy_batches

from sophia_integrations import GaussNewtonBartlett, Hutchinson, SophiaG
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


class TwoLayers(torch.nn.Module):
    """Layers whose gradients can be made to vanish or to overflow in float16."""

    def __init__(self, gain):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 10, bias=False), torch.nn.Linear(10, 7, bias=False))
        with torch.no_grad():
            self.layers[1].weight.mul_(gain)

    def forward(self, x):
        return self.layers(x)


def own_autocast(model):
    """As accelerate does it: float16 inside the forward only, and a float32 output."""
    forward = torch.autocast("cpu", dtype=torch.float16)(model.forward)
    model.forward = lambda x: forward(x).float()
    return contextlib.nullcontext()


def autocast_around(model):
    return torch.autocast("cpu", dtype=torch.float16)


def as_it_is(model):
    return contextlib.nullcontext()


def one_class_loss(output):
    return F.cross_entropy(output.float(), torch.zeros(len(output), dtype=torch.int64))


@pytest.mark.parametrize("half", [autocast_around, own_autocast])
@pytest.mark.parametrize(
    ("estimator", "inputs", "gain", "weight"),
    [
        ("gauss-newton", 1e-5, 1e-3, 1),
        ("gauss-newton", 2e4, 1e-3, 1),
        ("hutchinson", 1, 1e-2, 1e-6),
        ("hutchinson", 1, 1, 1e3),
    ],
)
def test_float16_neither_underflows_nor_overflows(half, estimator, inputs, gain, weight):
    x = inputs * (1 + 0.1 * torch.randn(16, 6, generator=torch.Generator().manual_seed(0)))

    def hessian(precision):
        model = TwoLayers(gain)
        context = precision(model)
        options = dict(fraction=1.0, units=1)
        if estimator == "gauss-newton":
            source = GaussNewtonBartlett(model, readout=Readout(OneClass()), **options)
        else:
            source = Hutchinson(model, loss=lambda output, batch: weight * one_class_loss(output), **options)
        optimizer = SophiaG(model.parameters(), lr=0.0, betas=(0.9, 0.0), estimator=source)
        with context:
            loss = one_class_loss(model(x))
        loss.backward()
        optimizer.step()
        assert optimizer.stats()["hessian_updates"] == 1
        return [optimizer.state[p]["hessian"] for p in model.parameters()]

    for low, exact in zip(hessian(half), hessian(as_it_is), strict=True):
        assert torch.linalg.norm(low - exact) <= 0.05 * torch.linalg.norm(exact)


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
        updates.append((optimizer.progress.step, optimizer.stats()["hessian_updates"]))
    assert updates == [(0, 0), (1, 1), (2, 1), (2, 1), (3, 2), (4, 2)]
    assert optimizer.stats()["hessian_skipped"] == 0
