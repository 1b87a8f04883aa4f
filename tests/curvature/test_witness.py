"""What the training loss says at the logits: other losses are refused, known scales stay quiet, masks are learned."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles import draws_of, flat, relative_error, softmax_ggn_diagonal, squared_draw_error
from torch import nn

from sophia_integrations import GaussNewtonBartlett, SophiaG
from sophia_integrations.curvature import Readout
from sophia_integrations.curvature.witness import listen

ROWS, CLASSES = 48, 7


def labels(classes=CLASSES):
    return torch.arange(ROWS) % classes


def nll(logits, y):
    return -logits.log_softmax(-1).gather(-1, y[:, None])[:, 0]


def focal(z, y):
    loss = nll(z, y)
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


def mixed(z, y):
    one, two = F.one_hot(y, z.shape[-1]).float(), F.one_hot(y.flip(0), z.shape[-1]).float()
    return F.cross_entropy(z, 0.7 * one + 0.3 * two)


def class_weights(z):
    return torch.linspace(1, 3, z.shape[-1])


QUIET = {
    "mean": F.cross_entropy,
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "mixed labels": mixed,
    "distilled": lambda z, y: F.cross_entropy(z, z.detach().roll(1, 0).softmax(-1)),
    "accumulated": lambda z, y: F.cross_entropy(z, y) / 8,
    "scaled by GradScaler": lambda z, y: 65536 * F.cross_entropy(z, y),
    "penalty on the log-sum-exp": lambda z, y: F.cross_entropy(z, y) + 1e-4 * z.logsumexp(-1).square().mean(),
    "masked": lambda z, y: F.cross_entropy(z, y.where(torch.arange(len(y)) % 3 > 0, -100)),
}
OTHER = {
    "class weights": (
        lambda z, y: 1000 * F.cross_entropy(z, y, weight=class_weights(z)),
        r"weighs one prediction (3|3.0\d) ",
    ),
    "focal": (focal, "weighs one prediction"),
    "dft": (lambda z, y: ((-nll(z, y)).exp().detach() * nll(z, y)).mean(), "weighs one prediction"),
    "row weights": (lambda z, y: (nll(z, y) * torch.linspace(1, 2, len(y))).mean(), r"weighs one prediction (2|1.99) "),
    "temperature": (lambda z, y: F.cross_entropy(z / 3, y), "not proportional to the softmax"),
    "squares": (lambda z, y: F.mse_loss(z, F.one_hot(y, z.shape[-1]).float()), "does not sum to 0 over the classes"),
    "yes and no": (
        lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, z.shape[-1]).float()),
        "does not sum to 0 over the classes",
    ),
}


def one_step(loss, classes=CLASSES, autocast=None, readout=None):
    """A due step of a linear softmax model that is neither certain nor uniform."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, classes), 2 * torch.randn(ROWS, 5)
    optimizer = SophiaG(model.parameters(), lr=0.0, estimator=GaussNewtonBartlett(model, readout=readout))
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        value = loss(model(x), labels(classes))
    value.backward()
    optimizer.step()
    assert optimizer.stats()["hessian_updates"] == 1


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 3, 7, 200])
@pytest.mark.parametrize("name", QUIET)
def test_a_softmax_likelihood_under_any_known_scale_stays_quiet(name, classes, autocast):
    one_step(lambda z, y: QUIET[name](z.float(), y), classes, autocast)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", OTHER)
def test_another_loss_is_one_sentence(name, autocast):
    loss, match = OTHER[name]
    with pytest.raises(ValueError, match=f"training loss is not the mean.*{match}.*readout=.*Hutchinson.*check=False"):
        one_step(lambda z, y: loss(z.float(), y), 7, autocast)
    one_step(lambda z, y: loss(z.float(), y), 7, autocast, readout=Readout(check=False))


@pytest.mark.parametrize("classes", [2, 3])
def test_weights_of_few_classes(classes):
    with pytest.raises(ValueError, match="weighs one prediction 3 times"):
        one_step(lambda z, y: F.cross_entropy(z, y, weight=class_weights(z)), classes)


