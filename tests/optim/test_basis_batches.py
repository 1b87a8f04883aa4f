"""The eigenbasis of many parameters at a time is that of each alone, by fewer products and without copies."""

from collections import Counter

import pytest
import torch
from specification import ScriptedEstimator, random_curvature
from support import DEVICE, through_file
from torch.utils._python_dispatch import TorchDispatchMode

from sophia_integrations import SophiaG
from sophia_integrations.optim import basis as module
from sophia_integrations.optim import eigenvectors, functional
from sophia_integrations.optim.basis import Basis, average, batches, carry_hessian, into, layout_of, out_of
from sophia_integrations.optim.eigenvectors import refresh

SHAPES = [(6, 8), (5, 3), (6, 8), (3, 4, 4), (6, 8), (6, 8), (3, 4, 4), (7, 4), (12, 4), (12, 4)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def bases_of(shapes=SHAPES, cap=6):
    return [
        Basis(layout_of(torch.Size(s), cap), {"hessian": normal(*s, seed=50 + i).abs()}) for i, s in enumerate(shapes)
    ]


def gradients_of(shapes=SHAPES, seed=0):
    return [normal(*s, seed=seed + i) for i, s in enumerate(shapes)]


def in_batches(product, bases, xs):
    found = {}
    for members in batches(bases, xs, "basis"):
        found |= zip(members, product([bases[i] for i in members], [xs[i] for i in members]), strict=True)
    return [found[i] for i in range(len(xs))]


class Counted(TorchDispatchMode):
    """How often each operator was called."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("limit", [1, 100, 1 << 18], ids=["one at a time", "two at a time", "all"])
def test_equal_to_one_after_another(limit, monkeypatch):
    together, alone = bases_of(), bases_of()
    monkeypatch.setattr(module, "CPU_BATCH", limit)
    monkeypatch.setattr(module, "DEVICE_BATCH", limit)
    for step in range(4):
        gradients = gradients_of(seed=100 * step)
        average(together, gradients, 0.8)
        turned = refresh([side for basis in together for side in basis.sides()])
        carry_hessian(together, turned)
        for basis, gradient in zip(alone, gradients, strict=True):
            average([basis], [gradient], 0.8)
            carry_hessian([basis], refresh(basis.sides()))
        rotated = in_batches(into, together, gradients)
        returned = in_batches(out_of, together, rotated)
        for i, basis in enumerate(alone):
            torch.testing.assert_close(rotated[i], basis.into(gradients[i]), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(returned[i], gradients[i], rtol=1e-4, atol=1e-5)
            assert together[i].state.keys() == basis.state.keys()
            for name, value in basis.state.items():
                torch.testing.assert_close(together[i].state[name], value, rtol=1e-4, atol=1e-4)
                assert together[i].state[name].shape == value.shape


def test_those_of_one_layout_are_one_product_and_nothing_is_copied_a_second_time():
    shapes = [(6, 8)] * 5
    bases, gradients = bases_of(shapes), gradients_of(shapes)
    for _ in range(2):
        average(bases, gradients, 0.8)
        refresh([side for basis in bases for side in basis.sides()])
        into(bases, gradients)
    with Counted() as counted:
        rotated = into(bases, gradients)
        out_of(bases, rotated)
    assert counted.calls["bmm"] == 4 and counted.calls["cat"] == 0
    with Counted() as counted:
        average(bases, gradients, 0.8)
    assert counted.calls["bmm"] == 2 and counted.calls["lerp_"] == 2 and counted.calls["cat"] == 0


def test_a_parameter_that_comes_late_does_not_stand_beside_those_that_are_known():
    shapes = [(6, 8)] * 3
    bases, gradients = bases_of(shapes), gradients_of(shapes)
    average(bases[:2], gradients[:2], 0.8)
    known = [basis.state["left_factor"].clone() for basis in bases[:2]]
    average(bases, gradients, 0.8)
    for basis, gradient, factor in zip(bases, gradients, [*known, None], strict=True):
        product = gradient @ gradient.T
        expected = product if factor is None else 0.8 * factor[0] + 0.2 * product
        torch.testing.assert_close(basis.state["left_factor"][0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["another order", "fewer", "one replaced", "from a file"])
def test_states_that_no_longer_lie_side_by_side_are_brought_together_again(change):
    shapes = [(6, 8)] * 4
    bases, gradients = bases_of(shapes), gradients_of(shapes)
    average(bases, gradients, 0.8)
    refresh([side for basis in bases for side in basis.sides()])
    expected = [basis.into(g) for basis, g in zip(bases, gradients, strict=True)]
    into(bases, gradients)
    if change == "another order":
        bases, gradients, expected = bases[::-1], gradients[::-1], expected[::-1]
    elif change == "fewer":
        bases, gradients, expected = bases[1:3], gradients[1:3], expected[1:3]
    elif change == "one replaced":
        bases[2].state["left_basis"] = -bases[2].state["left_basis"]
        expected[2] = -expected[2]
    else:
        for basis in bases:
            basis.state.update(through_file(basis.state))
    for found, x in zip(into(bases, gradients), expected, strict=True):
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def test_gradients_that_are_not_finite_count_as_zero_and_huge_ones_fit():
    shapes = [(4, 4)] * 3
    bases, gradients = bases_of(shapes), gradients_of(shapes)
    gradients[0][1, 2] = float("nan")
    gradients[1] *= 1e30
    average(bases, gradients, 0.8)
    finite = torch.where(gradients[0].isfinite(), gradients[0], 0)
    torch.testing.assert_close(bases[0].state["left_factor"][0], finite @ finite.T, rtol=1e-5, atol=1e-5)
    assert all(basis.state["left_factor"].isfinite().all() for basis in bases)
    scaled = gradients[1] * (2.0**50 / gradients[1].abs().max())
    torch.testing.assert_close(bases[1].state["left_factor"][0], scaled @ scaled.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bases[2].state["left_factor"][0], gradients[2] @ gradients[2].T, rtol=1e-5, atol=1e-5)


def test_many_equal_matrices_are_trained_as_if_each_were_alone():
    def train(groups):
        estimator = ScriptedEstimator(random_curvature)
        optimizer = SophiaG(groups, lr=1e-2, basis="eigen", basis_warmup=2, basis_interval=3, estimator=estimator)
        params = [p for group in groups for p in group["params"]]
        for step in range(7):
            for i, p in enumerate(params):
                p.grad = normal(*p.shape, seed=100 * step + i)
            optimizer.step()
        return params, optimizer.state_dict()["state"]

    params = [torch.nn.Parameter(normal(6, 8, seed=i)) for i in range(5)]
    alone = [torch.nn.Parameter(normal(6, 8, seed=i)) for i in range(5)]
    (_, together), (_, single) = train([{"params": params}]), train([{"params": [p]} for p in alone])
    for i, (p, q) in enumerate(zip(params, alone, strict=True)):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
        assert together[i].keys() == single[i].keys()


def test_vectors_stay_where_rounding_has_won():
    images, vectors = normal(2, 6, 6, seed=1), normal(2, 6, 6, seed=2)
    images[0, :, 3] = 0
    found = eigenvectors._cholesky_qr(images, otherwise=vectors)
    assert torch.equal(found[0], vectors[0])
    torch.testing.assert_close(found[1].T @ found[1], torch.eye(6, device=DEVICE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [8, 64, 256])
@pytest.mark.parametrize("spectrum", ["one direction", "half of them", "falling to nothing"])
def test_cholesky_is_as_good_as_householder_when_the_images_are_nearly_parallel(size, spectrum):
    """A basis that has nothing to do with the factor: all of its images point where the factor is large."""
    values = {
        "one direction": torch.cat([torch.ones(1), torch.zeros(size - 1)]),
        "half of them": torch.cat([torch.ones(size // 2), torch.zeros(size - size // 2)]),
        "falling to nothing": torch.logspace(0, -8, size),
    }[spectrum].to(DEVICE)
    directions, vectors = (torch.linalg.qr(normal(3, size, size, seed=i))[0] for i in (1, 2))
    factors = eigenvectors._damped((directions * values) @ directions.mT)
    images = factors @ vectors
    found, images = eigenvectors._cholesky_qr(images, otherwise=vectors).double(), images.double()
    eye = torch.eye(size, dtype=torch.float64, device=DEVICE)
    assert (found.mT @ found - eye).abs().max() < 1e-5
    triangle = found.mT @ images
    assert (triangle.tril(-1).abs() <= 1e-5 * images.norm(dim=1, keepdim=True) + 2e-8).all()


def test_a_step_sorts_its_matrices_into_batches_once(monkeypatch):
    params = [torch.nn.Parameter(normal(*shape)) for shape in SHAPES]
    estimator = ScriptedEstimator(random_curvature)
    options = dict(basis="eigen", basis_warmup=1, basis_interval=50, basis_factor_interval=50)
    optimizer = SophiaG(params, lr=1e-2, hessian_interval=50, estimator=estimator, **options)
    sorted_at_once = []

    def counted(bases, xs, what):
        sorted_at_once.append(len(bases))
        return batches(bases, xs, what)

    for step in range(2):
        for i, p in enumerate(params):
            p.grad = normal(*p.shape, seed=10 * step + i)
        if step:
            for each in (module, functional):
                monkeypatch.setattr(each, "batches", counted)
        optimizer.step()
    assert [n for n in sorted_at_once if n] == [len(SHAPES)]
