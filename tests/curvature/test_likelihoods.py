"""Every likelihood: the mean of ĥ is the Gauss-Newton diagonal of the loss as torch or Hugging Face computes it."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    backpack_ggn_diagonal,
    curvlinops_ggn_diagonal,
    draws_of,
    relative_error,
    squared_draw_error,
)
from torch import nn

from sophia_integrations import GaussNewtonBartlett
from sophia_integrations.curvature import Bernoulli, Categorical, Gaussian, Product, Readout
from sophia_integrations.curvature.sampling import keyed_generator

CPU = torch.device("cpu")
TOKENS, LENGTH, WIDTH = 7, 4, 8


class Trunk(nn.Module):
    """One transformer layer: tokens [batch, length] to hidden [batch, length, width]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, tokens):
        hidden = self.embed(tokens) + self.position
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(hidden)).chunk(3, -1))
        mixed = (torch.softmax(q @ k.mT / math.sqrt(WIDTH / 2), -1) @ v).transpose(1, 2).flatten(-2)
        hidden = hidden + self.project(mixed)
        return hidden + self.mlp(hidden)


class Model(nn.Module):
    """A trunk and a few linear heads, whose outputs lie side by side in the last dimension."""

    def __init__(self, trunk, width, heads):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in heads)

    def forward(self, x, labels=None):
        hidden = self.trunk(x)
        return torch.cat([head(hidden) for head in self.heads], -1)


class SpanReadout(Readout):
    """Question answering: logits [batch, 2·length] of the MLP, or [batch, length, 2] of the transformer."""

    def predictions(self, output, labels, batch):
        return split_spans(output), tuple(labels.unbind(1))


def split_spans(output):
    return tuple(output.unbind(-1)) if output.ndim == 3 else tuple(output.chunk(2, -1))


class Tokens(nn.CrossEntropyLoss):
    def forward(self, prediction, y):
        return super().forward(prediction.flatten(0, -2), y.flatten())


class Kept(nn.Module):
    """torch's own mean loss over the elements whose label is not NaN."""

    reduction = "mean"

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, prediction, y):
        keep = ~y.isnan()
        return self.loss(prediction[keep], y[keep])


class Spans(nn.Module):
    """The loss of Hugging Face's question answering heads."""

    reduction = "mean"

    def forward(self, prediction, y):
        from transformers.loss.loss_utils import ForQuestionAnsweringLoss

        start, end = split_spans(prediction)
        return ForQuestionAnsweringLoss(start, end, y[:, 0], y[:, 1])


CASES = {
    "categorical": (Readout(Categorical()), Tokens()),
    "bernoulli": (Readout(Bernoulli()), Kept(nn.BCEWithLogitsLoss())),
    "gaussian": (Readout(Gaussian()), Kept(nn.MSELoss())),
    "half-gaussian": (Readout(Gaussian(variance=1.0)), Kept(lambda f, y: F.mse_loss(f, y) / 2)),
    "question-answering": (SpanReadout(Product(Categorical(), Categorical())), Spans()),
}


def make(kind, case, rows=6):
    """(model, x, y, readout, loss) in float64, with masked labels: the last rows have fewer than the others."""
    torch.manual_seed(3)
    readout, loss = CASES[case]
    mlp = kind == "mlp"
    heads = {"categorical": [5], "question-answering": [5, 5] if mlp else [1, 1]}.get(case, [1, 1, 1])
    x = torch.randn(rows, 4, dtype=torch.float64) if mlp else torch.randint(TOKENS, (rows, LENGTH))
    trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh()) if mlp else Trunk()
    if mlp:
        x[-3:] *= 3
    model = Model(trunk, 6 if mlp else WIDTH, heads).double()
    shape = (rows,) if mlp else (rows, LENGTH)
    if case == "categorical":
        y = torch.randint(5, shape)
        y[-3:] = y[-3:].masked_fill(torch.rand(y[-3:].shape) < 0.8, -100)
    elif case == "question-answering":
        y = torch.randint(LENGTH, (rows, 2))
    else:
        y = torch.randn(*shape, 3, dtype=torch.float64)
        y = (y > 0).double() if case == "bernoulli" else y
        y[-2:] = y[-2:].masked_fill(torch.rand(y[-2:].shape) < 0.6, math.nan)
    return model, x, y, readout, loss


