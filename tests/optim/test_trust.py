"""ρ by itself, against the exact quantile of ratios worked out in float64; and every figure about the clip by hand."""

import copy
import math

import pytest
import torch
from specification import Pieces, ScriptedEstimator
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, OneCycleLR

from sophia_integrations import SophiaG
from sophia_integrations.optim import reference_rho

pytestmark = pytest.mark.usefixtures("backend")

BIN = 2 ** (1 / 16)
INTERVAL = 3


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def log_normal_curvature(step, params):
    """ĥ over three orders of magnitude."""
    return [5 * torch.exp(1.5 * normal(*p.shape, seed=1000 + 7 * step + i)) for i, p in enumerate(params)]


class ByHand:
    """m and h of every parameter in float64, from the gradients and the scripted ĥ."""

    def __init__(self, params, supply, betas, nesterov=False, bias_correction=False, maximize=False):
        self.params, self.supply, self.betas = params, supply, betas
        self.nesterov, self.bias_correction, self.sign = nesterov, bias_correction, -1 if maximize else 1
        self.m = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
        self.h = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
        self.steps = self.updates = 0

    def advance(self, rotations=None):
        """One step with the gradients that the parameters have: |m| as it is followed and h, of all coordinates."""
        beta1, beta2 = self.betas
        if self.steps % INTERVAL == 0:
            self.h = [
                beta2 * h + (1 - beta2) * new.double()
                for h, new in zip(self.h, self.supply(self.steps, self.params), strict=True)
            ]
            self.updates += 1
        self.steps += 1
        followed = []
        for i, p in enumerate(self.params):
            g = self.sign * p.grad.double()
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
            f = beta1 * self.m[i] + (1 - beta1) * g if self.nesterov else self.m[i]
            left, right = rotations[i] if rotations else (None, None)
            followed.append(f if left is None else left.T @ f @ right)
        scale_m = 1 - beta1**self.steps if self.bias_correction else 1
        scale_h = 1 - beta2**self.updates if self.bias_correction else 1
        return (torch.cat([x.flatten() for x in y]) / s for y, s in ((followed, scale_m), (self.h, scale_h)))


def build(shapes=((40, 50), (17,)), supply=log_normal_curvature, **options):
    params = [torch.nn.Parameter(normal(*s, seed=i)) for i, s in enumerate(shapes)]
    defaults = dict(
        lr=1e-3, betas=(0.9, 0.8), rho="auto", hessian_interval=INTERVAL, estimator=ScriptedEstimator(supply)
    )
    return params, SophiaG(params, **{**defaults, **options})


def set_gradients(params, step):
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, seed=100 * step + i)


def assert_within_a_bin(actual, expected):
    assert expected / BIN <= actual <= expected * BIN, (actual, expected)


CHOICES = {
    "momentum": {},
    "nesterov": dict(nesterov=True),
    "bias correction": dict(bias_correction=True),
    "both, upwards": dict(nesterov=True, bias_correction=True, maximize=True),
}


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("basis", [None, "eigen"])
def test_rho_is_the_quantile_at_every_estimate_and_stays_until_the_next(basis, options):
    supply = (lambda step, params: [torch.full(p.shape, 3.0 + step) for p in params]) if basis else log_normal_curvature
    params, optimizer = build(supply=supply, basis=basis, unclipped=(0.7, 0.3), **options)
    hand = ByHand(params, supply, (0.9, 0.8), **options)
    before = None
    for step in range(10):
        set_gradients(params, step)
        optimizer.step()
        rotations = None
        if basis:
            rotations = [Pieces(1, 40, 50, 40, 50).whole(optimizer.state[params[0]])[0], (None, None)]
        followed, h = hand.advance(rotations)
        rho = optimizer.stats()["rho"]
        if basis and step == 0:
            pass  # the first gradient is diagonal in its own eigenbasis: all other ratios are rounding errors
        elif step % INTERVAL == 0:
            assert_within_a_bin(rho, reference_rho(followed, h, 0.7))
            assert optimizer.stats()["win_rate"] == pytest.approx(0.7, abs=0.01)
            assert rho != before
            for tenths, quantile in enumerate(optimizer.stats()["ratio_quantiles"], 1):
                assert_within_a_bin(quantile, reference_rho(followed, h, tenths / 10))
        else:
            assert rho == before
        before = rho


def shares_over(optimizer, params, scheduler, steps):
    """The share measured at each estimate, and the learning rate that it was measured at."""
    shares, rates = [], []
    for step in range(steps):
        set_gradients(params, step)
        rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step % INTERVAL == 0:
            shares.append(optimizer.stats()["win_rate"])
            rates.append(rate)
        if scheduler is not None:
            scheduler.step()
    return shares, rates


