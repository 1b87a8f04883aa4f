"""`param_groups`: which parameter of a plain module gets which rule, and that every loop trains what it makes."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from sophia_integrations import GaussNewtonBartlett, SophiaG, SophiaH, param_groups
from sophia_integrations.optim import EIGEN_DEFAULTS


def named(model, **options):
    """{group name: names of its parameters}."""
    names = {p: n for n, p in model.named_parameters()}
    return {g["name"]: [names[p] for p in g["params"]] for g in param_groups(model, **options)}


class Everything(nn.Module):
    """One of every kind of parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.bag = nn.EmbeddingBag(5, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.conv1 = nn.Conv1d(8, 6, 3)
        self.conv2 = nn.Conv2d(3, 4, 3)
        self.up = nn.ConvTranspose1d(6, 5, 2)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.experts = nn.Parameter(torch.randn(3, 8, 4))
        self.row = nn.Parameter(torch.randn(1, 1, 8))
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, 11)


EXPECTED = {
    "matrices": ["experts", "attention.in_proj_weight", "attention.out_proj.weight", "conv2.weight", "head.weight"],
    "kernels": ["conv1.weight", "up.weight"],
    "embeddings": ["embed.weight", "bag.weight"],
    "vectors": [
        "row",
        "scale",
        "norm.weight",
        "norm.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "conv1.bias",
        "conv2.bias",
        "up.bias",
        "head.bias",
    ],
}


@pytest.mark.parametrize("basis", [None, "eigen"])
def test_every_kind_of_parameter(basis):
    model = Everything()
    assert named(model, basis=basis) == EXPECTED
    groups = {g["name"]: g for g in param_groups(model, basis=basis)}
    assert [g.get("update", "sophia") for g in groups.values()] == ["sophia", "sophia", "adamw", "adamw"]
    assert [g.get("basis") for g in groups.values()] == [basis, basis, None, None]
    assert [g.get("basis_flatten", False) for g in groups.values()] == [False, True, False, False]
    assert [g.get("weight_decay") for g in groups.values()] == [None, None, None, 0.0]


def test_the_basis_of_every_kind():
    model = Everything()
    optimizer = SophiaG(param_groups(model, basis="eigen"))
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()
    keys = ("left_basis", "right_basis")
    rows = {
        n: [tuple(optimizer.state[p][k].shape) for k in keys if k in optimizer.state[p]]
        for n, p in model.named_parameters()
    }
    assert {n: r for n, r in rows.items() if r} == {
        "experts": [(3, 8, 8), (3, 4, 4)],
        "attention.in_proj_weight": [(1, 24, 24), (1, 8, 8)],
        "attention.out_proj.weight": [(1, 8, 8)] * 2,
        "conv1.weight": [(1, 6, 6), (1, 24, 24)],
        "conv2.weight": [(1, 4, 4), (1, 27, 27)],
        "up.weight": [(1, 6, 6), (1, 10, 10)],
        "head.weight": [(1, 11, 11), (1, 8, 8)],
    }


def test_tied_weights_are_an_embedding_once():
    model = nn.ModuleDict({"embed": nn.Embedding(11, 8), "hidden": nn.Linear(8, 8), "head": nn.Linear(8, 11)})
    model["head"].weight = model["embed"].weight
    assert named(model) == {
        "matrices": ["hidden.weight"],
        "embeddings": ["embed.weight"],
        "vectors": ["hidden.bias", "head.bias"],
    }


def test_tied_to_a_linear_that_comes_first():
    model = nn.ModuleDict(
        {"head": nn.Linear(8, 11, bias=False), "hidden": nn.Linear(8, 8), "embed": nn.Embedding(11, 8)}
    )
    model["embed"].weight = model["head"].weight
    assert named(model) == {"matrices": ["hidden.weight"], "embeddings": ["head.weight"], "vectors": ["hidden.bias"]}


def test_parameters_of_one_row_or_column_are_vectors():
    model = nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 8), nn.Linear(8, 2), nn.Conv1d(1, 1, 5))
    assert named(model)["matrices"] == ["2.weight"]
    assert {"0.weight", "1.weight", "3.weight"} < set(named(model)["vectors"])


