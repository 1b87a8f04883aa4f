"""A momentum in bfloat16: rounded by chance, right in the mean, and the wide one's update until it is stored."""

import math

import pytest
import torch
from specification import ScriptedEstimator, random_curvature
from support import through_file

from sophia_integrations import SophiaG, SophiaH, param_groups
from sophia_integrations.optim import eager, native
from sophia_integrations.optim.rounding import momentum_seed, rounded_to_bfloat16
from sophia_integrations.optim.rule import Rule

pytestmark = pytest.mark.usefixtures("backend")
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.9), hessian_interval=2)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def neighbours(m):
    """The bfloat16 numbers next to `m` towards 0 and away from it, in float32."""
    towards = (m.view(torch.int32) & -0x10000).view(torch.float32)
    away = torch.where(towards == m, m, ((m.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32))
    return towards, away


def test_the_mean_over_steps_is_the_value():
    m, steps = normal(50_000), 300
    towards, away = neighbours(m)
    share = torch.zeros(m.shape)
    for step in range(steps):
        rounded = rounded_to_bfloat16(m, momentum_seed(step)).float()
        assert ((rounded == towards) | (rounded == away)).all()
        share += rounded == away
    expected = (m - towards) / (away - towards)
    error = share / steps - expected
    assert abs(error.mean()) < 4 * math.sqrt(1 / 6 / steps / m.numel())
    in_deviations = error / (expected * (1 - expected) / steps).sqrt().clamp_min(1e-3)
    assert in_deviations.square().mean() < 1.1 and in_deviations.abs().max() < 6


def test_neighbouring_values_and_steps_are_rounded_independently():
    halfway = torch.full((4096,), 1 + 2.0**-8)
    by_step = torch.stack([rounded_to_bfloat16(halfway[:1], momentum_seed(step)) for step in range(4096)]).flatten()
    by_value = rounded_to_bfloat16(
        halfway.view(torch.int32).add(torch.arange(4096) - 2048).int().view(torch.float32), 3
    )
    for rounded in (by_step, by_value):
        up = (rounded > 1).double() - 0.5
        assert abs(up.mean()) < 4 * 0.5 / 64
        assert abs((up[1:] * up[:-1]).mean()) < 4 * 0.25 / 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_bfloat16_has_stays(dtype):
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    rounded = rounded_to_bfloat16(every.to(dtype), 12345)
    assert torch.equal(rounded.view(torch.int16)[~every.isnan()], every.view(torch.int16)[~every.isnan()])
    assert rounded.isnan().equal(every.isnan())


@pytest.mark.parametrize("options", [{}, dict(nesterov=True, maximize=True, noise=0.2)], ids=["paper", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_update_is_the_wide_ones_and_its_momentum_is_rounded(backend, dtype, options):
    module = {"native": native, "eager": eager}[backend]
    shapes = [(300, 401), (7,), (0,), (), (65_537,)]
    params, grads = ([normal(*s, seed=i + k).to(dtype) for i, s in enumerate(shapes)] for k in (0, 10))
    exp_avgs, hessians = ([normal(*s, seed=i + k) for i, s in enumerate(shapes)] for k in (20, 30))
    grads[0].view(-1)[::7] = math.nan
    rule = Rule(1e-2, 0.9, 0.05, 1e-12, 0.1, **options, seed=momentum_seed(9))
    stored = [m.bfloat16() for m in exp_avgs]
    before = [m.clone() for m in stored]
    wide, other = [m.float() for m in stored], [p.clone() for p in params]
    counts = module.update(params, grads, stored, hessians, rule, True)
    assert torch.equal(counts, module.update(other, grads, wide, hessians, rule, True))
    for p, q, m, w in zip(params, other, stored, wide, strict=True):
        assert torch.equal(p, q) and m.dtype == torch.bfloat16
        assert torch.equal(m, rounded_to_bfloat16(w, rule.seed))
    assert torch.equal(stored[0].view(-1)[::7], before[0].view(-1)[::7])


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(9, 6)
        self.matrix = torch.nn.Linear(6, 10)


def build(make=SophiaG, basis="eigen", **options):
    torch.manual_seed(0)
    net = Net()
    groups = param_groups(net, basis=basis, **options)
    return net, make(groups, **OPTIONS, estimator=ScriptedEstimator(random_curvature))


def train(net, optimizer, first, last):
    for step in range(first, last):
        for i, p in enumerate(net.parameters()):
            p.grad = normal(*p.shape, seed=100 * step + i)
        optimizer.step()


def momentum(net, optimizer):
    return optimizer.state[net.matrix.weight]["exp_avg"]


@pytest.mark.parametrize("make", [SophiaG, SophiaH])
@pytest.mark.parametrize("basis", [None, "eigen"])
def test_training_follows_the_wide_momentum(make, basis):
    net, optimizer = build(make, basis, momentum_dtype="bfloat16")
    other, wide = build(make, basis)
    train(net, optimizer, 0, 30)
    train(other, wide, 0, 30)
    narrow, kept = momentum(net, optimizer), momentum(other, wide)
    assert narrow.dtype == torch.bfloat16 and kept.dtype == torch.float32
    assert optimizer.state[net.matrix.weight]["hessian"].dtype == torch.float32
    assert optimizer.state[net.embed.weight]["exp_avg"].dtype == torch.float32, "AdamW's"
    assert 0 < (narrow.float() - kept).abs().max() < 2**-6 * kept.abs().max()
    torch.testing.assert_close(net.matrix.weight, other.matrix.weight, rtol=0, atol=2e-2)


def test_changes_too_small_for_the_nearest_are_not_lost():
    """From 1 towards 1.1 by 0.001 a step, where bfloat16's numbers lie 0.0078 apart."""
    weight = torch.nn.Parameter(torch.zeros(20_000))
    optimizer = SophiaG([weight], lr=0.0, betas=(0.99, 0.9), momentum_dtype="bfloat16", weight_decay=0.0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.state[weight]["exp_avg"].fill_(1.0)
    weight.grad.fill_(1.1).add_(normal(20_000) * 0.05)  # as equal values are rounded alike
    expected = 1 + (weight.grad.double().mean().item() - 1) * (1 - 0.99**8)
    for _ in range(8):
        optimizer.step()
    mean = optimizer.state[weight]["exp_avg"].double().mean().item()
    assert expected > 1.007 and mean == pytest.approx(expected, abs=4 * 0.004 * math.sqrt(8 / 20_000))


@pytest.mark.parametrize("stop", [1, 5])
def test_resume_is_bit_exact(stop):
    net, whole = build(momentum_dtype="bfloat16")
    train(net, whole, 0, 9)
    first, optimizer = build(momentum_dtype="bfloat16")
    train(first, optimizer, 0, stop)
    saved = through_file({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    other, resumed = build(momentum_dtype="bfloat16")
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert momentum(other, resumed).dtype == torch.bfloat16
    train(other, resumed, stop, 9)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    assert torch.equal(momentum(net, whole), momentum(other, resumed))


@pytest.mark.parametrize(("then", "now"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_checkpoints_dtype_replaces_the_one_asked_for(then, now):
    net, optimizer = build(momentum_dtype=then)
    train(net, optimizer, 0, 3)
    other, resumed = build(momentum_dtype=now)
    with pytest.warns(UserWarning, match=rf"momentum_dtype={then} \(you asked for {now}\)"):
        resumed.load_state_dict(optimizer.state_dict())
    assert momentum(other, resumed).dtype == getattr(torch, then)
    train(other, resumed, 3, 4)


def test_a_checkpoint_from_before_there_was_a_choice_goes_on_in_float32():
    net, optimizer = build()
    train(net, optimizer, 0, 3)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["momentum_dtype"]
    other, resumed = build(momentum_dtype="bfloat16")
    resumed.load_state_dict(saved)
    assert torch.equal(momentum(other, resumed), momentum(net, optimizer))
    train(other, resumed, 3, 4)


def test_rho_by_itself_and_the_figures_are_had():
    net, optimizer = build(momentum_dtype="bfloat16", rho="auto")
    train(net, optimizer, 0, 5)
    stats = optimizer.stats()
    assert stats["rho"] > 0 and 0 < stats["win_rate"] < 1 and len(stats["ratio_quantiles"]) == 9


def test_another_dtype_is_refused():
    for given in ("bf16", torch.bfloat16, None):
        with pytest.raises(ValueError, match="momentum_dtype must be 'float32' or 'bfloat16', got "):
            SophiaG([torch.nn.Parameter(torch.zeros(3))], momentum_dtype=given)
