"""The estimator in a plain loop: its scale, its schedule, and what it must leave alone."""

import copy
import gc
import random
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from oracles import draws_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from sophia_integrations import GaussNewtonBartlett, SophiaG
from sophia_integrations.curvature import Categorical, Readout


class FixedLabels(Categorical):
    """'Samples' that depend on the true label only, so that a test can compute them by itself."""

    def sample(self, prediction, labels, generator):
        return torch.where(labels == -100, -100, (labels * 7 + 3) % prediction.shape[-1])


class LabelledClassifier(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, classes))

    def forward(self, x, labels=None):
        return self.net(x)


def exact_diagonal(model, x, labels):
    """Gauss-Newton diagonal of the mean cross-entropy in float64: Σ_rows Jᵀ (diag p − p pᵀ) J / N."""
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    keep = labels != -100
    for row in x[keep]:

        def logits(params, row=row):
            return torch.func.functional_call(model, params, (row[None],))[0]

        jacobian = torch.func.jacrev(logits)(named)
        p = torch.softmax(model(row[None])[0], -1).detach()
        middle = torch.diag(p) - torch.outer(p, p)
        for name, j in jacobian.items():
            total[name] += torch.einsum("c...,cd,d...->...", j, middle, j)
    return {name: value / int(keep.sum()) for name, value in total.items()}


def assert_unbiased(model, x, labels, draws=500, **options):
    """The mean of `draws` estimates is the exact diagonal, up to the standard error that they show themselves."""
    exact = torch.cat([t.flatten() for t in exact_diagonal(model, x, labels).values()])
    estimator = GaussNewtonBartlett(model, **options)
    samples = draws_of(estimator, lambda: model(x, labels=labels), list(model.parameters()), draws)
    mean, standard_error = samples.mean(0), (samples.var(0).sum() / draws).sqrt()
    assert torch.linalg.norm(mean - exact) < 3 * standard_error < 0.2 * torch.linalg.norm(exact)
    assert abs(mean.sum() / exact.sum() - 1) < 4 * (2 / draws) ** 0.5


@pytest.mark.parametrize("units", [1, 3, 8])
def test_mean_of_estimates_is_the_exact_gauss_newton_diagonal(units):
    torch.manual_seed(0)
    model = LabelledClassifier().double()
    x, labels = torch.randn(8, 4, dtype=torch.float64), torch.randint(5, (8,))
    labels[[1, 4, 5]] = -100
    assert_unbiased(model, x, labels, fraction=1.0, units=units)


def test_a_fraction_of_the_rows_is_unbiased_for_the_whole_batch():
    torch.manual_seed(1)
    model = LabelledClassifier().double()
    x, labels = torch.randn(8, 4, dtype=torch.float64), torch.randint(5, (8,))
    assert_unbiased(model, x, labels, fraction=0.25, units=2)


def hand_estimate(model, batches, units):
    """Σ_u S_u² / N written out: `units` lists (batch, rows)."""
    model = copy.deepcopy(model)
    params = list(model.parameters())
    sums, n = [torch.zeros_like(p) for p in params], 0
    for batch, rows in units:
        x, labels = (t[rows] for t in batches[batch])
        keep = labels != -100
        loss = F.cross_entropy(model(x)[keep], ((labels * 7 + 3) % 5)[keep], reduction="sum")
        if keep.any():
            for total, g in zip(sums, torch.autograd.grad(loss, params), strict=True):
                total += g.square()
        n += int(keep.sum())
    return [s / n for s in sums]