def test_what_trains_is_in_exactly_one_group_and_nothing_else():
    model = Everything()
    grouped = [p for g in param_groups(model) for p in g["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for p in model.parameters() if p.requires_grad}


def test_options_reach_their_groups():
    model = Everything()
    options = dict(basis="eigen", weight_decay=0.3, rho=0.2, lr=0.5, adamw={"lr": 1e-3, "betas": (0.8, 0.9)})
    groups = param_groups(model, **options)
    for group in groups[:2]:
        assert {k: group[k] for k in EIGEN_DEFAULTS} == {**EIGEN_DEFAULTS, "rho": 0.2}
        assert (group["lr"], group["weight_decay"]) == (0.5, 0.3)
    for group, decay in zip(groups[2:], (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.8, 0.9), decay)
        assert "rho" not in group and "nesterov" not in group
    assert "rho" not in param_groups(model)[0], "without a basis the optimizer's own values hold"
    assert param_groups(model, weight_decay=0.3, adamw={"weight_decay": 0.7})[2]["weight_decay"] == 0.7


def test_the_groups_suit_both_optimizers_and_keep_their_own_defaults():
    model = Everything()
    for optimizer_type, rho in ((SophiaG, 0.05), (SophiaH, 0.01)):
        optimizer = optimizer_type(param_groups(model), lr=1e-3)
        assert [g["rho"] for g in optimizer.param_groups[:2]] == [rho] * 2
        assert [g["betas"] for g in optimizer.param_groups] == [(0.965, 0.99)] * 2 + [(0.9, 0.999)] * 2


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)], ids=["number", "tensor"])
def test_in_the_eigenbasis_adamw_goes_at_twice_the_rate_unless_told_otherwise(lr):
    model = Everything()

    def rates(**options):
        return [float(g["lr"]) for g in SophiaG(param_groups(model, **options), lr=lr).param_groups]

    assert rates(basis="eigen") == pytest.approx([1e-3, 1e-3, 2e-3, 2e-3])
    assert rates() == pytest.approx([1e-3] * 4)
    assert rates(basis="eigen", adamw={"lr": 5e-4}) == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])
    assert rates(basis="eigen", adamw={"lr_scale": 0.5}) == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])
    with pytest.raises(ValueError, match="lr_scale must be"):
        rates(adamw={"lr_scale": -1.0})


def test_nothing_for_sophia_and_nothing_to_train():
    with pytest.raises(ValueError, match=r"Sequential has no matrices to train beside.*use torch.optim.AdamW"):
        param_groups(nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3)))
    with pytest.raises(ValueError, match="Linear has no parameter that requires a gradient"):
        param_groups(nn.Linear(3, 3).requires_grad_(False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(basis="eig"), "basis must be None or 'eigen', got 'eig'."),
        (dict(basis=True), "basis must be None or 'eigen', got True."),
        (dict(basis="eigen", basis_max_dim=0), "basis_max_dim must be a whole number of at least 2, or None, got 0."),
        (dict(basis="eigen", basis_max_dim=1), "basis_max_dim must be a whole number of at least 2, or None, got 1."),
        (
            dict(basis="eigen", basis_max_dim=64.0),
            "basis_max_dim must be a whole number of at least 2, or None, got 64.0",
        ),
        (dict(basis="eigen", basis_interval=0), "basis_interval must be a whole number of at least 1, got 0."),
        (dict(basis="eigen", basis_warmup=-1), "basis_warmup must be a whole number of at least 0, got -1."),
        (
            dict(basis="eigen", basis_factor_interval=0),
            "basis_factor_interval must be a whole number of at least 1, got 0.",
        ),
        (dict(basis="eigen", basis_beta=1.0), "basis_beta must be at least 0 and below 1, got 1.0."),
        (dict(rho="automatic"), "rho must be a number of at least 0, or \"auto\", got 'automatic'."),
        (dict(unclipped=(0.6,)), "unclipped must be two shares above 0 and below 1"),
        (dict(unclipped=(1.0, 0.3)), "unclipped must be two shares above 0 and below 1"),
        (dict(unclipped=0.6), "unclipped must be two shares above 0 and below 1"),
        (dict(nesterov=1), "nesterov must be True or False, got 1."),
        (dict(bias_correction="yes"), "bias_correction must be True or False, got 'yes'."),
        (dict(noise_floor=-0.5), "noise_floor must be a number of at least 0, got -0.5."),
        (dict(update="adam"), "update must be 'sophia' or 'adamw', got 'adam'."),
        (dict(basis_flatten=None), "basis_flatten must be True or False, got None."),
    ],
    ids=str,
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SophiaG(param_groups(nn.Linear(6, 5), **options))
    if "update" not in options:
        with pytest.raises(ValueError, match=re.escape(message)):
            SophiaG([nn.Parameter(torch.ones(6, 5))], **options)