def cosine_after_warmup(optimizer):
    return LambdaLR(optimizer, lambda t: t / 6 if t < 6 else 0.5 * (1 + math.cos(math.pi * (t - 6) / 18)))


SCHEDULES = {
    "constant": (lambda optimizer: None, 1e-3),
    "warm-up and cosine": (cosine_after_warmup, 1e-3),
    "restarts": (lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 9), 1e-3),
    "tensor lr": (cosine_after_warmup, torch.tensor(1e-3)),
}


@pytest.mark.parametrize(("schedule", "lr"), SCHEDULES.values(), ids=SCHEDULES)
def test_the_share_follows_the_learning_rate(schedule, lr):
    params, optimizer = build(unclipped=(0.8, 0.2), lr=copy.deepcopy(lr))  # a scheduler fills a tensor
    shares, rates = shares_over(optimizer, params, schedule(optimizer), 25)
    assert shares == pytest.approx([0.2 + 0.6 * rate / 1e-3 for rate in rates], abs=0.01)


def test_the_peak_of_one_cycle_is_the_largest_rate_so_far():
    params, optimizer = build(unclipped=(0.8, 0.2))
    scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=31, cycle_momentum=False)
    shares, rates = shares_over(optimizer, params, scheduler, 31)
    peaks = [max(rates[: i + 1]) for i in range(len(rates))]
    assert peaks[-1] > 2 * rates[0] and rates[-1] < 0.1 * peaks[-1]
    assert shares == pytest.approx([0.2 + 0.6 * r / p for r, p in zip(rates, peaks, strict=True)], abs=0.01)


def test_a_rate_set_by_hand_counts_as_well():
    params, optimizer = build(unclipped=(0.8, 0.2))
    shares = []
    for step, rate in enumerate((1e-3, 4e-3, 1e-3)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for inner in range(INTERVAL):
            set_gradients(params, INTERVAL * step + inner)
            optimizer.step()
        shares.append(optimizer.stats()["win_rate"])
    assert shares == pytest.approx([0.8, 0.8, 0.2 + 0.6 / 4], abs=0.01)


def test_a_learning_rate_of_zero_has_the_share_of_the_end():
    params, optimizer = build(unclipped=(0.8, 0.2))
    LambdaLR(optimizer, lambda t: 0.0)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.stats()["win_rate"] == pytest.approx(0.2, abs=0.01)
    params, optimizer = build(unclipped=(0.8, 0.2), lr=0.0)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.stats()["win_rate"] == pytest.approx(0.8, abs=0.01), "there has been no peak"


def test_coordinates_without_curvature_do_not_count():
    def supply(step, params):
        h = log_normal_curvature(step, params)
        h[0][:10] = 0
        h[0][10:20] *= -1
        return h

    params, optimizer = build(supply=supply, betas=(0.9, 0.0), unclipped=(0.6, 0.3))
    hand = ByHand(params, supply, (0.9, 0.0))
    set_gradients(params, 0)
    optimizer.step()
    followed, h = hand.advance()
    assert_within_a_bin(optimizer.stats()["rho"], reference_rho(followed, h, 0.6))
    curved = float((h > 0).double().mean())
    assert optimizer.stats()["win_rate"] == pytest.approx(0.6 * curved, abs=0.01)
    assert optimizer.stats()["curvature_share"] == pytest.approx(curved, abs=1e-6)


def test_without_any_curvature_rho_stays_as_it_was():
    def supply(step, params):
        return log_normal_curvature(step, params) if step < 3 else [torch.zeros(p.shape) for p in params]

    params, optimizer = build(supply=supply, betas=(0.9, 0.0))
    rhos = []
    for step in range(4):
        set_gradients(params, step)
        optimizer.step()
        rhos.append(optimizer.stats()["rho"])
    assert rhos[0] > 0 and len(set(rhos)) == 1
    assert optimizer.stats()["win_rate"] == 0 and optimizer.stats()["curvature_share"] == 0
    assert optimizer.stats()["ratio_quantiles"] == [None] * 9


def test_ratios_beyond_the_scale_count_at_its_ends():
    """No gradient at all, and curvature so small that the ratio overflows."""

    def supply(step, params):
        h = torch.ones(100)
        h[:30] = 1e-38
        return [h]

    params, optimizer = build([(100,)], supply, betas=(0.9, 0.0), unclipped=(0.35, 0.3))
    params[0].grad = torch.ones(100)
    params[0].grad[:30] = 1e30
    params[0].grad[60:] = 0
    optimizer.step()
    quantiles = optimizer.stats()["ratio_quantiles"]
    assert all(q < 2**-63 for q in quantiles[:3]) and all(q > 2**63 for q in quantiles[7:])
    assert quantiles[5] == pytest.approx(0.1, rel=0.05)
    assert params[0].isfinite().all()


def test_one_rho_for_all_groups_and_adamw_does_not_count():
    steep, flat, number = (torch.nn.Parameter(normal(60, 50, seed=i)) for i in range(3))
    embedding = torch.nn.Parameter(normal(100, 50, seed=3))
    groups = [
        {"params": [embedding], "update": "adamw", "rho": 7.0},
        {"params": [steep], "unclipped": (0.5, 0.3)},
        {"params": [flat], "unclipped": (0.9, 0.3)},
        {"params": [number], "rho": 0.01},
    ]

    def supply(step, params):
        return [torch.full(p.shape, value) for p, value in zip(params, (100.0, 1.0, 10.0), strict=True)]

    estimator = ScriptedEstimator(supply)
    optimizer = SophiaG(groups, lr=1e-3, betas=(0.0, 0.0), rho="auto", weight_decay=0, estimator=estimator)
    params = [steep, flat, number]
    before = [p.detach().clone() for p in params]
    set_gradients([*params, embedding], 0)
    optimizer.step()
    followed = torch.cat([p.grad.flatten() for p in params])
    h = torch.cat([torch.full((3000,), v) for v in (100.0, 1.0, 10.0)])
    rho = optimizer.stats()["rho"]
    assert_within_a_bin(rho, reference_rho(followed, h, 0.5))
    for p, start, r, value in zip(params, before, (rho, rho, 0.01), (100.0, 1.0, 10.0), strict=True):
        torch.testing.assert_close(p.detach(), start - 1e-3 * (p.grad / (r * value)).clamp(-1, 1), rtol=1e-5, atol=1e-7)
    unclipped = sum(
        int((p.grad.abs() < r * v).sum()) for p, r, v in zip(params, (rho, rho, 0.01), (100, 1, 10), strict=True)
    )
    assert optimizer.stats()["win_rate"] == pytest.approx(unclipped / 9000, abs=1e-3)


def test_it_resumes_exactly_with_rho_and_the_peak():
    def run(stop):
        params, optimizer = build(basis="eigen", nesterov=True)
        scheduler = cosine_after_warmup(optimizer)
        for step in range(20):
            if step == stop:
                saved = optimizer.state_dict(), scheduler.state_dict(), [p.detach().clone() for p in params]
                params, optimizer = build(basis="eigen", nesterov=True)
                scheduler = cosine_after_warmup(optimizer)
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
                for p, value in zip(params, saved[2], strict=True):
                    p.data.copy_(value)
            set_gradients(params, step)
            optimizer.step()
            scheduler.step()
        return params, optimizer.stats()["rho"], optimizer.progress.peak_lr

    (params, rho, peak), (again, *figures) = run(None), run(14)
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))
    assert figures == [rho, peak] and peak == 1e-3