def test_a_constant_factor_warns_once():
    torch.manual_seed(0)
    model, x = nn.Linear(5, CLASSES), torch.randn(ROWS, 5)
    optimizer = SophiaG(model.parameters(), lr=0.0, hessian_interval=1, estimator=GaussNewtonBartlett(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            (1000 * F.cross_entropy(model(x), labels())).backward()
            optimizer.step()
            optimizer.zero_grad()
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1 and "is 1,000 times the mean over its predictions" in messages[0]


def test_the_sum_over_the_window_is_the_scale_of_its_loss():
    """Eight micro-batches of a mean each are a known scale; a ten-thousandth is not."""
    model, x = nn.Linear(5, CLASSES), torch.randn(ROWS, 5)
    for factor, told in ((1.0, 0), (1 / 8, 0), (1e-4, 1)):
        optimizer = SophiaG(model.parameters(), lr=0.0, estimator=GaussNewtonBartlett(model))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(8):
                (factor * F.cross_entropy(model(x), labels())).backward()
            optimizer.step()
        assert len(caught) == told


class Pixels(nn.Conv2d):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("size", [(4, 5), (3, 3)])
def test_classes_in_dimension_1_are_found_and_estimated_exactly(size):
    """torch's own layout for segmentation, also where only the gradient tells it from classes in the last dimension."""
    torch.manual_seed(0)
    model = Pixels(2, 3, 3, padding=1).double()
    x, y = torch.randn(3, 2, *size, dtype=torch.float64), torch.randint(3, (3, *size))
    params = list(model.parameters())
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=3)
    draws = draws_of(estimator, lambda: F.cross_entropy(model(x), y).backward(), params, 500)
    assert relative_error(
        draws.mean(0), softmax_ggn_diagonal(lambda: model(x).movedim(1, -1), params)
    ) < 3 * squared_draw_error(500)


def test_labels_given_to_the_model_name_the_dimension_of_the_classes_too():
    class Labelled(nn.Conv1d):
        def forward(self, x, labels=None):
            return super().forward(x)

    torch.manual_seed(0)
    model, x, y = Labelled(2, 3, 1).double(), torch.randn(4, 2, 5).double(), torch.randint(3, (4, 5))
    y[0, :4] = -100
    params = list(model.parameters())
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=4, readout=Readout(check=False))
    draws = draws_of(estimator, lambda: model(x, labels=y), params, 600)
    wanted = softmax_ggn_diagonal(lambda: model(x).movedim(1, -1)[y != -100][None], params)
    assert relative_error(draws.mean(0), wanted) < 3 * squared_draw_error(600)


