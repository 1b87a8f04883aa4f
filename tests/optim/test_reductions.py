"""With the right setting Sophia is another, simpler optimizer."""

import pytest
import torch

from sophia_integrations import SophiaG

pytestmark = pytest.mark.usefixtures("backend")


def gradients(steps, numel=200):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(numel, generator=generator, dtype=torch.float64) for _ in range(steps)]


def run(grads, **options):
    param = torch.nn.Parameter(torch.ones(grads[0].shape, dtype=torch.float64))
    optimizer = SophiaG([param], **{"weight_decay": 0, **options})
    path = []
    for grad in grads:
        param.grad = grad
        optimizer.step()
        path.append(param.detach().clone())
    return torch.stack(path)


def test_rho_zero_is_sign_momentum(curvature):
    grads = gradients(12)
    path = run(grads, lr=0.01, betas=(0.9, 0.99), rho=0, eps=1e-30, hessian_interval=4, estimator=curvature)
    theta, m = torch.ones(200, dtype=torch.float64), 0
    for grad, ours in zip(grads, path, strict=True):
        m = 0.9 * m + 0.1 * grad
        theta = theta - 0.01 * m.sign()
        torch.testing.assert_close(ours, theta)


def test_constant_curvature_without_clipping_is_preconditioned_momentum_sgd(constant_curvature):
    grads = gradients(12)
    options = dict(lr=0.5, betas=(0.9, 0), rho=0.1, hessian_interval=5)
    path = run(grads, **options, estimator=constant_curvature(1000))
    param = torch.nn.Parameter(torch.ones(200, dtype=torch.float64))
    sgd = torch.optim.SGD([param], lr=0.5 / (0.1 * 1000), momentum=0.9)
    for grad, ours in zip(grads, path, strict=True):
        param.grad = 0.1 * grad
        sgd.step()
        torch.testing.assert_close(ours, param.detach())


def test_interval_one_is_refreshing_by_hand_at_every_step(scripted):
    grads = gradients(6)
    sampled = gradients(12)[6:]
    options = dict(lr=0.01, betas=(0.9, 0.8), rho=0.05, hessian_interval=1)
    estimator = scripted(lambda step, params: [32 * sampled[step].square()])
    path = run(grads, **options, estimator=estimator)

    param = torch.nn.Parameter(torch.ones(200, dtype=torch.float64))
    by_hand = SophiaG([param], **options, weight_decay=0)
    for grad, sample, ours in zip(grads, sampled, path, strict=True):
        param.grad = sample
        by_hand.update_hessian(32)
        param.grad = grad
        by_hand.step()
        torch.testing.assert_close(ours, param.detach())
    assert estimator.asked == [0, 1, 2, 3, 4, 5]


def test_beta1_zero_has_no_momentum(constant_curvature):
    grads = gradients(5)
    path = run(grads, lr=0.1, betas=(0, 0), rho=0.5, hessian_interval=1, estimator=constant_curvature(2))
    steps = torch.diff(torch.cat([torch.ones(1, 200, dtype=torch.float64), path]), dim=0)
    torch.testing.assert_close(steps, -0.1 * torch.stack(grads).clamp(-1, 1))


def test_beta2_zero_forgets_all_but_the_last_estimate(scripted):
    estimator = scripted(lambda step, params: [torch.full(p.shape, step + 1.0, dtype=p.dtype) for p in params])
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = SophiaG([param], betas=(0.9, 0), hessian_interval=2, estimator=estimator)
    for expected in (1, 1, 3, 3, 5):
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert (optimizer.state[param]["hessian"] == expected).all()