def test_an_estimate_between_two_intervals_sets_rho_too():
    param = torch.nn.Parameter(normal(50))
    optimizer = SophiaG([param], rho="auto", betas=(0.0, 0.5), hessian_interval=4)
    rhos = []
    for step in range(4):
        param.grad = torch.ones(50) * (step + 1)
        if step in (1, 3):
            optimizer.update_hessian(2)
        optimizer.step()
        rhos.append(optimizer.stats()["rho"])
    assert rhos[0] == 0 and rhos[1] == rhos[2] and rhos[3] != rhos[1]
    assert_within_a_bin(rhos[1], 2 / (0.5 * 2 * 4))


def figures_of(h, grad, predictions=4, shape=None, **options):
    """`stats()` and the step taken after one step from 0 with lr 1, without decay."""
    shape = shape or (len(h),)
    param = torch.nn.Parameter(torch.zeros(shape))
    estimator = ScriptedEstimator(lambda step, params: [torch.tensor(h).view(shape)], predictions)
    defaults = dict(lr=1.0, betas=(0.0, 0.0), weight_decay=0.0)
    optimizer = SophiaG([param], **{**defaults, **options}, estimator=estimator)
    param.grad = torch.tensor(grad).view(shape)
    optimizer.step()
    return optimizer.stats(), param.detach()


def test_at_equality_a_coordinate_counts_as_clipped():
    stats, _ = figures_of([2.0, 2.0, 2.0, 2.0, 2.0], [1.0, -1.0, 0.999, -0.5, 1.5], rho=0.5)
    assert (stats["win_rate"], stats["curvature_share"], stats["rho"]) == (2 / 5, 1.0, 0.5)


def test_the_floor_counts_where_it_is_the_denominator():
    """ρh = 1, 0.25, 0.5 against ε = 0.5: with the floor as denominator a coordinate is measured by the floor."""
    stats, step = figures_of([2.0, 0.5, 1.0, 0.5, 0.5], [0.75, 0.4, 0.5, 0.5, -0.3], rho=0.5, eps=0.5)
    torch.testing.assert_close(step, -torch.tensor([0.75, 0.8, 1.0, 1.0, -0.6]))
    assert stats["win_rate"] == 3 / 5
    assert stats["curvature_share"] == 1 / 5, "at equality the floor is the denominator"


