"""The eigenvectors themselves: orthonormal for ever, of the right factors, whatever the gradients are."""

import numpy as np
import pytest
import torch
from specification import ScriptedEstimator
from support import run_worker

from sophia_integrations import SophiaG


def rotation(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def eigen(param, **options):
    estimator = ScriptedEstimator(lambda step, params: [torch.ones(p.shape) for p in params])
    defaults = dict(lr=1e-3, basis="eigen", basis_interval=1, hessian_interval=1000)
    return SophiaG([param], **{**defaults, **options}, estimator=estimator)


def train(optimizer, param, gradients):
    for g in gradients:
        param.grad = torch.as_tensor(g, dtype=param.dtype)
        optimizer.step()
    return optimizer.state[param]


def assert_orthonormal(state, tolerance=1e-5):
    for key, q in state.items():
        if key.endswith("basis"):
            assert (q.mT @ q - torch.eye(q.shape[-1])).abs().max() < tolerance, key


def gradients_of(rows, columns, left, right, steps, seed=0, scale=1.0, decay=3.0):
    """Gradients Q_L diag(a) Z diag(b) Q_Rᵀ: their covariances have the eigenvectors Q_L, Q_R in this order."""
    draw = np.random.default_rng(seed)
    a, b = decay ** -np.arange(rows), 2.0 ** -np.arange(columns)
    for _ in range(steps):
        z = draw.standard_normal((rows, columns))
        yield scale * left @ (a[:, None] * z * b) @ right.T


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e20])
@pytest.mark.parametrize("interval", [1, 10])
def test_it_converges_to_the_eigenbasis_of_a_stationary_covariance(scale, interval):
    left, right = rotation(5, 1), rotation(7, 2)
    param = torch.nn.Parameter(torch.zeros(5, 7))
    optimizer = eigen(param, basis_beta=0.99, basis_interval=interval, basis_warmup=0)
    state = train(optimizer, param, gradients_of(5, 7, left, right, 600, scale=scale))
    for found, known in ((state["left_basis"][0], left), (state["right_basis"][0], right)):
        overlap = np.abs(found.numpy().T @ known)
        assert (overlap.diagonal() > 0.97).all(), "each vector at its own place in the order"
        assert overlap.diagonal().min() > 2 * np.triu(overlap, 1).max()
    assert param.isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_the_trajectory_of_q_in_float64_numpy(steps):
    """eigh once, then F·Q sorted by Rayleigh quotients and orthonormalised, with factors by hand: up to signs."""
    param = torch.nn.Parameter(torch.zeros(6, 6))
    optimizer = eigen(param, basis_beta=0.7, basis_warmup=3, basis_interval=5)
    gradients = list(gradients_of(6, 6, rotation(6, 3), rotation(6, 4), steps, seed=5, decay=1.5))
    state = train(optimizer, param, gradients)
    factor, q = 0.0, None
    for step, g in enumerate(gradients):
        factor = g @ g.T if q is None else 0.7 * factor + 0.3 * (g @ g.T)
        scaled = factor / factor.trace() + 1e-6 * np.eye(6)
        if q is None:
            q = np.linalg.eigh(scaled)[1][:, ::-1]
        elif step < 3 or step % 5 == 0:
            images = scaled @ q
            q = np.linalg.qr(images[:, np.argsort(-(q * images).sum(0))])[0]
    assert np.abs(np.abs(state["left_basis"][0].numpy().T @ q) - np.eye(6)).max() < 5e-3


def test_orthonormal_after_300_steps_of_every_kind():
    shapes = {"square": (24, 24), "wide": (8, 40), "low rank": (24, 16), "experts": (2, 9, 12), "two": (2, 2)}
    params = {name: torch.nn.Parameter(torch.zeros(s)) for name, s in shapes.items()}
    estimator = ScriptedEstimator(lambda step, params: [torch.ones(p.shape) for p in params])
    optimizer = SophiaG(
        params.values(), lr=1e-3, basis="eigen", basis_warmup=50, hessian_interval=50, estimator=estimator
    )
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=draw) * 10 ** float(torch.randn((), generator=draw))
        u = torch.randn(24, 1, generator=draw)
        params["low rank"].grad = u @ torch.randn(1, 16, generator=draw)
        optimizer.step()
    for name, p in params.items():
        assert_orthonormal(optimizer.state[p])
        assert p.isfinite().all() and optimizer.state[p]["hessian"].isfinite().all(), name
        assert (optimizer.state[p]["hessian"] > 0).all(), name