def test_a_group_without_matrices_has_no_basis():
    with pytest.raises(ValueError, match=r"basis='eigen' rotates matrices, and this parameter group has none: leave"):
        SophiaG([nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(1, 5))], basis="eigen")
    with pytest.raises(ValueError, match=r"has none that basis_max_dim=6 lets it cut: leave basis out there, or give"):
        SophiaG([nn.Parameter(torch.ones(7, 11))], basis="eigen", basis_max_dim=6)
    optimizer = SophiaG([nn.Parameter(torch.ones(5, 5))], basis="eigen")
    with pytest.raises(ValueError, match="this parameter group has none"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5))]})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5))], "update": "adamw"})
    assert len(optimizer.param_groups) == 2


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4, sparse=True)
        self.hidden = nn.Linear(4, 5)

    def forward(self, x):
        return self.hidden(self.embed(x))


@pytest.mark.parametrize("order", [1, -1])
def test_a_sparse_gradient_in_an_adamw_group_stops_the_step_before_anything_moves(order):
    torch.manual_seed(0)
    model = Sparse()
    optimizer = SophiaG(param_groups(model, basis="eigen")[::order], lr=1e-2, estimator=GaussNewtonBartlett(model))
    model.embed.sparse = False
    x, y = torch.randint(7, (8,)), torch.randint(5, (8,))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.embed.sparse = True
    F.cross_entropy(model(x), y).backward()
    weights = [p.detach().clone() for p in model.parameters()]
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    with pytest.raises(
        RuntimeError, match=r"AdamW groups do not support sparse gradients; use sparse=False.*SparseAdam"
    ):
        optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(optimizer.state[p][k], v) for p, s in state.items() for k, v in s.items())
    assert optimizer.progress.step == 1


class Network(nn.Module):
    """Embedding, convolution, attention and a head on short sequences."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 13)

    def forward(self, x):
        hidden = self.conv(self.embed(x).mT).mT
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.head(self.norm(hidden).mean(1))


def batches(steps):
    """Sequences of 5 tokens; the label is the most frequent remainder, so there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randint(13, (32, 5), generator=generator)
        yield x, x[:, 2]


LOOPS = {
    "plain": {},
    "bf16 autocast": dict(autocast=True),
    "compiled": dict(compiled=True),
    "one cycle": dict(schedule=lambda o: OneCycleLR(o, max_lr=[1e-2] * 4, total_steps=60)),
    "cosine": dict(schedule=lambda o: CosineAnnealingLR(o, 60)),
    "scaler and clipping": dict(scaler=True, clip=1.0),
    "accumulation": dict(accumulate=2),
    "weight coordinates": dict(basis=None),
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_every_loop_trains(loop):
    torch.manual_seed(0)
    model = Network()
    called = torch.compile(model, backend="aot_eager") if loop.get("compiled") else model
    groups = param_groups(called, basis=loop.get("basis", "eigen"))
    optimizer = SophiaG(groups, lr=1e-2, estimator=GaussNewtonBartlett(called), hessian_interval=5)
    scheduler = loop["schedule"](optimizer) if "schedule" in loop else None
    scaler = torch.amp.GradScaler("cpu", enabled=loop.get("scaler", False))
    accumulate, losses = loop.get("accumulate", 1), []
    for step, (x, y) in enumerate(batches(60 * accumulate)):
        with torch.autocast("cpu", torch.bfloat16, enabled=loop.get("autocast", False)):
            loss = F.cross_entropy(called(x), y) / accumulate
        scaler.scale(loss).backward()
        losses.append(float(loss.detach()) * accumulate)
        if (step + 1) % accumulate == 0:
            scaler.unscale_(optimizer)
            if "clip" in loop:
                nn.utils.clip_grad_norm_(model.parameters(), loop["clip"])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
    stats = optimizer.stats()
    assert (stats["hessian_updates"], stats["hessian_skipped"]) == (12, 0)
    assert sum(losses[-5:]) / 5 < 0.9 * sum(losses[:5]) / 5 and math.isfinite(losses[-1])
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    twice = loop.get("basis", "eigen") and "max_lr" not in optimizer.param_groups[0]
    assert rates == pytest.approx([rates[0]] * 2 + [rates[0] * (2 if twice else 1)] * 2)
    rotated = [n for n, p in model.named_parameters() if "left_basis" in optimizer.state[p]]
    expected = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]
    assert rotated == (expected if loop.get("basis", "eigen") else [])


def test_it_does_not_matter_whether_the_module_is_compiled():
    model = Network()
    compiled = torch.compile(model, backend="aot_eager")
    for ours, theirs in zip(param_groups(model), param_groups(compiled), strict=True):
        assert all(p is q for p, q in zip(ours["params"], theirs["params"], strict=True))