def backpack_terms(case, x, y):
    """The MLP cases as plain chains with summed losses, one per head."""

    def terms(model):
        for k, head in enumerate(model.heads):
            layers = [*model.trunk, head]
            if case == "categorical":
                keep = y != -100
                yield layers, x[keep], y[keep], nn.CrossEntropyLoss(reduction="sum")
            elif case == "question-answering":
                yield layers, x, y[:, k], nn.CrossEntropyLoss(reduction="sum")
            else:
                keep = ~y[:, k].isnan()
                loss = nn.BCEWithLogitsLoss if case == "bernoulli" else nn.MSELoss
                yield layers, x[keep], y[keep, k : k + 1], loss(reduction="sum")

    return terms


def count_of(case, y):
    return int((y != -100).sum() if case == "categorical" else (~y.isnan()).sum())


def exact_diagonal(kind, case, model, x, y, loss):
    """curvlinops' diagonal; on the MLP it must agree with BackPACK's."""
    params = [p for p in model.parameters()]
    exact = curvlinops_ggn_diagonal(model, loss, params, x, y)
    if kind == "mlp":
        backpack = backpack_ggn_diagonal(model, backpack_terms(case, x, y), count_of(case, y))
        torch.testing.assert_close(backpack / (2 if case == "half-gaussian" else 1), exact, rtol=1e-10, atol=1e-14)
    return exact


def error_of_mean(kind, case, draws, units):
    model, x, y, readout, loss = make(kind, case)
    exact = exact_diagonal(kind, case, model, x, y, loss)
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=units, readout=readout)
    mean = draws_of(estimator, lambda: model(x, labels=y), list(model.parameters()), draws).mean(0)
    return relative_error(mean, exact), float(mean.sum() / exact.sum())


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
@pytest.mark.parametrize("case", CASES)
def test_mean_of_estimates_is_the_exact_gauss_newton_diagonal(kind, case):
    error, scale = error_of_mean(kind, case, draws=200, units=3)
    bound = 2 * squared_draw_error(200 * 3)
    assert error < bound and abs(scale - 1) < bound, (error, scale, bound)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "transformer"])
@pytest.mark.parametrize("case", CASES)
def test_eight_thousand_draws_are_within_three_percent(kind, case, record_property):
    error, scale = error_of_mean(kind, case, draws=8000, units=1)
    record_property("error", error)
    print(f"\n{kind} {case}: relative error {error:.4f}, scale {scale:.4f}")
    assert error <= 0.03 and abs(scale - 1) <= 0.03


class Poisson:
    """A likelihood of a user's own: counts with prediction = log rate; a negative label does not count."""

    def sample(self, prediction, labels, generator):
        return torch.poisson(prediction.exp(), generator).where(labels >= 0, -1)

    def nll_sum(self, prediction, sampled):
        losses = F.poisson_nll_loss(prediction, sampled, reduction="none")
        return losses.where(sampled >= 0, 0).sum()

    def count(self, prediction, labels):
        return (labels >= 0).sum()


def test_any_object_with_the_three_methods_is_a_likelihood():
    torch.manual_seed(0)
    model = Model(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), 6, [1]).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 3, -1, 1, -1, 2.0], dtype=torch.float64)
    keep = y >= 0
    loss = nn.PoissonNLLLoss()
    exact = curvlinops_ggn_diagonal(model, loss, list(model.parameters()), x[keep], y[keep, None])
    estimator = GaussNewtonBartlett(model, fraction=1.0, units=3, readout=Readout(Poisson()))
    mean = draws_of(estimator, lambda: model(x, labels=y), list(model.parameters()), 300).mean(0)
    assert relative_error(mean, exact) < 2 * squared_draw_error(300 * 2)


