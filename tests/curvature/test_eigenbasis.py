"""ĥ in the eigenbasis: the diagonal of Qᵀ H Q with H from independent code, and nothing else changed by the pass."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracles import curvlinops_ggn, hessian, relative_error, rotated_diagonal
from specification import Pieces
from torch import nn
from torch.utils.checkpoint import checkpoint

from sophia_integrations import EmpiricalFisher, GaussNewtonBartlett, Hutchinson, SophiaG, param_groups
from sophia_integrations.curvature import Categorical, Readout
from sophia_integrations.curvature.hutchinson import _DRAW

# h is the estimate of the step itself, and the basis that of the first gradient.
STILL = dict(lr=0.0, betas=(0.9, 0.0), weight_decay=0.0, hessian_interval=1)
FIXED = dict(basis="eigen", basis_interval=10**6, basis_warmup=0)


class Scripted(Categorical):
    """'Draws' the labels it was given."""

    drawn = None

    def sample(self, prediction, labels, generator):
        return self.drawn


class Noted(nn.Module):
    """A network that is given its labels, for their mask."""

    def __init__(self, *layers):
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x, labels=None):
        return self.net(x)


def small():
    torch.manual_seed(0)
    return Noted(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def bases(model, optimizer, pieces):
    return {p: pieces[p].whole(optimizer.state[p])[0] for p in model.parameters() if p in pieces}


def expected_h(matrix, model, optimizer, pieces):
    """The exact diagonal for every parameter, rotated by hand where it has a basis."""
    params = [p for p in model.parameters() if p.requires_grad]
    q = bases(model, optimizer, pieces)
    eye = {p: (torch.eye(p.numel(), dtype=torch.float64), torch.ones(1, 1)) for p in params}
    return {p: rotated_diagonal(matrix, p, params, *q.get(p, eye[p])) for p in params}


CUTS = {"whole sides": (None, 4, 3), "cut": (2, 2, 0)}


@pytest.mark.parametrize(("cap", "columns", "rows"), CUTS.values(), ids=CUTS)
def test_the_expectation_of_gauss_newton_bartlett_is_exact(cap, columns, rows):
    """Over all labels that may be drawn, weighted by the model's probabilities: no noise is left."""
    model = small()
    first, second = model.net[0].weight, model.net[2].weight
    pieces = {first: Pieces(1, 3, 4, rows, columns)}
    if cap is None:
        pieces[second] = Pieces(1, 3, 3, 3, 3)
    x, labels = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 2, 1])
    readout = Readout(Scripted())
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=1, readout=readout)
    vectors = [p for p in model.parameters() if p not in pieces]
    groups = [{"params": list(pieces), **FIXED, "basis_max_dim": cap}, {"params": vectors}]
    optimizer = SophiaG(groups, **STILL, estimator=estimator)
    probabilities = torch.softmax(model(x), -1).detach()
    mean = {p: 0.0 for p in model.parameters()}
    for drawn in itertools.product(range(3), repeat=3):
        readout.likelihood.drawn = torch.tensor(drawn)
        optimizer.zero_grad()
        F.cross_entropy(model(x, labels=labels), labels).backward()
        optimizer.step()
        weight = float(probabilities[range(3), list(drawn)].prod())
        for p in model.parameters():
            mean[p] += weight * optimizer.state[p]["hessian"]
    exact = expected_h(
        curvlinops_ggn(model, nn.CrossEntropyLoss(), list(model.parameters()), x, labels), model, optimizer, pieces
    )
    for p in model.parameters():
        torch.testing.assert_close(mean[p], exact[p], rtol=1e-8, atol=1e-12)
    plain = curvlinops_ggn(model, nn.CrossEntropyLoss(), [first], x, labels).diagonal().view_as(first)
    left, right = bases(model, optimizer, pieces)[first]
    assert relative_error(plain, exact[first]) > 0.1, "the rotation matters"
    assert relative_error(left.T.square() @ plain @ right.square(), exact[first]) > 0.1, "and where it is made"


