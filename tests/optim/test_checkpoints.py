"""Two rules, a basis and ρ by itself through every kind of checkpoint: bit for bit, or refused in one sentence."""

import copy
import dataclasses
import functools
import pickle
import re

import pytest
import torch
from specification import ScriptedEstimator, random_curvature
from support import as_an_older_version_wrote_it, run_worker, through_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import OneCycleLR

from sophia_integrations import SophiaG

pytestmark = pytest.mark.usefixtures("backend")

STEPS = 14
EIGEN = dict(
    basis="eigen", rho="auto", nesterov=True, bias_correction=True, noise_floor=0.1, basis_interval=3, basis_warmup=2
)


class Net(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = torch.nn.Embedding(9, 6, dtype=dtype)
        self.matrix = torch.nn.Linear(6, 10, dtype=dtype)
        self.experts = torch.nn.Parameter(torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)).to(dtype))
        self.scale = torch.nn.Parameter(torch.ones((), dtype=dtype))


def build(dtype=torch.float32, adamw=None, **options):
    torch.manual_seed(0)
    net = Net(dtype)
    matrices = [net.matrix.weight, net.experts]
    others = [net.embed.weight, net.matrix.bias, net.scale]
    sophia = {"params": matrices, **EIGEN, **options}
    groups = [sophia, {"params": others, "update": "adamw", **(adamw or {})}]
    return net, SophiaG(
        groups, lr=1e-2, betas=(0.9, 0.9), hessian_interval=5, estimator=ScriptedEstimator(random_curvature)
    )


