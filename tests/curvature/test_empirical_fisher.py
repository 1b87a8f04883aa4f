"""EmpiricalFisher: N · g², with N from labels alone, and biased as it says."""

import pytest
import torch
import torch.nn.functional as F
from oracles import curvlinops_ggn_diagonal, flat, relative_error
from torch import nn

from sophia_integrations import EmpiricalFisher, GaussNewtonBartlett, SophiaG
from sophia_integrations.curvature import Bernoulli, Readout


class Labelled(nn.Linear):
    calls = 0

    def forward(self, x, labels=None):
        self.calls += 1
        return super().forward(x)


def optimizer_for(model, **options):
    estimator = EmpiricalFisher(model, **options)
    return SophiaG(model.parameters(), lr=0.0, betas=(0.9, 0.0), weight_decay=0.0, estimator=estimator)


def h_of(optimizer):
    return flat(s["hessian"] for s in optimizer.state.values())


def test_count_of_the_window_times_the_squared_gradient_without_a_forward():
    torch.manual_seed(0)
    model = Labelled(4, 3)
    optimizer = optimizer_for(model)
    for rows, masked in ((5, 2), (3, 0), (4, 4)):
        labels = torch.randint(3, (rows,))
        labels[:masked] = -100
        if masked < rows:
            (F.cross_entropy(model(torch.randn(rows, 4), labels=labels), labels) / 3).backward()
        else:
            model(torch.randn(rows, 4), labels=labels)
    grads = [p.grad for p in model.parameters()]
    expected = 6 * flat(grads).square()
    optimizer.step()
    torch.testing.assert_close(h_of(optimizer), expected)
    assert model.calls == 3 and all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


def test_noted_labels_and_elements_and_rows_are_counted():
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    noted = torch.tensor([0, 1, -100, -100, 2])
    multi = torch.tensor([[0, 1, 1.0]]).expand(5, 3)
    for labels, readout, expected in ((noted, None, 3), (multi, Readout(Bernoulli()), 15), (None, None, 5)):
        model = Labelled(4, 3)
        optimizer = optimizer_for(model, readout=readout)
        optimizer.estimator.note_labels(labels)
        model(x).square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(h_of(optimizer), expected * flat(p.grad for p in model.parameters()).square())


def test_other_ranks_predictions_count_too(monkeypatch):
    """Gradients are already the mean over the ranks; only N is summed. The second rank here is a twin of the first."""
    import torch.distributed as dist

    monkeypatch.setattr("sophia_integrations.curvature.reduction.is_distributed", lambda group: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **options: tensor.mul_(2))
    torch.manual_seed(0)
    model = Labelled(4, 3)
    optimizer = optimizer_for(model)
    model(torch.randn(5, 4), labels=torch.tensor([0, 1, -100, 2, 2])).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(h_of(optimizer), 8 * flat(p.grad for p in model.parameters()).square())


def test_parameters_without_a_gradient_keep_their_h_and_bf16_is_squared_in_float32():
    model = Labelled(4, 3).bfloat16()
    model.bias.requires_grad_(True)
    optimizer = optimizer_for(model)
    model(torch.randn(5, 4).bfloat16())
    model.weight.grad = torch.full((3, 4), 1e-3, dtype=torch.bfloat16)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model.weight]["hessian"], 5 * model.weight.grad.float() ** 2)
    assert "hessian" not in optimizer.state[model.bias]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda model, x: model(x, labels=torch.full((5,), -100)),
            "every label of the rows that it used is masked",
        ),
        (lambda model, x: None, "was not called in training mode"),
        (lambda model, x: (model(x), model.weight.grad.fill_(float("inf"))), "not finite"),
    ],
)
def test_an_estimate_that_cannot_be_made_is_dropped_with_its_reason(spoil, message):
    model = Labelled(4, 3)
    optimizer = SophiaG(model.parameters(), estimator=EmpiricalFisher(model))
    model.weight.grad = torch.zeros(3, 4)
    spoil(model, torch.randn(5, 4))
    with pytest.warns(UserWarning) as caught:
        optimizer.step()
    assert any(message in str(w.message) for w in caught)
    assert optimizer.stats()["hessian_updates"] == 0


def test_another_model_is_refused():
    optimizer = SophiaG(Labelled(4, 3).parameters(), estimator=EmpiricalFisher(Labelled(4, 3)))
    with pytest.raises(ValueError, match="trains no parameter of the Labelled given to EmpiricalFisher"):
        optimizer.step()


def test_it_is_biased_where_the_drawn_labels_are_not():
    """All labels alike, and unlikely to the model: the gradient does not average out, N · g² is far too large."""
    torch.manual_seed(0)
    model = Labelled(4, 3).double()
    x, labels = torch.randn(64, 4, dtype=torch.float64), torch.zeros(64, dtype=torch.int64)
    exact = curvlinops_ggn_diagonal(model, nn.CrossEntropyLoss(), list(model.parameters()), x, labels)

    def first_h(estimator):
        optimizer = SophiaG(model.parameters(), lr=0.0, betas=(0.9, 0.0), weight_decay=0.0, estimator=estimator)
        optimizer.zero_grad()
        F.cross_entropy(model(x, labels=labels), labels).backward()
        optimizer.step()
        return h_of(optimizer)

    assert first_h(EmpiricalFisher(model)).sum() > 10 * exact.sum()
    assert relative_error(first_h(GaussNewtonBartlett(model, fraction=1.0, units=64)), exact) < 4 * (2 / 64) ** 0.5
