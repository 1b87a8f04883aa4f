"""Checkpoints: exact resume from nothing but the state dict, old files upgraded, foreign files refused."""

import copy
import pickle

import pytest
import torch
from support import as_an_older_version_wrote_it, through_file

from sophia_integrations import GaussNewtonBartlett, SophiaG

pytestmark = pytest.mark.usefixtures("backend")

HALF = 7


def build(curvature, scripted, dtype=torch.bfloat16, **options):
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in [(300, 250), (17,), ()]]
    groups = [dict(params=params[:1]), dict(params=params[1:], weight_decay=0.0)]
    defaults = dict(lr=1e-2, betas=(0.9, 0.9), rho=0.05, hessian_interval=5)
    return params, SophiaG(groups, **{**defaults, **options}, estimator=scripted(curvature.supply))


def train(params, optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def trained_state(optimizer_type, params, **options):
    optimizer = optimizer_type([{"params": params[:1]}, {"params": params[1:]}], lr=1e-3, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_resume_is_bit_exact_in_the_middle_of_an_interval(dtype, curvature, scripted):
    straight, whole = build(curvature, scripted, dtype)
    train(straight, whole, 0, 2 * HALF)

    first, optimizer = build(curvature, scripted, dtype)
    train(first, optimizer, 0, HALF)
    saved = through_file({"params": [p.detach() for p in first], "optimizer": optimizer.state_dict()})
    second, resumed = build(curvature, scripted, dtype)
    resumed.load_state_dict(state_dict=saved["optimizer"])
    assert resumed.estimator.armed == [True, False], "the constructor arms it, the checkpoint says not yet"
    with torch.no_grad():
        for p, value in zip(second, saved["params"], strict=True):
            p.copy_(value)
    train(second, resumed, HALF, 2 * HALF)

    assert optimizer.estimator.asked + resumed.estimator.asked == whole.estimator.asked == [0, 5, 10]
    for p, q in zip(straight, second, strict=True):
        assert torch.equal(p, q)
        for key in ("exp_avg", "hessian"):
            assert whole.state[p][key].dtype == resumed.state[q][key].dtype
            assert torch.equal(whole.state[p][key], resumed.state[q][key])
    assert whole.progress == resumed.progress
    assert (whole.progress.step, whole.progress.hessian_updates, whole.progress.hessian_skipped) == (14, 3, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_state_is_float32_for_low_precision_parameters(dtype, curvature, scripted):
    params, optimizer = build(curvature, scripted, dtype)
    train(params, optimizer, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    for i, p in enumerate(params):
        assert set(optimizer.state[p]) == set(saved["state"][i]) == {"exp_avg", "hessian", "progress"}
        for key in ("exp_avg", "hessian"):
            value = optimizer.state[p][key]
            assert value.dtype == torch.float32 and torch.equal(value, saved["state"][i][key])


def test_a_loaded_state_is_a_copy_in_the_parameters_layout(curvature, scripted):
    params, optimizer = build(curvature, scripted, torch.float32)
    train(params, optimizer, 0, 1)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    other_params, other = build(curvature, scripted, torch.float32)
    other_params[0].data = other_params[0].data.t().contiguous().t()
    other.load_state_dict(optimizer.state_dict())
    assert other.state[other_params[0]]["hessian"].stride() == other_params[0].stride()
    train(other_params, other, 1, 3)
    for i, p in enumerate(params):
        for key in ("exp_avg", "hessian"):
            assert torch.equal(optimizer.state[p][key], before[i][key])


def test_an_older_checkpoint_gets_todays_defaults(curvature, scripted):
    params, optimizer = build(curvature, scripted)
    train(params, optimizer, 0, 3)
    saved = as_an_older_version_wrote_it(optimizer.state_dict())
    missing = ("eps", "maximize", "hessian_interval")
    for group in saved["param_groups"]:
        for key in (*missing, "step", "hessian_updates", "hessian_skipped"):
            del group[key]
    params, resumed = build(curvature, scripted, eps=1e-8, hessian_interval=4)
    resumed.load_state_dict(saved)
    for group in resumed.param_groups:
        assert [group[key] for key in missing] == [1e-8, False, 4]
    assert (resumed.progress.step, resumed.progress.hessian_updates, resumed.progress.hessian_skipped) == (0, 0, 0)
    train(params, resumed, 0, 5)
    assert resumed.estimator.asked == [0, 4]


@pytest.mark.parametrize(
    "optimizer_type, options, message",
    [
        (torch.optim.AdamW, {}, r"by Adam or AdamW \(it has exp_avg_sq and no hessian\).*Load the weights only"),
        (torch.optim.Adam, {"amsgrad": True}, "written by Adam or AdamW"),
        (torch.optim.SGD, {"momentum": 0.9}, "optimizer state without 'hessian': it is not one of Sophia"),
    ],
)
def test_the_checkpoint_of_another_optimizer_is_refused(optimizer_type, options, message, curvature, scripted):
    params, optimizer = build(curvature, scripted)
    foreign = trained_state(optimizer_type, params, **options)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign)
    assert optimizer.state_dict() == before


def test_the_official_checkpoint_is_refused_with_the_way_to_convert_it(official, curvature, scripted):
    params, optimizer = build(curvature, scripted, torch.float32)
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}]
    theirs = official.SophiaG(groups, betas=(0.9, 0.9), rho=0.05)
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    theirs.update_hessian()
    theirs.step(bs=6)
    saved = copy.deepcopy(theirs.state_dict())
    with pytest.raises(ValueError, match=r"written by the official SophiaG.*multiply every 'hessian' by the bs"):
        optimizer.load_state_dict(saved)
    for state in saved["state"].values():
        state["hessian"] *= 6
        del state["step"]
    for group in saved["param_groups"]:
        del group["capturable"]
    optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.state[params[1]]["hessian"], torch.full((17,), 0.1 * 4 * 6))
    train(params, optimizer, 0, 2)