@pytest.mark.parametrize(
    ("draws", "tolerance"),
    [(120, 0.15), pytest.param(2500, 0.02, marks=pytest.mark.slow)],
)
def test_the_mean_of_drawn_estimates_is_the_rotated_diagonal(draws, tolerance):
    torch.manual_seed(0)
    model = Noted(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    pieces = {model.net[0].weight: Pieces(1, 6, 4, 6, 4), model.net[2].weight: Pieces(1, 5, 6, 5, 6)}
    x, labels = torch.randn(8, 4, dtype=torch.float64), torch.randint(5, (8,))
    labels[[1, 4]] = -100
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=8)
    groups = param_groups(model, **FIXED, rho=0.05)
    for group in groups:
        group.update(STILL)
    optimizer = SophiaG(groups, **STILL, estimator=estimator)
    mean = {p: torch.zeros_like(p) for p in pieces}
    F.cross_entropy(model(x, labels=labels), labels).backward()
    for _ in range(draws):
        optimizer.step()
        for p in pieces:
            mean[p] += optimizer.state[p]["hessian"] / draws
        with torch.no_grad():
            estimator.remember(x, labels=labels)
    keep = labels != -100
    matrix = curvlinops_ggn(model, nn.CrossEntropyLoss(), list(model.parameters()), x[keep], labels[keep])
    exact = expected_h(matrix, model, optimizer, pieces)
    for p in pieces:
        assert relative_error(mean[p], exact[p]) < tolerance
        assert abs(mean[p].sum() / exact[p].sum() - 1) < tolerance / 2
    assert optimizer.stats()["hessian_updates"] == draws


def test_the_expectation_of_hutchinson_is_exact(monkeypatch):
    """Over all 2⁶ probes of ±1: v ⊙ QᵀHQv averages to the diagonal of QᵀHQ, also with a bias that is not rotated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2).requires_grad_(False)).double()
    params = list(model[0].parameters())
    pieces = {p: Pieces(1, 2, 2, 2, 2) for p in params if p.ndim == 2}
    x, labels = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0])

    def loss(output, batch=None):
        return F.cross_entropy(output, labels)

    queue = []
    monkeypatch.setitem(_DRAW, "rademacher", lambda param, generator: queue.pop(0).view_as(param))
    estimator = Hutchinson(model, fraction=1.0, units=1, loss=loss)
    groups = [{"params": list(pieces), **FIXED}, {"params": [model[0].bias]}]
    optimizer = SophiaG(groups, **STILL, estimator=estimator)
    mean = {p: 0.0 for p in params}
    loss(model(x)).backward()
    asked = [p for group in groups for p in group["params"]]
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        queue += torch.tensor(signs, dtype=torch.float64).split([p.numel() for p in asked])
        optimizer.step()
        estimator.remember(x)
        assert not queue
        for p in params:
            mean[p] += optimizer.state[p]["hessian"] / 2**6
    exact = expected_h(hessian(model, lambda call: loss(call(x)), params), model, optimizer, pieces)
    for p in params:
        torch.testing.assert_close(mean[p], exact[p], rtol=1e-8, atol=1e-12)
    plain = hessian(model, lambda call: loss(call(x)), params[:1]).diagonal().view(2, 2)
    assert relative_error(plain, exact[params[0]]) > 0.1


def test_the_empirical_fisher_squares_the_rotated_gradient():
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    optimizer = SophiaG([model.weight], **STILL, **FIXED, estimator=EmpiricalFisher(model))
    F.cross_entropy(model(torch.randn(9, 5)), torch.randint(4, (9,))).backward()
    optimizer.step()
    (left, right), grad = Pieces(1, 4, 5, 4, 5).whole(optimizer.state[model.weight])[0], model.weight.grad.double()
    expected = 9 * (left.T @ grad @ right).square()
    torch.testing.assert_close(optimizer.state[model.weight]["hessian"].double(), expected, rtol=1e-4, atol=1e-8)


class FixedLabels(Categorical):
    def sample(self, prediction, labels, generator):
        return torch.where(labels == -100, -100, (labels * 7 + 3) % prediction.shape[-1])


def by_hand(model, units, left, right):
    """Σ_u (Q_LᵀS_uQ_R)² / N of the first layer's weight in float64; `units` lists (x, labels)."""
    total, n = 0.0, 0
    for x, labels in units:
        keep = labels != -100
        n += int(keep.sum())
        if keep.any():
            drawn = (labels[keep] * 7 + 3) % 5
            loss = F.cross_entropy(model(x[keep]), drawn, reduction="sum")
            (s,) = torch.autograd.grad(loss, model.net[0].weight)
            total = total + (left.T @ s.double() @ right).square()
    return total / n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [[9], [4, 2, 3]], ids=["one batch", "accumulated"])