def test_rows_that_count_are_learned_without_labels():
    """A loop that shifts, and masks by itself: N and the diagonal are those of the rows that its loss has."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3).double(), torch.randn(4, 6, 5).double()
    keep = torch.rand(4, 5) < 0.5
    params = list(model.parameters())
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=4)
    y = torch.randint(3, (4, 5))

    def train():
        F.cross_entropy(model(x)[:, :-1][keep], y[keep]).backward()

    draws = draws_of(estimator, train, params, 200)
    wanted = softmax_ggn_diagonal(lambda: model(x)[:, :-1][keep][None], params)
    assert relative_error(draws.mean(0), wanted) < 3 * squared_draw_error(200)
    estimator.arm(True)
    train()
    assert estimator.estimate(params, 0).num_predictions == int(keep.sum())


def test_noted_labels_that_the_loss_does_not_follow_are_corrected():
    model, x, y = nn.Linear(5, 3), torch.randn(8, 5), torch.arange(8) % 3
    estimator = GaussNewtonBartlett(model, fraction=1.0)
    estimator.arm(True)
    estimator.note_labels(y.where(y > 0, -100))
    F.cross_entropy(model(x), y.where(y < 2, -100)).backward()
    assert estimator.estimate(list(model.parameters()), 0).num_predictions == int((y < 2).sum())


def test_noted_labels_hold_until_the_next_step_only():
    model, x, y = nn.Linear(5, 3), torch.randn(6, 5), torch.arange(6) % 3
    estimator = GaussNewtonBartlett(model, fraction=1.0, readout=Readout(check=False))
    optimizer = SophiaG(model.parameters(), hessian_interval=1, estimator=estimator)
    counts = []
    original = estimator.estimate
    estimator.estimate = lambda *a: counts.append(original(*a)) or counts[-1]
    estimator.note_labels(y.where(y > 0, -100))
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert [e.num_predictions for e in counts] == [4, 6]


def test_dropout_of_the_pass_differs_from_step_to_step():
    """Two passes over the same batch at the same labels: only the dropout, keyed by the step, can differ."""
    from support import FixedLabels

    model = nn.Sequential(nn.Linear(5, 32), nn.Dropout(), nn.Linear(32, 61))
    x, y = torch.randn(8, 5), torch.arange(8)
    params = list(model.parameters())
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=1, readout=Readout(FixedLabels()))

    def estimate(step):
        estimator.arm(True)
        estimator.note_labels(y)
        F.cross_entropy(model(x), y).backward()
        return flat(estimator.estimate(params, step).diagonal.values())

    assert torch.equal(estimate(3), estimate(3)) and not torch.equal(estimate(3), estimate(4))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_models_are_heard(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(5, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.head(checkpoint(self.inner, x.requires_grad_(), use_reentrant=reentrant).tanh())

    for weighted in (False, True):
        model, x = Checkpointed(), torch.randn(ROWS, 5)
        optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(model))
        z = model(x)
        F.cross_entropy(z, labels(), weight=class_weights(z) if weighted else None).backward()
        if weighted:
            with pytest.raises(ValueError, match="weighs one prediction 3 times"):
                optimizer.step()
        else:
            optimizer.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.parametrize("how", ["wrapped", "estimator on the inner module"])
def test_compiled_models_are_heard(how):
    torch._dynamo.reset()
    inner = nn.Linear(5, CLASSES)
    model = torch.compile(inner, backend="aot_eager")
    optimizer = SophiaG(inner.parameters(), estimator=GaussNewtonBartlett(model if how == "wrapped" else inner))
    z = model(torch.randn(ROWS, 5))
    F.cross_entropy(z, labels(), weight=class_weights(z)).backward()
    with pytest.raises(ValueError, match="weighs one prediction 3 times"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_a_model_compiled_as_one_graph_trains_without_being_heard():
    torch._dynamo.reset()
    inner = nn.Linear(5, CLASSES)
    model = torch.compile(inner, backend="aot_eager", fullgraph=True)
    optimizer = SophiaG(inner.parameters(), hessian_interval=2, estimator=GaussNewtonBartlett(inner))
    for _ in range(3):
        F.cross_entropy(model(torch.randn(ROWS, 5)), labels()).backward()
        optimizer.step()
    assert optimizer.stats()["hessian_updates"] == 2


def test_training_gradients_are_bit_identical_and_nothing_is_kept():
    def gradients(heard):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.Linear(8, CLASSES)), torch.randn(ROWS, 5)
        estimator = GaussNewtonBartlett(model) if heard else None
        if heard:
            estimator.arm(True)
        F.cross_entropy(model(x), labels()).backward()
        if heard:
            (batch,) = estimator._tap.take()
            assert batch.witness._calls == 1 and not batch.witness._kept
        return [p.grad for p in model.parameters()], torch.get_rng_state()

    (heard, one), (alone, two) = gradients(True), gradients(False)
    assert all(torch.equal(a, b) for a, b in zip(heard, alone, strict=True)) and torch.equal(one, two)


def test_what_is_kept_does_not_grow_with_the_classes():
    logits = torch.randn(64, 20_000, requires_grad=True) * 1
    witness = listen(logits, [-1], None, 0)
    F.cross_entropy(logits, torch.arange(64)).backward()
    kept = [t for reading in witness._read.values() for t in tensors(vars(reading))]
    assert sum(t.numel() for t in kept) < 64 * 16 and not witness._kept


def tensors(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def test_a_second_backward_through_the_logits_says_nothing():
    torch.manual_seed(0)
    model, x = nn.Linear(5, CLASSES), torch.randn(ROWS, 5)
    optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(model))
    z = model(x)
    F.cross_entropy(z, labels(), weight=class_weights(z)).backward(retain_graph=True)
    F.cross_entropy(z, labels()).backward()
    optimizer.step()
    assert optimizer.stats()["hessian_updates"] == 1


def test_memorised_rows_say_nothing():
    logits = (50.0 * F.one_hot(labels(), CLASSES)).requires_grad_() * 1
    witness = listen(logits, [-1], None, 0)
    F.cross_entropy(logits, labels()).backward()
    assert witness.heard().complaint is None


def heard(logits, loss):
    """What a witness of `logits` says about `loss(logits)`."""
    logits = logits.requires_grad_() * 1
    witness = listen(logits, [-1], None, 0)
    loss(logits).backward()
    return witness.heard()


def test_a_penalty_on_the_log_sum_exp_is_no_weight():
    logits = torch.randn(ROWS, CLASSES) + torch.arange(ROWS)[:, None] / 2
    said = heard(logits, lambda z: F.cross_entropy(z, labels()) + 4e-4 * z.logsumexp(-1).square().mean())
    assert said.complaint is None and said.weight == pytest.approx(1 / ROWS, rel=1e-3)


@pytest.mark.parametrize("certain", [4.0, 5.0, 6.0, 7.0, 8.0, 12.0])
def test_rounding_of_certain_predictions_is_no_other_loss(certain):
    logits = (certain * F.one_hot(labels(5), 5) + 0.3 * torch.randn(ROWS, 5)).bfloat16()
    assert heard(logits, lambda z: F.cross_entropy(z, labels(5))).complaint is None


def test_peaked_rows_with_smoothed_labels_are_no_weights():
    """The largest entry beside the lowest may be the label's own, with what smoothing leaves of it."""
    for seed in (17, 266, 406, 453):
        torch.manual_seed(seed)
        classes = (300, 1000)[seed % 2]
        y = torch.randint(classes, (40,))
        logits = 40 * torch.rand(40, 1) * torch.randn(40, classes)
        logits[torch.arange(40), y] += 120 * torch.rand(1) * torch.rand(40)
        assert heard(logits, lambda z, y=y: F.cross_entropy(z, y, label_smoothing=0.3)).complaint is None, seed


def test_a_dead_tap_takes_its_hooks_along():
    model = nn.Linear(5, 3)
    for _ in range(3):
        optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(model))
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (1, 1)
    twin = copy.deepcopy(model)
    opened = pickle.loads(pickle.dumps(model))
    del optimizer
    gc.collect()
    assert not model._forward_pre_hooks and not model._forward_hooks
    for other in (twin, opened):
        x = torch.randn(4, 5)
        assert torch.equal(other(x), model(x))
