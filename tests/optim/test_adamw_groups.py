"""Groups with update="adamw": torch's fused AdamW bit for bit, beside Sophia's and through every checkpoint."""

import copy
import io
import math

import pytest
import torch
from specification import ScriptedEstimator, random_curvature
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from sophia_integrations import SophiaG

SHAPES = [(13, 7), (70_001,), (), (2, 3, 4)]


def tensors(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def pair(dtype=torch.float32, **options):
    """(parameters, SophiaG with them in an AdamW group beside a matrix), (copies, torch.optim.AdamW)."""
    ours, theirs, matrix = tensors(dtype), tensors(dtype), torch.nn.Parameter(torch.ones(4, 4))
    groups = [{"params": [matrix], "basis": "eigen"}, {"params": ours, "update": "adamw", **options}]
    optimizer = SophiaG(groups, lr=1e-2, estimator=ScriptedEstimator(random_curvature))
    return (ours, optimizer, matrix), (
        theirs,
        torch.optim.AdamW(theirs, fused=True, **{"lr": 1e-2, "weight_decay": 0.1, **options}),
    )


def assert_bit_equal(ours, optimizer, theirs, adamw):
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert set(optimizer.state[p]) == {*adamw.state[q], "progress"}
        for key, value in adamw.state[q].items():
            assert optimizer.state[p][key].dtype == value.dtype and torch.equal(optimizer.state[p][key], value), key


CHOICES = {
    "defaults": {},
    "betas and eps": dict(betas=(0.8, 0.98), eps=1e-6),
    "no decay": dict(weight_decay=0.0),
    "ascent": dict(maximize=True),
    "a tensor as lr": dict(lr=torch.tensor(3e-3)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
def test_bit_equal_to_torch(options, dtype):
    (ours, optimizer, matrix), (theirs, adamw) = pair(dtype, **options)
    for step in range(12):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        set_gradients([matrix], step)
        optimizer.step()
        adamw.step()
    assert_bit_equal(ours, optimizer, theirs, adamw)
    assert not torch.equal(matrix.detach(), torch.ones(4, 4))


SCHEDULES = {
    "cosine": lambda optimizer: LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(t / 7))),
    "one cycle, momentum too": lambda optimizer: OneCycleLR(optimizer, max_lr=1e-2, total_steps=20),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bit_equal_under_schedules_that_touch_every_group(dtype, schedule):
    (ours, optimizer, matrix), (theirs, adamw) = pair(dtype)
    schedulers = [schedule(optimizer), schedule(adamw)]
    for step in range(15):
        for params in (ours, theirs, [matrix]):
            set_gradients(params, step)
        optimizer.step()
        adamw.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_bit_equal(ours, optimizer, theirs, adamw)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == {adamw.param_groups[0]["lr"]} != {1e-2}


def test_parameters_without_gradient_have_no_state_and_stay():
    (ours, optimizer, matrix), (theirs, adamw) = pair()
    for step in range(3):
        set_gradients(ours[:2], step)
        set_gradients(theirs[:2], step)
        set_gradients([matrix], step)
        optimizer.step()
        adamw.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert not any(optimizer.state.get(p) for p in ours[2:])


def test_a_parameter_with_a_non_finite_gradient_waits_and_the_others_go_on():
    (ours, optimizer, matrix), (theirs, adamw) = pair()
    for step in range(4):
        for params in (ours, theirs, [matrix]):
            set_gradients(params, step)
        if step in (1, 3):
            ours[1].grad[5], ours[1].grad[7], theirs[1].grad = math.nan, math.inf, None
        with pytest.warns(UserWarning, match="2 gradient coordinates were not finite") if step == 1 else no_context():
            optimizer.step()
        adamw.step()
    assert_bit_equal(ours, optimizer, theirs, adamw)
    assert optimizer.stats()["nonfinite_gradients"] == 4


def test_all_gradients_non_finite_changes_nothing():
    (ours, optimizer, matrix), _ = pair()
    set_gradients([*ours, matrix], 0)
    for p in ours:
        p.grad.fill_(math.nan)
    with pytest.warns(UserWarning, match="70117 gradient coordinates were not finite"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, tensors(), strict=True))


def test_large_finite_gradients_are_not_taken_for_non_finite_ones():
    (ours, optimizer, matrix), (theirs, adamw) = pair()
    for params in (ours, theirs, [matrix]):
        for p in params:
            p.grad = torch.full_like(p, 1e37)
    optimizer.step()
    adamw.step()
    assert_bit_equal(ours, optimizer, theirs, adamw)


def no_context():
    return torch.enable_grad()


def through_file(obj):
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_state_dict_is_the_whole_state_and_loading_copies_it(dtype):
    (ours, optimizer, matrix), (theirs, adamw) = pair(dtype)
    for step in range(300):
        for params in (ours[2:], theirs[2:], [matrix]):
            set_gradients(params, step)
        optimizer.step()
        adamw.step()
    assert optimizer.state[ours[2]]["step"] == 300, "more than bfloat16 can count"
    saved = through_file(optimizer.state_dict())
    (again, resumed, other), _ = pair(dtype)
    with torch.no_grad():
        for p, q in zip([*again, other], [*ours, matrix], strict=True):
            p.copy_(q)
    resumed.load_state_dict(saved)
    kept = copy.deepcopy(saved)
    for step in range(300, 305):
        for params in (again[2:], theirs[2:], [other]):
            set_gradients(params, step)
        resumed.step()
        adamw.step()
    assert all(torch.equal(p, q) for p, q in zip(again, theirs, strict=True))
    for i, state in kept["state"].items():
        assert all(torch.equal(saved["state"][i][key], value) for key, value in state.items()), "training left the file"


def test_adamw_has_its_own_defaults_unless_the_group_says_otherwise():
    params = tensors(shapes=[(3,), (3,), (4, 4)])
    groups = [
        {"params": params[:1], "update": "adamw"},
        {"params": params[1:2], "update": "adamw", "betas": (0.7, 0.8), "eps": 1e-5, "lr": 0.5},
        {"params": params[2:]},
    ]
    optimizer = SophiaG(groups, lr=0.1, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3)
    chosen = [(g["betas"], g["eps"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert chosen == [((0.9, 0.999), 1e-8, 0.1, 0.3), ((0.7, 0.8), 1e-5, 0.5, 0.3), ((0.5, 0.6), 1e-3, 0.1, 0.3)]


def test_adamw_alone_needs_no_estimate_of_its_own(curvature):
    """The estimator is asked for Sophia's parameters only, and update_hessian leaves AdamW's alone."""
    (ours, optimizer, matrix), _ = pair()
    set_gradients([*ours, matrix], 0)
    optimizer.step()
    assert [t.shape for t in optimizer.estimator.theta[0]] == [(4, 4)]
    optimizer.update_hessian(4)
    assert all("hessian" not in optimizer.state[p] for p in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grad_scaler_and_clipping(dtype):
    """A step with an overflow is skipped whole: both rules, factors and counters stay."""
    (ours, optimizer, matrix), (theirs, adamw) = pair(dtype)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100) for _ in range(2)]
    for step in range(6):
        for params, own, scaler in ((ours, optimizer, scalers[0]), (theirs, adamw, scalers[1])):
            set_gradients(params, step)
            for p in params:
                p.grad *= 8
            if step == 2:
                params[0].grad[0, 0] = math.inf
            if params is ours:
                matrix.grad = torch.zeros(4, 4)
            scaler.scale(torch.ones(()))
            scaler.unscale_(own)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            before = copy.deepcopy(own.state_dict()) if step == 2 else None
            scaler.step(own)
            scaler.update()
            if before is not None and params is ours:
                after = own.state_dict()
                assert after["param_groups"] == before["param_groups"]
                same = (torch.equal(after["state"][i][k], v) for i, s in before["state"].items() for k, v in s.items())
                assert all(same)
    assert_bit_equal(ours, optimizer, theirs, adamw)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 4.0
    assert optimizer.progress.step == 5