def train(net, optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    optimizer.zero_grad()


def assert_same_groups(groups, resumed):
    for group, again in zip(groups, resumed, strict=True):
        assert not {k: (v, again[k]) for k, v in group.items() if not k.startswith("param") and v != again[k]}


def assert_same_training(net, optimizer, other, resumed):
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert set(optimizer.state[p]) == set(resumed.state[q])
        for key, value in optimizer.state[p].items():
            assert value.dtype == resumed.state[q][key].dtype and torch.equal(value, resumed.state[q][key]), (name, key)
    assert_same_groups(optimizer.param_groups, resumed.param_groups)
    assert optimizer.progress == resumed.progress
    same = ("win_rate", "curvature_share", "rho", "hessian_age", "hessian_updates", "hessian_skipped")
    assert [optimizer.stats()[k] for k in same] == [resumed.stats()[k] for k in same]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("stop", [1, 4, 7, 10], ids="after {}".format)
def test_resume_is_bit_exact_wherever_it_stops(stop, dtype):
    net, whole = build(dtype)
    train(net, whole, 0, STEPS)
    first, optimizer = build(dtype)
    train(first, optimizer, 0, stop)
    saved = through_file({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    other, resumed = build(dtype)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, stop, STEPS)
    assert_same_training(net, whole, other, resumed)
    assert set(whole.state[net.matrix.weight]) == {
        *("exp_avg", "hessian", "progress"),
        *(f"{side}_{what}" for side in ("left", "right") for what in ("factor", "basis")),
    }


def test_a_loaded_state_is_a_copy():
    net, optimizer = build()
    train(net, optimizer, 0, 4)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    other, resumed = build()
    resumed.load_state_dict(saved)
    train(other, resumed, 4, 12)
    assert all(torch.equal(saved["state"][i][k], v) for i, state in before.items() for k, v in state.items())


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_distributed_checkpoint_state_dicts_round_trip(flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, whole = build(torch.bfloat16)
    train(net, whole, 0, STEPS)
    first, optimizer = build(torch.bfloat16)
    train(first, optimizer, 0, 7)
    saved = through_file(get_optimizer_state_dict(first, optimizer, options=options))
    other, resumed = build(torch.bfloat16)
    other.load_state_dict(first.state_dict())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    train(other, resumed, 7, STEPS)
    assert_same_training(net, whole, other, resumed)


def by_state_dict(first, optimizer, other, resumed):
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    return resumed


def by_distributed(first, optimizer, other, resumed, **options):
    options = StateDictOptions(**options)
    saved = through_file(get_optimizer_state_dict(first, optimizer, options=options))
    set_optimizer_state_dict(other, resumed, saved, options=options)
    return resumed


ROADS = {
    "state dict": by_state_dict,
    "distributed": by_distributed,
    "flattened": functools.partial(by_distributed, flatten_optimizer_state_dict=True),
    "on the host": functools.partial(by_distributed, cpu_offload=True),
    "deepcopy": lambda first, optimizer, *_: copy.deepcopy(optimizer),
    "pickle": lambda first, optimizer, *_: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("road", ROADS.values(), ids=ROADS)
def test_every_number_of_the_progress_arrives(road):
    net, optimizer = build()
    train(net, optimizer, 0, 2)
    for i, field in enumerate(dataclasses.fields(optimizer.progress)):
        setattr(
            optimizer.progress, field.name, field.default + 7 + i + (0.1 if isinstance(field.default, float) else 0)
        )
    arrived = road(net, optimizer, *build()).progress
    assert arrived == optimizer.progress and arrived is not optimizer.progress
    assert list(map(type, vars(arrived).values())) == list(map(type, vars(optimizer.progress).values()))


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")
def test_a_distributed_checkpoint_on_disk(tmp_path):
    import torch.distributed.checkpoint as checkpoint

    net, whole = build()
    train(net, whole, 0, STEPS)
    first, optimizer = build()
    train(first, optimizer, 0, 7)
    saved = {"model": first.state_dict(), "optimizer": get_optimizer_state_dict(first, optimizer)}
    checkpoint.save(saved, checkpoint_id=tmp_path / "step 7")
    other, resumed = build()
    template = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, resumed)}
    checkpoint.load(template, checkpoint_id=tmp_path / "step 7")
    other.load_state_dict(template["model"])
    set_optimizer_state_dict(other, resumed, template["optimizer"])
    train(other, resumed, 7, STEPS)
    assert_same_training(net, whole, other, resumed)


NEW_KEYS = """update nesterov bias_correction noise_floor unclipped basis basis_interval basis_warmup basis_beta
basis_factor_interval basis_max_dim basis_flatten
hessian_step batch_predictions auto_rho peak_lr win_rate curvature_share""".split()


@pytest.mark.parametrize("distributed", [False, True], ids=["state dict", "distributed checkpoint"])
def test_a_checkpoint_with_counters_in_its_groups_resumes_bit_exactly(distributed):
    net, whole = build()
    train(net, whole, 0, STEPS)
    first, optimizer = build()
    train(first, optimizer, 0, 7)
    saved = get_optimizer_state_dict(first, optimizer) if distributed else optimizer.state_dict()
    saved = as_an_older_version_wrote_it(through_file(saved))
    other, resumed = build()
    other.load_state_dict(first.state_dict())
    if distributed:
        set_optimizer_state_dict(other, resumed, saved)
    else:
        resumed.load_state_dict(saved)
    assert not any(key in group for group in resumed.param_groups for key in vars(resumed.progress))
    train(other, resumed, 7, STEPS)
    assert_same_training(net, whole, other, resumed)


def test_a_flattened_checkpoint_with_counters_in_its_groups_is_refused():
    """torch.distributed.checkpoint hands on no key of a group that the group in memory does not have."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    net, optimizer = build()
    train(net, optimizer, 0, 7)
    saved = get_optimizer_state_dict(net, optimizer, options=flat)
    older = {key: value for key, value in saved.items() if not key.endswith(".progress")}
    other, resumed = build()
    with pytest.raises(ValueError, match=r"counters of the run are lost.* without flatten_optimizer_state_dict: save"):
        set_optimizer_state_dict(other, resumed, older, options=flat)
    assert resumed.progress.step == 1, "torch's own step, which creates the state"


def test_a_state_that_was_not_saved_by_state_dict_is_refused():
    net, optimizer = build()
    train(net, optimizer, 0, 7)
    saved = optimizer.state_dict()
    saved["state"] = {
        i: optimizer.state[p] for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])
    }
    _, resumed = build()
    with pytest.raises(ValueError, match=r"save optimizer.state_dict\(\), and not what is in optimizer.state"):
        resumed.load_state_dict(saved)
    assert not resumed.state and resumed.progress.step == 0


def test_a_state_dict_keeps_the_progress_of_its_moment_and_hooks_see_it():
    net, optimizer = build()
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(saved["state"][0]["progress"].clone()))
    train(net, optimizer, 0, 3)
    saved = optimizer.state_dict()
    train(net, optimizer, 3, 6)
    optimizer.state_dict()
    assert [int(values[0]) for values in seen] == [3, 6] and int(saved["state"][0]["progress"][0]) == 3
    assert len(optimizer._optimizer_state_dict_post_hooks) == 1


def test_groups_saved_before_there_were_two_rules_load_and_train_on_alike():
    def plain():
        torch.manual_seed(0)
        net = Net()
        return net, SophiaG(
            net.parameters(), lr=1e-2, hessian_interval=5, estimator=ScriptedEstimator(random_curvature)
        )

    net, whole = plain()
    train(net, whole, 0, STEPS)
    first, optimizer = plain()
    train(first, optimizer, 0, 7)
    saved = as_an_older_version_wrote_it(optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in NEW_KEYS:
            del group[key]
    other, resumed = plain()
    other.load_state_dict(first.state_dict())
    resumed.load_state_dict(saved)
    train(other, resumed, 7, STEPS)
    for (name, p), q in zip(net.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name
    with pytest.raises(
        ValueError, match="the checkpoint was written with basis=None, and this optimizer has basis='eig"
    ):
        matrix = torch.nn.Linear(6, 5, bias=False)
        older = SophiaG(matrix.parameters(), estimator=ScriptedEstimator(random_curvature))
        matrix.weight.grad = torch.ones(5, 6)
        older.step()
        saved = as_an_older_version_wrote_it(older.state_dict())
        for key in NEW_KEYS:
            del saved["param_groups"][0][key]
        SophiaG(matrix.parameters(), basis="eigen").load_state_dict(saved)


FOREIGN = {
    "no basis": (dict(basis=None), "basis=None, and this optimizer has basis='eigen'"),
    "another cap": (dict(basis_max_dim=5), "basis_max_dim=5, and this optimizer has basis_max_dim=None"),
    "flattened": (dict(basis_flatten=True), "basis_flatten=True, and this optimizer has basis_flatten=False"),
}


@pytest.mark.parametrize(("options", "message"), FOREIGN.values(), ids=FOREIGN)
def test_a_checkpoint_from_another_basis_is_refused_and_nothing_lost(options, message):
    net, optimizer = build(**options)
    train(net, optimizer, 0, 3)
    other, ours = build()
    train(other, ours, 0, 2)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(
        ValueError, match=re.escape(f"the checkpoint was written with {message}, with another state: build")
    ):
        ours.load_state_dict(optimizer.state_dict())
    assert_equal_states(ours.state_dict(), before)
    train(other, ours, 2, 4)


def assert_equal_states(state, before):
    assert state["param_groups"] == before["param_groups"]
    assert all(torch.equal(state["state"][i][k], v) for i, s in before["state"].items() for k, v in s.items())


def test_a_checkpoint_from_another_rule_is_refused_either_way():
    def one(update):
        param = torch.nn.Parameter(torch.ones(4, 4))
        optimizer = SophiaG(
            [{"params": [param], "update": update}, {"params": [torch.nn.Parameter(torch.ones(2))]}],
            estimator=ScriptedEstimator(random_curvature),
        )
        param.grad = torch.ones(4, 4)
        optimizer.step()
        return optimizer

    sophia, adamw = one("sophia"), one("adamw")
    for here, there, names in ((sophia, adamw, ("adamw", "sophia")), (adamw, sophia, ("sophia", "adamw"))):
        before = copy.deepcopy(here.state_dict())
        expected = "written with update='{}', and this optimizer has update='{}'".format(*names)
        with pytest.raises(ValueError, match=expected):
            here.load_state_dict(there.state_dict())
        assert_equal_states(here.state_dict(), before)


def test_a_basis_of_another_shape_is_refused():
    net, optimizer = build()
    train(net, optimizer, 0, 1)
    saved = optimizer.state_dict()
    saved["state"][0]["left_factor"] = torch.zeros(1, 3, 3)
    _, other = build()
    with pytest.raises(ValueError, match=r"left_factor of parameter 0 has shape \(1, 3, 3\), the parameter \(10, 6\)"):
        other.load_state_dict(saved)
    assert not other.state


def test_changed_options_of_the_basis_are_warned_about():
    net, optimizer = build()
    train(net, optimizer, 0, 2)
    _, other = build(rho=0.1, nesterov=False, basis_beta=0.9, unclipped=(0.5, 0.2))
    with pytest.warns(
        UserWarning, match="rho=auto .you asked for 0.1.; nesterov=True .you asked for False.; unclipped="
    ):
        other.load_state_dict(optimizer.state_dict())


def test_resuming_under_one_cycle_says_nothing_of_betas():
    """pytest makes every warning an error."""
    net, optimizer = build()
    scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
    for step in range(7):
        train(net, optimizer, step, step + 1)
        scheduler.step()
    assert optimizer.param_groups[0]["betas"][0] != 0.9
    other, resumed = build()
    OneCycleLR(resumed, max_lr=1e-2, total_steps=20)
    resumed.load_state_dict(optimizer.state_dict())
    fresh = build()[1]
    fresh.load_state_dict(optimizer.state_dict())
    train(other, resumed, 7, 8)
    changed, _ = build()[1], None
    changed.param_groups[0]["betas"] = (0.5, 0.5)
    _, ours = build()
    with pytest.warns(UserWarning, match=r"betas=\(0.5, 0.5\) \(you asked for \(0.9, 0.9\)\)"):
        ours.load_state_dict(changed.state_dict())


def official_checkpoint(params):
    """As the official SophiaG writes it: h without the number of predictions."""
    state = {
        i: {"step": torch.tensor(3.0), "exp_avg": torch.ones_like(p), "hessian": torch.full_like(p, 0.5)}
        for i, p in enumerate(params)
    }
    group = dict(lr=1e-3, betas=(0.965, 0.99), rho=0.05, weight_decay=0.1, maximize=False, capturable=False)
    return {"state": state, "param_groups": [{**group, "params": list(range(len(params)))}]}


def test_a_pre_hook_converts_an_official_checkpoint():
    params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(3, 2))]
    optimizer = SophiaG(params)
    with pytest.raises(ValueError, match="written by the official SophiaG"):
        optimizer.load_state_dict(official_checkpoint(params))

    def convert(_, state_dict):
        state = {i: {"exp_avg": s["exp_avg"], "hessian": 8 * s["hessian"]} for i, s in state_dict["state"].items()}
        groups = [{k: v for k, v in g.items() if k != "capturable"} for g in state_dict["param_groups"]]
        return {"state": state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(convert)
    original = official_checkpoint(params)
    optimizer.load_state_dict(original)
    for p in params:
        assert (optimizer.state[p]["hessian"] == 4).all() and (optimizer.state[p]["exp_avg"] == 1).all()
        assert set(optimizer.state[p]) == {"exp_avg", "hessian", "progress"}
    assert (original["state"][0]["hessian"] == 0.5).all()


def test_pre_hooks_come_first_and_post_hooks_see_the_final_state():
    """Both rules, in bfloat16: what a pre-hook puts in is what is loaded, in float32."""
    net, optimizer = build(torch.bfloat16)
    train(net, optimizer, 0, 3)
    saved = optimizer.state_dict()
    fine = 1 + 2**-20

    def replace(_, state_dict):
        state = copy.deepcopy(state_dict["state"])
        state[0]["exp_avg"].fill_(fine)
        state[2]["exp_avg"].fill_(2.0)
        return {"state": state, "param_groups": state_dict["param_groups"]}

    seen = []
    _, other = build(torch.bfloat16)
    other.register_load_state_dict_pre_hook(replace)
    other.register_load_state_dict_post_hook(lambda o: seen.append({p: dict(s) for p, s in o.state.items()}))
    other.load_state_dict(saved)
    first, embedding = other.param_groups[0]["params"][0], other.param_groups[1]["params"][0]
    assert (other.state[first]["exp_avg"] == fine).all() and other.state[first]["exp_avg"].dtype == torch.float32
    assert (other.state[embedding]["exp_avg"] == 2).all()
    assert len(seen) == 1
    assert all(other.state[p][k] is v for p, s in seen[0].items() for k, v in s.items())


def test_the_optimizers_own_hooks_are_gone_after_loading_and_after_a_refusal():
    net, optimizer = build()
    train(net, optimizer, 0, 1)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    bad = {"state": {0: {"exp_avg_sq": torch.ones(1)}}, "param_groups": saved["param_groups"]}
    with pytest.raises(ValueError):
        optimizer.load_state_dict(bad)
    assert not optimizer._optimizer_load_state_dict_pre_hooks and not optimizer._optimizer_load_state_dict_post_hooks


def test_a_killed_process_resumes_bit_exactly(tmp_path):
    """kill -9 in the middle of a step; the last checkpoint and nothing else goes on as if nothing had happened."""
    run_worker("killed", tmp_path, "kill", timeout=120, expect=-9)
    assert torch.load(tmp_path / "broken.pt")["step"] == 12
    run_worker("killed", tmp_path, "resume", timeout=120)
    whole, broken = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "broken"))
    assert whole["step"] == broken["step"] == 24
    for name, value in whole["model"].items():
        assert torch.equal(value, broken["model"][name]), name
    assert_same_groups(whole["optimizer"]["param_groups"], broken["optimizer"]["param_groups"])
    for i, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, broken["optimizer"]["state"][i][key]) for key, value in state.items())