def test_the_noise_floor_counts_with_the_predictions_of_the_batch():
    """c √(h/N) = √(h/4): 1, 2, 0.5, 1.5 for ρh = 1, 4, 0.25, 2.25."""
    h = [4.0, 16.0, 1.0, 9.0]
    stats, step = figures_of(h, [1.0, 3.0, 0.4, -2.25], rho=0.25, noise_floor=1.0)
    torch.testing.assert_close(step, -torch.tensor([1.0, 0.75, 0.8, -1.0]))
    assert (stats["win_rate"], stats["curvature_share"]) == (2 / 4, 2 / 4)


def test_without_curvature_the_noise_floor_is_eps():
    h, grad = [0.0, 0.0, -4.0, 1.0, 4.0], [0.0, 0.25, 0.5, 0.1, 0.5]
    stats, step = figures_of(h, grad, rho=0.0, noise_floor=1.0, eps=0.5)
    torch.testing.assert_close(step, -torch.tensor([0.0, 0.5, 1.0, 0.2, 0.5]))
    assert (stats["win_rate"], stats["curvature_share"]) == (4 / 5, 0.0)
    _, step = figures_of(h, grad, rho=0.0, noise_floor=1.0)
    torch.testing.assert_close(step, -torch.tensor([0.0, 1.0, 1.0, 0.2, 0.5]))


def test_nesterov_is_what_is_measured():
    """With β₁ = ½ the first step follows ¾ g; ρh = ¾."""
    options = dict(betas=(0.5, 0.0), rho=0.5, nesterov=True)
    stats, step = figures_of([1.5] * 4, [1.0, -1.0, 0.9, 1.2], **options)
    torch.testing.assert_close(step, -torch.tensor([1.0, -1.0, 0.9, 1.0]))
    assert stats["win_rate"] == 1 / 4
    stats, _ = figures_of([1.5] * 4, [1.0, -1.0, 0.9, 1.2], **{**options, "nesterov": False})
    assert stats["win_rate"] == 1.0


def test_bias_correction_is_what_is_measured():
    """m = g/2 and h = ĥ/4 after one step: corrected they are g and ĥ."""
    options = dict(betas=(0.5, 0.75), rho=0.5)
    stats, _ = figures_of([2.0] * 4, [1.0, 0.75, 0.4, 0.1], bias_correction=True, **options)
    assert stats["win_rate"] == 3 / 4
    stats, _ = figures_of([2.0] * 4, [1.0, 0.75, 0.4, 0.1], **options)
    assert stats["win_rate"] == 2 / 4


def test_the_clip_in_the_basis_is_what_is_measured():
    """G = diag(3, 1, 2): in its eigenbasis diag(3, 2, 1) up to signs, of nine coordinates with ρh = 2."""
    grad = torch.diag(torch.tensor([3.0, 1.0, 2.0])).flatten().tolist()
    stats, step = figures_of([4.0] * 9, grad, shape=(3, 3), rho=0.5, basis="eigen")
    torch.testing.assert_close(step, -torch.diag(torch.tensor([1.0, 0.5, 1.0])))
    assert (stats["win_rate"], stats["curvature_share"]) == (7 / 9, 1.0)
    h = [4.0, 4.0, 4.0, 4.0, 8.0, 4.0, 4.0, 4.0, 4.0]
    stats, step = figures_of(h, grad, shape=(3, 3), rho=0.5, basis="eigen", eps=3.0)
    torch.testing.assert_close(step, -torch.diag(torch.tensor([1.0, 1 / 3, 0.5])))
    assert (stats["win_rate"], stats["curvature_share"]) == (8 / 9, 1 / 9)


def test_figures_stay_between_estimates():
    params, optimizer = build(rho=0.1)
    kept = []
    for step in range(7):
        set_gradients(params, step)
        optimizer.step()
        stats = optimizer.stats()
        kept.append((stats["win_rate"], stats["curvature_share"], tuple(stats["ratio_quantiles"])))
    assert kept[0] == kept[1] == kept[2] != kept[3] == kept[5] != kept[6]


def test_a_parameter_without_gradient_does_not_count():
    used, unused = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(6))
    estimator = ScriptedEstimator(lambda step, params: [torch.full(p.shape, 2.0) for p in params])
    optimizer = SophiaG([used, unused], rho=0.5, betas=(0.0, 0.0), estimator=estimator)
    used.grad = torch.tensor([0.5, 0.5, 0.5, 2.0])
    optimizer.step()
    assert optimizer.stats()["win_rate"] == 3 / 4