@pytest.mark.parametrize(
    ("likelihood", "masked"),
    [(Categorical(), -100), (Categorical(ignore_index=-1), -1), (Bernoulli(), -100), (Bernoulli(), math.nan)]
    + [(Gaussian(), math.nan)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_label_neither_counts_nor_pulls(likelihood, masked, dtype):
    torch.manual_seed(0)
    prediction = torch.randn(5, 3, dtype=dtype)
    shape = (5,) if isinstance(likelihood, Categorical) else (5, 3)
    labels = torch.ones(shape, dtype=torch.int64 if masked == masked else torch.float32)
    labels[1:3] = masked
    prediction[1:3] = math.inf if len(shape) == 2 else 1e4
    prediction.requires_grad_()
    sampled = likelihood.sample(prediction.detach(), labels, keyed_generator(CPU, 0))
    kept = labels[[0, 3, 4]].numel()
    assert int(likelihood.count(prediction, sampled)) == int(likelihood.count(None, labels)) == kept
    likelihood.nll_sum(prediction, sampled).backward()
    assert not prediction.grad[1:3].any() and prediction.grad[[0, 3, 4]].isfinite().all()
    assert prediction.grad[[0, 3, 4]].any()


def test_without_labels_every_prediction_counts():
    prediction = torch.zeros(4, 3)
    for likelihood, expected in ((Categorical(), 4), (Bernoulli(), 12), (Gaussian(), 12)):
        sampled = likelihood.sample(prediction, None, keyed_generator(CPU, 0))
        assert int(likelihood.count(prediction, sampled)) == expected
    pair = Product(Categorical(), Gaussian())
    sampled = pair.sample((prediction, prediction), None, keyed_generator(CPU, 0))
    assert int(pair.count((prediction, prediction), sampled)) == 16


def test_samples_follow_the_prediction():
    logits = torch.tensor([-2.0, 0.0, 1.5]).expand(40_000, 3)
    drawn = Bernoulli().sample(logits, None, keyed_generator(CPU, 1))
    assert (drawn.mean(0) - logits[0].sigmoid()).abs().max() < 4 * 0.5 / 200
    drawn = Gaussian(variance=0.5).sample(logits.bfloat16(), None, keyed_generator(CPU, 2))
    assert drawn.dtype == torch.float32
    assert (drawn.mean(0) - logits[0]).abs().max() < 4 * 0.5**0.5 / 200
    assert (drawn.var(0) - 0.5).abs().max() < 4 * 0.5 * 2**0.5 / 200


def test_question_answering_counts_both_ends():
    pair = Product(Categorical(), Categorical())
    starts, ends = torch.tensor([1, 2, -100]), torch.tensor([2, -100, -100])
    assert int(pair.count(None, (starts, ends))) == 3
    logits = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    pair.nll_sum(logits, (starts, ends)).backward()
    hand = F.cross_entropy(logits[0][:2], starts[:2], reduction="sum") + F.cross_entropy(logits[1][:1], ends[:1])
    torch.testing.assert_close(pair.nll_sum(logits, (starts, ends)), hand)
    assert not logits[0].grad[2].any() and not logits[1].grad[1:].any()


def test_labels_reach_predictions_of_the_same_size_in_another_shape():
    """Regression heads return [batch, 1] for labels [batch]; multiple choice scores [batch, choices]."""
    readout = Readout(Gaussian())
    prediction, labels = readout.predictions(torch.zeros(5, 1), torch.arange(5.0), None)
    assert prediction.shape == labels.shape == (5, 1) and readout.likelihood.count(prediction, labels) == 5
    prediction, labels = readout.predictions(torch.zeros(5), torch.arange(5.0), None)
    assert prediction.shape == labels.shape == (5,)
    prediction, labels = Readout().predictions(torch.zeros(2, 4), torch.tensor([3, 0]), None)
    assert prediction.shape == (2, 4) and labels.shape == (2,)


@pytest.mark.parametrize(
    ("likelihood", "prediction", "labels", "message"),
    [
        (Categorical(), torch.zeros(4, 1), None, "one class"),
        (Categorical(), torch.zeros(4), None, r"needs logits \[rows, classes\]"),
        (Categorical(), torch.zeros(4, 3), torch.zeros(4, 3), "need labels of shape \\[4\\]"),
        (Bernoulli(), torch.zeros(4, 3), torch.zeros(4), "need labels of shape \\[4, 3\\]"),
        (Gaussian(), torch.zeros(4, 3), torch.zeros(4), "need labels of shape \\[4, 3\\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(likelihood, prediction, labels, message):
    with pytest.raises(ValueError, match=message):
        likelihood.sample(prediction, labels, keyed_generator(CPU, 0))


def test_a_class_cannot_be_the_label_to_ignore():
    with pytest.raises(ValueError, match="ignore_index must be negative, got 0"):
        Categorical(ignore_index=0)


@pytest.mark.parametrize("variance", [0, -1.0, math.nan, math.inf])
def test_bad_variance_is_refused(variance):
    with pytest.raises(ValueError, match="variance must be a positive number"):
        Gaussian(variance)


def test_what_is_printed_says_what_is_estimated():
    readout = Readout(Product(Categorical(), Gaussian(2.0), Bernoulli()), batch_dim=1)
    shown = repr(GaussNewtonBartlett(torch.nn.Linear(2, 3), fraction=0.5, units=4, seed=7, readout=readout))
    assert shown == (
        "GaussNewtonBartlett(Linear, fraction=0.5, units=4, seed=7, readout=Readout(Product(Categorical("
        "ignore_index=-100), Gaussian(variance=2.0), Bernoulli()), batch_dim=1, class_dim=None))"
    )