def test_accumulation_with_unequal_masks_is_one_pooled_estimate():
    torch.manual_seed(0)
    model = LabelledClassifier()
    batches = []
    for rows, masked in ((4, 3), (2, 0), (3, 1)):
        labels = torch.randint(5, (rows,))
        labels[:masked] = -100
        batches.append((torch.randn(rows, 4), labels))
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=1, readout=Readout(FixedLabels()))
    optimizer = SophiaG(model.parameters(), lr=0.0, betas=(0.9, 0.0), estimator=estimator)
    for x, labels in batches:
        F.cross_entropy(model(x, labels=labels), labels).backward()
    expected = hand_estimate(model, batches, [(b, slice(None)) for b in range(3)])
    optimizer.step()
    for p, h in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(optimizer.state[p]["hessian"], h, rtol=1e-5, atol=1e-9)


def test_noted_labels_mask_predictions_that_the_model_is_not_told_of():
    torch.manual_seed(0)
    model = LabelledClassifier()
    x, labels = torch.randn(6, 4), torch.randint(5, (6,))
    labels[:4] = -100
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=1, readout=Readout(FixedLabels()))
    optimizer = SophiaG(model.parameters(), lr=0.0, betas=(0.9, 0.0), estimator=estimator)
    estimator.note_labels(labels)
    F.cross_entropy(model(x), labels).backward()
    expected = hand_estimate(model, [(x, labels)], [(0, slice(None))])
    optimizer.step()
    for p, h in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(optimizer.state[p]["hessian"], h, rtol=1e-5, atol=1e-9)