def test_the_same_direction_for_ever():
    """A rank of one, at every step the same: F·Q has nearly parallel columns, where Cholesky fails and QR does not."""
    left, right = rotation(6, 1), rotation(8, 2)
    param = torch.nn.Parameter(torch.zeros(6, 8))
    optimizer = eigen(param)
    train(optimizer, param, gradients_of(6, 8, left, right, 1))
    state = train(optimizer, param, [5 * np.outer(left[:, 3], right[:, 2])] * 300)
    assert_orthonormal(state)
    assert abs(float(state["left_basis"][0, :, 0].numpy() @ left[:, 3])) > 0.999
    assert abs(float(state["right_basis"][0, :, 0].numpy() @ right[:, 2])) > 0.999


@pytest.mark.parametrize("before", [0, 5])
def test_zero_gradients(before):
    """LoRA's A at the start: its gradient is zero until B has moved."""
    param = torch.nn.Parameter(torch.randn(4, 12, generator=torch.Generator().manual_seed(0)))
    optimizer = eigen(param, weight_decay=0.0)
    start = param.detach().clone()
    state = train(optimizer, param, [np.zeros((4, 12))] * before)
    assert not before or torch.equal(param.detach(), start)
    left, right = rotation(4, 1), rotation(12, 2)
    state = train(optimizer, param, gradients_of(4, 12, left, right, 100))
    assert_orthonormal(state)
    assert abs(float(state["left_basis"][0, :, 0].numpy() @ left[:, 0])) > 0.99
    state = train(optimizer, param, [np.zeros((4, 12))] * 300)
    assert_orthonormal(state)
    assert param.isfinite().all()


@pytest.mark.parametrize("gradient", [np.zeros((6, 8)), np.eye(6, 8, 1)[:1].repeat(6, 0)], ids=["zero", "rank one"])
def test_directions_without_gradient_keep_their_eigenvectors(gradient):
    param = torch.nn.Parameter(torch.zeros(6, 8))
    optimizer = eigen(param, basis_beta=0.0)
    train(optimizer, param, gradients_of(6, 8, rotation(6, 1), rotation(8, 2), 1))
    for _ in range(5):
        state = train(optimizer, param, [gradient])
        before = state["right_basis"][0].clone()
    after = train(optimizer, param, [gradient])["right_basis"][0]
    overlap = (after.T @ before).abs()
    assert (overlap.amax(0) > 0.9).all() and (overlap.amax(1) > 0.9).all(), "the same vectors, in any order"
    if not gradient.any():
        assert (after.abs() < 0.99).all(), "those of the first gradient"


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e19, 1e20, 3e38])
def test_tiny_and_huge_gradients(scale):
    param = torch.nn.Parameter(torch.zeros(5, 6))
    optimizer = eigen(param, weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        param.grad = (torch.rand(5, 6, generator=draw) - 0.5) * scale
        optimizer.step()
    state = optimizer.state[param]
    assert_orthonormal(state)
    assert all(value.isfinite().all() for value in state.values()) and param.isfinite().all()
    if scale > 1:
        assert 0.5e-3 < param.norm() / 20 <= 1e-3 * 30**0.5 * 1.001, "the clip holds whatever the gradient"


def test_a_spike_does_not_stop_the_basis_from_turning():
    left, right = rotation(4, 1), rotation(4, 2)
    param = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = eigen(param, basis_beta=0.5)
    train(optimizer, param, gradients_of(4, 4, left, right, 5))
    train(optimizer, param, [1e6 * np.outer(left[:, 3], right[:, 3])])
    state = train(optimizer, param, gradients_of(4, 4, left, right, 200))
    assert_orthonormal(state)
    assert abs(float(state["left_basis"][0, :, 0].numpy() @ left[:, 0])) > 0.9


@pytest.mark.parametrize("choice", ["allow_tf32 = True", "fp32_precision = 'tf32'"])
def test_tf32_is_off_for_the_factors_and_afterwards_as_it_was(choice):
    """torch remembers for good which of the two was used, so each has a process of its own."""
    if "fp32_precision" in choice and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch knows allow_tf32 only")
    run_worker("tf32", f"torch.backends.cuda.matmul.{choice}", timeout=60)


def test_the_young_basis_turns_at_every_step_and_then_every_few():
    param = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = eigen(param, basis_interval=4, basis_warmup=3)
    turned, before = [], None
    for g in gradients_of(4, 4, rotation(4, 1), rotation(4, 2), 13):
        q = train(optimizer, param, [g])["left_basis"].clone()
        turned.append(before is None or not torch.equal(q, before))
        before = q
    assert [i for i, t in enumerate(turned) if t] == [0, 1, 2, 4, 8, 12]