def test_the_checkpoint_of_another_model_is_refused(curvature, scripted):
    params, optimizer = build(curvature, scripted)
    train(params, optimizer, 0, 1)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        SophiaG(params, betas=(0.9, 0.9), hessian_interval=5).load_state_dict(optimizer.state_dict())
    saved = optimizer.state_dict()
    saved["state"][1]["hessian"] = saved["state"][1]["hessian"][:1]
    _, other = build(curvature, scripted)
    with pytest.raises(ValueError, match=r"hessian of parameter 1 has shape \(1,\), the parameter \(17,\)"):
        other.load_state_dict(saved)
    assert not other.state


def test_changed_hyperparameters_are_replaced_with_a_warning(curvature, scripted):
    params, optimizer = build(curvature, scripted)
    train(params, optimizer, 0, 2)
    _, resumed = build(curvature, scripted, rho=0.1, hessian_interval=3, lr=5e-3)
    expected = r"rho=0\.05 \(you asked for 0\.1\); hessian_interval=5 \(you asked for 3\)"
    with pytest.warns(UserWarning, match=expected) as caught:
        resumed.load_state_dict(optimizer.state_dict())
    assert len(caught) == 1 and caught[0].filename == __file__
    assert resumed.param_groups[0]["rho"] == 0.05 and resumed.param_groups[0]["lr"] == 1e-2


def test_betas_saved_as_a_list_are_not_a_change(curvature, scripted):
    _, optimizer = build(curvature, scripted)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["betas"] = list(group["betas"])
    optimizer.load_state_dict(saved)


CLONES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
def test_copies_of_model_and_optimizer_train_on_alike(clone):
    model, optimizer = small()
    go_on(model, optimizer, HALF)
    twin_model, twin = clone((model, optimizer))
    assert twin.estimator.model is twin_model and twin.stats()["hessian_seconds"] == 0
    go_on(model, optimizer, HALF)
    go_on(twin_model, twin, HALF)
    assert twin.stats()["hessian_updates"] == optimizer.stats()["hessian_updates"] == 3
    assert twin.progress == optimizer.progress and twin.progress is not optimizer.progress
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p]["hessian"], twin.state[q]["hessian"])