def test_first_h_is_that_of_the_rows_whatever_the_accumulation(sizes, dtype):
    torch.manual_seed(0)
    model = Noted(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).to(dtype)
    x, labels = torch.randn(9, 4, dtype=dtype), torch.randint(5, (9,))
    labels[[0, 1, 2, 5]] = -100
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=64, readout=Readout(FixedLabels()))
    optimizer = SophiaG(param_groups(model, **FIXED), **STILL, estimator=estimator)
    for part, own in zip(x.split(sizes), labels.split(sizes), strict=True):
        (F.cross_entropy(model(part, labels=own).float(), own, reduction="sum") / 5).backward()
    weight = model.net[0].weight
    optimizer.param_groups[0]["betas"] = (0.9, 0.0)
    optimizer.step()
    left, right = Pieces(1, 6, 4, 6, 4).whole(optimizer.state[weight])[0]
    expected = by_hand(model, [(x[i : i + 1], labels[i : i + 1]) for i in range(9)], left, right)
    tolerance = dict(rtol=1e-4, atol=1e-7) if dtype == torch.float32 else dict(rtol=0.05, atol=1e-4)
    torch.testing.assert_close(optimizer.state[weight]["hessian"].double(), expected, **tolerance)


class Messy(nn.Module):
    """Dropout, running statistics, a counter, a frozen layer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, labels=None):
        self.calls += 1
        logits = self.frozen(self.net(x))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("kind", [GaussNewtonBartlett, Hutchinson, EmpiricalFisher])
def test_the_pass_changes_nothing_but_h(kind):
    torch.manual_seed(0)
    model = Messy()
    optimizer = SophiaG(param_groups(model, **FIXED, weight_decay=0.0), lr=0.0, estimator=kind(model))
    model(torch.randn(8, 4), labels=torch.randint(3, (8,)))["loss"].backward()
    grads = {p: (p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    weights = {p: p.detach().clone() for p in model.parameters()}
    rng = torch.get_rng_state()
    optimizer.step()
    assert optimizer.stats()["hessian_updates"] == 1 and torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is g and torch.equal(g, copy) and g.grad_fn is None for p, (g, copy) in grads.items())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert all(torch.equal(p, w) and not p._post_accumulate_grad_hooks for p, w in weights.items())
    for state in optimizer.state.values():
        assert not any(value.requires_grad for value in state.values())
    assert optimizer.state[model.net[0].weight]["hessian"].any()


def test_parameters_of_two_precisions_on_one_device():
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.single, self.double_ = nn.Linear(4, 5), nn.Linear(5, 3).double()

        def forward(self, x):
            return self.double_(self.single(x).double())

    model = Two()
    for kind in (GaussNewtonBartlett(model), EmpiricalFisher(model)):
        optimizer = SophiaG(param_groups(model, **FIXED), **STILL, estimator=kind)
        F.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        optimizer.step()
        h = [optimizer.state[layer.weight]["hessian"] for layer in (model.single, model.double_)]
        assert [x.dtype for x in h] == [torch.float32, torch.float64] and all(x.any() for x in h)


@pytest.mark.parametrize("early", [True, False], ids=["as they arrive", "at the end"])
def test_a_gradient_that_comes_in_parts_is_rotated_once_as_a_sum(early):
    """A weight shared with reentrant checkpointing: the squares taken on arrival are given up, not added."""

    class Shared(nn.Module):
        def __init__(self, recompute):
            super().__init__()
            self.recompute, self.shared = recompute, nn.Linear(6, 6)

        def forward(self, x):
            x = x.requires_grad_()
            block = lambda x: torch.tanh(self.shared(x))  # noqa: E731
            x = checkpoint(block, x, use_reentrant=True) if self.recompute else block(x)
            return self.shared(x)

    def first_h(recompute):
        torch.manual_seed(0)
        model = Shared(recompute)
        estimator = GaussNewtonBartlett(model, fraction=1.0, units=2)
        estimator._squares_on_arrival = early
        optimizer = SophiaG([model.shared.weight], **STILL, **FIXED, estimator=estimator)
        x = torch.randn(12, 6)
        F.cross_entropy(model(x), torch.randint(6, (12,))).backward()
        grads = [(p, p.grad, p.grad.clone()) for p in model.parameters()]
        optimizer.step()
        assert all(p.grad is g and torch.equal(g, copy) for p, g, copy in grads)
        return optimizer.state[model.shared.weight]

    one, other = first_h(True), first_h(False)
    torch.testing.assert_close(one["left_basis"].abs(), other["left_basis"].abs(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(one["hessian"], other["hessian"], rtol=1e-2, atol=1e-3)


def test_the_number_of_predictions_of_the_window_is_the_noise_floors():
    """Three micro-batches of 4, 2 and 3 rows, five labels masked: N is 4 whatever share of the rows the units take."""
    torch.manual_seed(0)
    model = Noted(nn.Linear(4, 5))
    labels = torch.randint(5, (9,))
    labels[[0, 1, 2, 5, 6]] = -100
    for fraction in (1.0, 0.25):
        estimator = GaussNewtonBartlett(model, fraction=fraction)
        optimizer = SophiaG(model.parameters(), noise_floor=1.0, rho=0.0, betas=(0.0, 0.0), estimator=estimator)
        for part, own in zip(torch.randn(9, 4).split([4, 2, 3]), labels.split([4, 2, 3]), strict=True):
            F.cross_entropy(model(part, labels=own), own, reduction="sum").backward()
        before = model.net[0].bias.detach().clone()
        optimizer.step()
        assert optimizer.progress.batch_predictions == 4
        h, g = optimizer.state[model.net[0].bias]["hessian"], model.net[0].bias.grad
        step = (before * (1 - 1e-4 * 0.1) - model.net[0].bias.detach()) / 1e-4
        torch.testing.assert_close(step, (g / (h / 4).sqrt().clamp_min(1e-12)).clamp(-1, 1), rtol=1e-2, atol=1e-2)
        model.zero_grad()


def test_units_before_the_one_that_comes_in_parts_count_once():
    """Only one row's gradient comes in parts; the units before it are squared anew, and counted anew."""

    class Seldom(nn.Module):
        def __init__(self, recompute):
            super().__init__()
            self.recompute, self.shared = recompute, nn.Linear(6, 6)

        def forward(self, x):
            seldom = self.recompute and bool(x[:, 0].mean() > 0)
            x = x.requires_grad_()
            block = lambda x: torch.tanh(self.shared(x))  # noqa: E731
            return self.shared(checkpoint(block, x, use_reentrant=True) if seldom else block(x))

    def first_h(recompute, row):
        torch.manual_seed(0)
        model = Seldom(recompute)
        estimator = GaussNewtonBartlett(model, fraction=1.0, units=8)
        optimizer = SophiaG([model.shared.weight], **STILL, estimator=estimator)
        x = torch.randn(8, 6)
        x[:, 0] = -x[:, 0].abs()
        x[row, 0] = 0.1
        F.cross_entropy(model(x), torch.randint(6, (8,))).backward()
        optimizer.step()
        assert estimator._squares_on_arrival == (not recompute)
        return optimizer.state[model.shared.weight]["hessian"]

    for row in (0, 5):
        torch.testing.assert_close(first_h(True, row), first_h(False, row), rtol=1e-5, atol=1e-9)
