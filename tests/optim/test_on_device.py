"""The whole optimizer where SOPHIA_TEST_DEVICE says: it is the specification, and what it is on the CPU."""

import pytest
import torch
from specification import ScriptedEstimator, Specification, random_curvature
from support import DEVICE, FixedLabels, tiny_model, token_rows

from sophia_integrations import GaussNewtonBartlett, SophiaG, param_groups

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.9), rho=0.05, weight_decay=0.1, hessian_interval=2)
FULL = dict(nesterov=True, bias_correction=True, noise_floor=0.5, rho="auto", maximize=True)
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="compares a device with the CPU: SOPHIA_TEST_DEVICE=cuda")


def normal(*shape, seed=0, dtype=torch.float32, device=DEVICE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("options", [{}, FULL], ids=["paper", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_list_of_parameters_follows_the_specification(dtype, options):
    shapes = [(300, 250), (7,), (), (3, 4, 5), (1,)]
    params = [torch.nn.Parameter(normal(*s, seed=i, dtype=dtype)) for i, s in enumerate(shapes)]
    params.append(torch.nn.Parameter(normal(40, 30, seed=9, dtype=dtype).t()))
    optimizer = SophiaG(params, **{**OPTIONS, **options}, estimator=ScriptedEstimator(random_curvature, 50))
    specification = Specification()
    for step in range(5):
        for i, p in enumerate(params):
            p.grad = normal(*p.shape, seed=100 * step + i, dtype=dtype)
        specification.step(optimizer)


@on_a_gpu
def test_the_eigenbasis_as_on_the_cpu():
    def train(device):
        params = [torch.nn.Parameter(normal(12, 20, seed=i, dtype=torch.float64, device=device)) for i in range(4)]
        estimator = ScriptedEstimator(random_curvature)
        optimizer = SophiaG(params, lr=1e-2, basis="eigen", basis_warmup=3, basis_interval=4, estimator=estimator)
        for step in range(12):
            for i, p in enumerate(params):
                p.grad = normal(12, 20, seed=100 * step + i, dtype=torch.float64, device=device)
            optimizer.step()
        return [p.detach().cpu() for p in params]

    for mine, theirs in zip(train(DEVICE), train("cpu"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


@on_a_gpu
@pytest.mark.parametrize("basis", [None, "eigen"])
def test_the_estimate_as_on_the_cpu(basis):
    def estimates(device):
        model = tiny_model().to(device).train()
        estimator = GaussNewtonBartlett(model, fraction=1.0, units=4)
        estimator.readout.likelihood = FixedLabels()
        optimizer = SophiaG(param_groups(model, basis=basis), lr=1e-3, estimator=estimator)
        rows = token_rows(16)
        batch = {k: torch.stack([row[k] for row in rows]).to(device) for k in rows[0]}
        model(**batch).loss.backward()
        optimizer.step()
        return {
            n: optimizer.state[p]["hessian"].sum().cpu()
            for n, p in model.named_parameters()
            if "hessian" in optimizer.state[p]
        }

    mine, theirs = estimates(DEVICE), estimates("cpu")
    assert mine.keys() == theirs.keys()
    for name, total in mine.items():
        torch.testing.assert_close(total, theirs[name], rtol=1e-2, atol=1e-9)