def test_an_optimizer_pickled_by_an_older_version_trains_on_alike():
    model, optimizer = small()
    go_on(model, optimizer, HALF)
    older = optimizer.__getstate__()
    counters = vars(older.pop("progress"))
    older["defaults"] = {**older["defaults"], **dict.fromkeys(counters, 0)}
    older["param_groups"] = [{**group, **counters} for group in older["param_groups"]]
    twin_model, older = copy.deepcopy((model, older))
    twin = SophiaG.__new__(SophiaG)
    twin.__setstate__(older)
    assert twin.progress == optimizer.progress and not set(counters) & set(twin.param_groups[0])
    go_on(model, optimizer, HALF)
    go_on(twin_model, twin, HALF)
    assert twin.progress == optimizer.progress
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin_model.parameters(), strict=True))


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
@pytest.mark.filterwarnings("ignore:Sophia made no Hessian estimate")
def test_a_copy_without_its_model_says_so_and_then_stops(clone):
    model, optimizer = small()
    go_on(model, optimizer, HALF)
    twin = clone(optimizer)
    stranger = torch.nn.Linear(4, 3)
    twin.param_groups[0]["params"][:] = stranger.parameters()
    with pytest.raises((RuntimeError, ValueError), match="was not called in training mode|no parameter of the Linear"):
        go_on(stranger, twin, 30)


def test_an_estimator_that_cannot_be_pickled_stays_behind():
    model, optimizer = small()
    model.secret = lambda: None
    go_on(model, optimizer, 1)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.estimator is None and optimizer.estimator is not None
    assert copy.deepcopy((model, optimizer))[1].estimator is not None


def small():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return model, SophiaG(model.parameters(), lr=1e-2, hessian_interval=5, estimator=GaussNewtonBartlett(model))


def go_on(model, optimizer, steps):
    for _ in range(steps):
        generator = torch.Generator().manual_seed(optimizer.progress.step)
        x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_distributed_checkpoint_state_dicts_round_trip(curvature, scripted):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def build_linear():
        model = torch.nn.Linear(6, 5, bias=False).bfloat16()
        return model, SophiaG(model.parameters(), hessian_interval=3, estimator=scripted(curvature.supply))

    model, optimizer = build_linear()
    train([model.weight], optimizer, 0, 4)
    other, resumed = build_linear()
    weight = other.weight.detach().clone()
    set_optimizer_state_dict(other, resumed, get_optimizer_state_dict(model, optimizer))
    assert torch.equal(other.weight, weight)
    assert resumed.progress.step == 4 and resumed.estimator.armed[-1] is False
    for key in ("exp_avg", "hessian"):
        assert torch.equal(resumed.state[other.weight][key], optimizer.state[model.weight][key])


def test_a_group_added_later_joins_the_schedule(curvature, scripted):
    params, optimizer = build(curvature, scripted)
    train(params, optimizer, 0, 6)
    late = torch.nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [late], "lr": 0.5, "step": 99})
    assert "step" not in optimizer.param_groups[-1] and optimizer.progress.step == 6
    train([*params, late], optimizer, 6, 11)
    assert optimizer.estimator.asked == [0, 5, 10]
    assert (optimizer.state[late]["hessian"] > 0).all()
    assert optimizer.progress.step == 11


@pytest.mark.parametrize(
    "group",
    [
        {"params": [torch.nn.Parameter(torch.ones(2))], "rho": -1.0},
        {"params": [torch.nn.Parameter(torch.ones(2))], "hessian_interval": 6},
        {"params": [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=torch.cfloat))]},
    ],
)
def test_a_bad_group_leaves_the_optimizer_as_it_was(group, curvature, scripted):
    params, optimizer = build(curvature, scripted)
    train(params, optimizer, 0, 1)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError):
        optimizer.add_param_group(group)
    assert optimizer.state_dict()["param_groups"] == before
    train(params, optimizer, 1, 3)