class Messy(nn.Module):
    """Everything that a forward may change: dropout, running statistics, a counter, global random streams."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.out = nn.Linear(6, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + random.random()
        return self.out(self.frozen(self.drop(self.norm(self.inner(x)))))


def test_the_pass_changes_nothing_but_h():
    torch.manual_seed(0)
    model = Messy()
    model.frozen.eval()
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=2)
    optimizer = SophiaG(model.parameters(), lr=0.0, weight_decay=0.0, estimator=estimator)
    F.cross_entropy(model(torch.randn(8, 4)), torch.randint(5, (8,))).backward()
    grads = {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
    buffers = {n: (b, b.clone()) for n, b in model.named_buffers()}
    flags = {n: m.training for n, m in model.named_modules()}
    rng, python_rng = torch.get_rng_state(), random.getstate()
    optimizer.step()
    assert optimizer.stats()["hessian_updates"] == 1
    assert torch.equal(torch.get_rng_state(), rng) and random.getstate() == python_rng
    assert {n: m.training for n, m in model.named_modules()} == flags
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0] and torch.equal(buffer, buffers[name][1]), name
    for name, param in model.named_parameters():
        assert param.grad is grads[name][0], name
        assert param.grad is None or torch.equal(param.grad, grads[name][1]), name


def test_with_batch_norm_a_unit_is_a_whole_micro_batch():
    sizes = []

    class Spy(nn.Sequential):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    model = Spy(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(model, fraction=0.5))
    for rows in (5, 3, 4, 6):
        F.cross_entropy(model(torch.randn(rows, 4)), torch.zeros(rows, dtype=torch.int64)).backward()
    optimizer.step()
    assert len(sizes) == 6 and set(sizes[4:]) <= {5, 3, 4, 6}


def test_the_pass_restores_everything_when_the_model_raises():
    torch.manual_seed(0)
    model = Messy()
    optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(model))
    F.cross_entropy(model(torch.randn(8, 4)), torch.randint(5, (8,))).backward()
    grads, rng = [p.grad for p in model.parameters()], torch.get_rng_state()
    model.out.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)


def test_same_key_same_samples_and_other_steps_draw_anew():
    def run(seed):
        torch.manual_seed(0)
        model = LabelledClassifier()
        x, y = torch.randn(8, 4), torch.randint(5, (8,))
        estimator = GaussNewtonBartlett(model, fraction=1.0, units=1, seed=seed)
        optimizer = SophiaG(
            model.parameters(), lr=0.0, betas=(0.9, 0.0), weight_decay=0.0, estimator=estimator, hessian_interval=1
        )
        seen = []
        for _ in range(2):
            torch.rand(3)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            seen.append(torch.cat([optimizer.state[p]["hessian"].flatten() for p in model.parameters()]))
        return seen

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_micro_batches_are_remembered_only_while_the_next_step_is_due():
    model = LabelledClassifier()
    optimizer = SophiaG(model.parameters(), lr=1e-3, hessian_interval=3, estimator=GaussNewtonBartlett(model, units=1))
    updates = []
    gc.freeze()  # so that collecting does not look through all that is imported
    for _ in range(7):
        x = torch.randn(4, 4)
        alive = weakref.ref(x)
        F.cross_entropy(model(x), torch.randint(5, (4,))).backward()
        del x
        gc.collect()
        assert (alive() is not None) == optimizer.hessian_due
        optimizer.step()
        gc.collect()
        assert alive() is None
        updates.append(optimizer.stats()["hessian_updates"])
    gc.unfreeze()
    assert updates == [1, 1, 1, 2, 2, 2, 3]


def test_evaluation_and_no_grad_forwards_are_not_remembered():
    model = LabelledClassifier()
    optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(model))
    with torch.no_grad():
        model(torch.randn(4, 4))
    model.eval()
    model(torch.randn(4, 4))
    model.train()
    with pytest.warns(UserWarning, match="LabelledClassifier was not called in training mode"):
        optimizer.step()


def test_masked_batch_makes_no_estimate_and_the_next_one_does():
    torch.manual_seed(0)
    model = LabelledClassifier()
    optimizer = SophiaG(model.parameters(), lr=1e-3, estimator=GaussNewtonBartlett(model))
    x = torch.randn(4, 4)
    masked = torch.full((4,), -100)
    F.cross_entropy(model(x, labels=masked), masked).backward()
    with pytest.warns(UserWarning) as caught:
        optimizer.step()
    assert any("every label of the rows that it used is masked" in str(w.message) for w in caught)
    assert optimizer.stats()["hessian_updates"] == 0 and optimizer.stats()["hessian_skipped"] == 1
    optimizer.zero_grad()
    F.cross_entropy(model(x, labels=torch.arange(4)), torch.arange(4)).backward()
    optimizer.step()
    assert optimizer.stats()["hessian_updates"] == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_nonfinite_estimate_is_dropped_and_counted():
    torch.manual_seed(0)
    model = LabelledClassifier()
    optimizer = SophiaG(
        model.parameters(), lr=1e-3, hessian_interval=1, estimator=GaussNewtonBartlett(model, fraction=1.0)
    )
    for scale in (1.0, float("nan"), 1.0):
        optimizer.zero_grad()
        x = torch.randn(4, 4)
        F.cross_entropy(model(x), torch.arange(4)).backward()
        x.mul_(scale)
        with nullcontext() if scale == 1 else pytest.warns(UserWarning, match="not finite"):
            optimizer.step()
    stats = optimizer.stats()
    assert (stats["hessian_updates"], stats["hessian_skipped"]) == (2, 1)
    for p in model.parameters():
        assert torch.isfinite(p).all() and torch.isfinite(optimizer.state[p]["hessian"]).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_estimate(reentrant):
    class Checkpointed(LabelledClassifier):
        recompute = True

        def forward(self, x, labels=None):
            hidden = self.net[0](x).requires_grad_()
            if self.recompute:
                return checkpoint(self.net[1:], hidden, use_reentrant=reentrant)
            return self.net[1:](hidden)

    def first_h(recompute):
        torch.manual_seed(0)
        model = Checkpointed()
        model.recompute = recompute
        optimizer = SophiaG(model.parameters(), lr=0.0, estimator=GaussNewtonBartlett(model, fraction=1.0))
        F.cross_entropy(model(torch.randn(8, 4)), torch.randint(5, (8,))).backward()
        optimizer.step()
        return [optimizer.state[p]["hessian"] for p in model.parameters()]

    for a, b in zip(first_h(True), first_h(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_leaves_out_the_gradients_of_what_adamw_updates(reentrant):
    """But not under reentrant checkpointing, whose weights are not in the graph."""

    class Headed(LabelledClassifier):
        def forward(self, x, labels=None):
            if reentrant:
                return checkpoint(self.net, x.requires_grad_(), use_reentrant=True)
            return self.net(x)

    model = Headed()
    body, head = model.net[0], model.net[2]
    groups = [{"params": body.parameters()}, {"params": head.parameters(), "update": "adamw"}]
    optimizer = SophiaG(groups, lr=0.0, estimator=GaussNewtonBartlett(model, fraction=1.0, units=2), hessian_interval=1)
    came, loss_of = [], lambda: F.cross_entropy(model(torch.randn(8, 4)), torch.randint(5, (8,)))
    head.weight.register_post_accumulate_grad_hook(lambda p: came.append(p.grad is not None))
    for _ in range(2):
        loss_of().backward()
        came.clear()
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert len(came) == (2 if reentrant else 0)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
        optimizer.zero_grad()
    assert optimizer.stats()["hessian_updates"] == 2
    assert all(optimizer.state[p]["hessian"].norm() > 0 for p in body.parameters())


def test_the_pass_runs_under_the_autocast_of_the_training_forward():
    seen = []

    class Spy(LabelledClassifier):
        def forward(self, x, labels=None):
            out = super().forward(x)
            if self.training:
                seen.append(out.dtype)
            return out

    model = Spy()
    optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(model, units=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(torch.randn(4, 4)), torch.arange(4))
    loss.backward()
    optimizer.step()
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_copies_and_pickles_of_a_watched_model_are_plain_models(tmp_path):
    model = LabelledClassifier()
    optimizer = SophiaG(model.parameters(), lr=1e-3, estimator=GaussNewtonBartlett(model, units=1))
    reference = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (reference, loaded):
        other(torch.randn(4, 4))
    with pytest.warns(UserWarning, match="no Hessian estimate"):
        optimizer.step()
    for other in (reference, loaded):
        second = SophiaG(other.parameters(), lr=1e-3, estimator=GaussNewtonBartlett(other, units=1))
        F.cross_entropy(other(torch.randn(4, 4)), torch.arange(4)).backward()
        second.step()
        assert second.stats()["hessian_updates"] == 1


def test_a_dropped_optimizer_leaves_an_inert_hook():
    model = LabelledClassifier()
    optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(model))
    del optimizer
    gc.collect()
    x = torch.randn(4, 4)
    alive = weakref.ref(x)
    model(x)
    del x
    gc.collect()
    assert alive() is None


def test_estimator_of_another_model_is_refused():
    model, other = LabelledClassifier(), LabelledClassifier()
    optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(other))
    with pytest.raises(ValueError, match="trains no parameter of the LabelledClassifier"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, "fraction must be above 0 and at most 1, got 0"),
        ({"fraction": 1.5}, "fraction must be above 0 and at most 1, got 1.5"),
        ({"units": 0}, "units must be a whole number of at least 1, got 0"),
        ({"units": 2.0}, "units must be a whole number of at least 1, got 2.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GaussNewtonBartlett(LabelledClassifier(), **options)


def test_output_without_logits_and_misaligned_labels_are_refused():
    class Embeds(nn.Linear):
        def forward(self, x, labels=None):
            return {"pooled": super().forward(x)}

    class Extra(nn.Linear):
        def forward(self, x, labels=None):
            return super().forward(x)[1:]

    cases = ((Embeds(4, 3), "no logits"), (Extra(4, 3), "do not match logits"), (nn.Linear(4, 1), "one class"))
    for model, match in cases:
        optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(model, fraction=1.0, units=1))
        model(torch.randn(4, 4), **({} if type(model) is nn.Linear else {"labels": torch.arange(4)}))
        with pytest.raises(ValueError, match=match):
            optimizer.step()
