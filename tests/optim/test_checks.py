"""What Sophia refuses, in sentences."""

import inspect
import math
import re

import pytest
import torch

from sophia_integrations import SophiaG, SophiaH


@pytest.fixture
def param():
    return torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be a number of at least 0, got -1.0."),
        ({"lr": math.nan}, "lr must be a number of at least 0, got nan."),
        ({"lr": "1e-3"}, "lr must be a number of at least 0, got '1e-3'."),
        ({"lr": True}, "lr must be a number of at least 0, got True."),
        ({"lr": None}, "lr must be a number of at least 0, got None."),
        ({"lr": torch.ones(2)}, "lr must be a number; only lr may be a tensor, with one element."),
        ({"lr": torch.tensor(-2.0)}, "lr must be a number of at least 0, got -2.0."),
        ({"rho": torch.tensor(0.1)}, "rho must be a number; only lr may be a tensor"),
        ({"rho": -0.1}, 'rho must be a number of at least 0, or "auto", got -0.1.'),
        ({"rho": math.inf}, 'rho must be a number of at least 0, or "auto", got inf.'),
        ({"eps": -1e-8}, "eps must be a number of at least 0, got -1e-08."),
        ({"eps": 0}, "eps must be at least 1.2e-38, or float32 rounds it to 0, got 0"),
        ({"eps": 1e-46}, "eps must be at least 1.2e-38, or float32 rounds it to 0, got 1e-46"),
        ({"weight_decay": -0.1}, "weight_decay must be a number of at least 0, got -0.1."),
        ({"betas": 0.9}, "betas must be two numbers, (beta1, beta2), got 0.9."),
        ({"betas": (0.9,)}, "betas must be two numbers, (beta1, beta2), got (0.9,)."),
        ({"betas": (1.0, 0.9)}, "beta1 must be at least 0 and below 1, got 1.0."),
        ({"betas": (0.9, -0.1)}, "beta2 must be at least 0 and below 1, got -0.1."),
        ({"betas": (0.9, math.nan)}, "beta2 must be at least 0 and below 1, got nan."),
        ({"betas": (0.9, "0.99")}, "beta2 must be at least 0 and below 1, got '0.99'."),
        ({"hessian_interval": 0}, "hessian_interval must be a whole number of at least 1, got 0."),
        ({"hessian_interval": 2.5}, "hessian_interval must be a whole number of at least 1, got 2.5."),
        ({"hessian_interval": True}, "hessian_interval must be a whole number of at least 1, got True."),
    ],
    ids=str,
)
def test_hyperparameters_out_of_range(options, message, param):
    for build in (lambda: SophiaG([param], **options), lambda: SophiaG([{"params": [param], **options}])):
        with pytest.raises(ValueError, match=re.escape(message)):
            build()


def test_boundary_values_are_allowed(param):
    SophiaG([param], lr=0, betas=[0, 0], rho=0, eps=1.2e-38, weight_decay=0, hessian_interval=1)


def test_one_interval_for_all_groups(param):
    other = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="hessian_interval must be one value for all groups"):
        SophiaG([{"params": [param], "hessian_interval": 5}, {"params": [other], "hessian_interval": 10}])


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.eye(3).to_sparse(), "Sophia does not support sparse parameters; keep them in another optimizer."),
        (torch.ones(3, dtype=torch.cfloat), "Sophia does not support complex parameters; train torch.view_as_real"),
        (torch.ones(3, dtype=torch.int64), "Sophia trains floating-point parameters only, got dtype torch.int64."),
    ],
    ids=["sparse", "complex", "integer"],
)
def test_parameters_it_cannot_train(tensor, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SophiaG([torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())])


def test_no_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        SophiaG([])


def test_sparse_gradients_are_refused(constant_curvature):
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = SophiaG(embedding.parameters(), estimator=constant_curvature(1))
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients; use sparse=False"):
        optimizer.step()


def test_named_parameters_are_welcome(constant_curvature):
    model = torch.nn.Linear(3, 2)
    optimizer = SophiaG(model.named_parameters(), estimator=constant_curvature(1))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_sophia_h_takes_what_sophia_g_takes_with_its_own_rho():
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (SophiaH, SophiaG))
    assert list(ours) == list(theirs)
    assert [name for name in ours if ours[name].default != theirs[name].default] == ["rho"]
    given = {name: parameter.default for name, parameter in theirs.items() if parameter.kind == parameter.KEYWORD_ONLY}
    given |= dict(hessian_interval=3, nesterov=True, unclipped=(0.5, 0.2), basis="eigen", basis_beta=0.7, maximize=True)
    group = SophiaH([torch.nn.Parameter(torch.ones(3, 4))], **given).param_groups[0]
    assert {name: group[name] for name in given if name in group} == {n: v for n, v in given.items() if n in group}
    assert group["rho"] == 0.01
