"""With the same curvature, 50 steps equal the official SophiaG (PyPI `sophia-opt`)."""

import pytest
import torch

from sophia_integrations import SophiaG

pytestmark = pytest.mark.usefixtures("backend")

BATCH = 480


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_fifty_steps(official, dtype, maximize):
    generator = torch.Generator().manual_seed(0)
    shapes = [(30, 20), (70_000,), ()]
    ours, theirs = ([torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in shapes] for _ in range(2))
    common = dict(lr=1e-3, betas=(0.965, 0.99), rho=0.04, weight_decay=0.2, maximize=maximize)
    a = SophiaG(ours, **common, eps=1e-15, hessian_interval=10)
    b = official.SophiaG(theirs, **common)

    def backward(scale):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)
            q.grad = p.grad.clone()

    unclipped = 0
    for step in range(50):
        if step % 10 == 0:
            backward(1.0)
            a.update_hessian(BATCH)
            b.update_hessian()
        backward(3.0)
        a.step()
        b.step(bs=BATCH)
        unclipped += float(a.stats()["win_rate"])
    assert 0.1 < unclipped / 50 < 0.9, "both branches of the clip must be exercised"
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).norm() <= 1e-6 * q.norm()
        assert (a.state[p]["exp_avg"] - b.state[q]["exp_avg"]).norm() <= 1e-6 * b.state[q]["exp_avg"].norm()
        torch.testing.assert_close(a.state[p]["hessian"], BATCH * b.state[q]["hessian"], rtol=1e-5, atol=0)
