"""An optimizer held, step by step, to `reference_step` and to an eigenbasis worked out by hand in float64."""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

import torch

from sophia_integrations.optim import Estimate, reference_step

TOLERANCE = {
    torch.float64: dict(rtol=1e-13, atol=1e-13),
    torch.float32: dict(rtol=1e-6, atol=1e-6),
    torch.float16: dict(rtol=2**-10, atol=1e-6),
    torch.bfloat16: dict(rtol=2**-7, atol=1e-6),
}


class ScriptedEstimator:
    """Supplies ĥ from `supply(step, params)`, a list of tensors or an Estimate, and logs what it is asked."""

    def __init__(self, supply, predictions=1):
        self.supply, self.predictions = supply, predictions
        self.armed, self.asked, self.theta = [], [], []

    def arm(self, due):
        self.armed.append(due)

    def estimate(self, params, step, coordinates=MappingProxyType({})):
        self.asked.append(step)
        self.theta.append([p.detach().clone() for p in params])
        supplied = self.supply(step, params)
        if isinstance(supplied, Estimate):
            return supplied
        return Estimate(dict(zip(params, supplied, strict=True)), self.predictions)


class Pieces(NamedTuple):
    """A parameter as [matrices, rows, columns] and the length of the pieces of each side; 0: it is not rotated."""

    matrices: int
    rows: int
    columns: int
    left: int
    right: int

    def products(self, grad):
        """{"left": G·Gᵀ, "right": Gᵀ·G} of every piece, float64 [matrices · pieces, length, length]."""
        g = grad.reshape(self.matrices, self.rows, self.columns)
        found = {}
        if self.left:
            cuts = [x[i : i + self.left] for x in g for i in range(0, self.rows, self.left)]
            found["left"] = torch.stack([x @ x.T for x in cuts])
        if self.right:
            cuts = [x[:, i : i + self.right] for x in g for i in range(0, self.columns, self.right)]
            found["right"] = torch.stack([x.T @ x for x in cuts])
        return found

    def whole(self, state, suffix="basis"):
        """[(Q_L, Q_R)] of each matrix in float64, block diagonal where a side is cut, I where it is not rotated."""
        sides = []
        for side, size, length in (("left", self.rows, self.left), ("right", self.columns, self.right)):
            pieces = state.get(f"{side}_{suffix}")
            assert (pieces is None) == (length == 0), f"{side} side of {self}"
            if length == 0:
                sides.append([torch.eye(size, dtype=torch.float64)] * self.matrices)
            else:
                assert pieces.shape == (self.matrices * size // length, length, length)
                blocks = pieces.double().split(size // length)
                sides.append([torch.block_diag(*block) for block in blocks])
        return list(zip(*sides, strict=True))


class Specification:
    """`step(optimizer)` takes one step and requires that all that it changed is what it should be.

    Args:
        pieces: the parameters that are rotated, and how.
    """

    def __init__(self, pieces=MappingProxyType({})):
        self.pieces, self._factors = pieces, {}

    def step(self, optimizer):
        groups = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        before = {
            p: (p.detach().clone(), {k: v.clone() for k, v in optimizer.state.get(p, {}).items()}) for p, _ in groups
        }
        estimator, step = optimizer.estimator, optimizer.progress.step
        asked = len(estimator.asked)
        optimizer.step()
        trained = [p for p, _ in groups if p.requires_grad]
        estimates = {}
        if len(estimator.asked) > asked:
            estimates = dict(zip(trained, estimator.supply(step, trained), strict=True))
        for p, group in groups:
            self._check(optimizer, p, group, *before[p], estimates.get(p), step)

    def _check(self, optimizer, p, group, theta, state, estimate, step):
        wide = torch.promote_types(p.dtype, torch.float32)
        m, h = (state.get(k, torch.zeros(p.shape, dtype=wide)).double() for k in ("exp_avg", "hessian"))
        after, grad = optimizer.state.get(p, {}), torch.zeros_like(p) if p.grad is None else p.grad
        pieces = self.pieces.get(p)
        if pieces is not None and p.grad is not None:
            self._check_basis(p, group, state, after, step)
            h = self._carried(pieces, h, state, after)
        bases = [None] if pieces is None else pieces.whole(after)
        shape = p.shape if pieces is None else pieces[:3]
        parts = [x.reshape(shape) if x is not None else None for x in (theta, grad, m, h, estimate)]
        options = {
            k: group[k] for k in ("eps", "weight_decay", "maximize", "nesterov", "bias_correction", "noise_floor")
        }
        options.update(zip(("beta1", "beta2"), group["betas"], strict=True))
        options.update(rho=optimizer.stats()["rho"] if group["rho"] == "auto" else group["rho"], lr=float(group["lr"]))
        options.update(
            step=step, updates=optimizer.progress.hessian_updates, predictions=optimizer.estimator.predictions
        )
        new = []
        for i, basis in enumerate(bases):
            own = [x if x is None or pieces is None else x[i] for x in parts]
            new.append(reference_step(*own, **options, basis=basis))
        new_theta, new_m, new_h = (torch.stack(x).reshape(p.shape) for x in zip(*new, strict=True))
        if p.grad is None:
            new_theta, new_m = theta.double(), m
        torch.testing.assert_close(p.detach(), new_theta.to(p.dtype), **TOLERANCE[p.dtype])
        if after:
            torch.testing.assert_close(after["exp_avg"], new_m.to(wide), **TOLERANCE[wide])
            torch.testing.assert_close(after["hessian"], new_h.to(wide), **TOLERANCE[wide])

    def _check_basis(self, p, group, before, after, step):
        """The factors by hand, and eigenvectors that are theirs, or one power iteration and Gram-Schmidt further."""
        grad = torch.where(p.grad.isfinite(), p.grad.detach().double(), 0)
        beta, held = group["basis_beta"], self._factors.setdefault(p, {})
        young = step < group["basis_warmup"]
        turns = young or step % group["basis_interval"] == 0
        sees = young or step % group["basis_factor_interval"] == 0
        for side, product in self.pieces[p].products(grad).items():
            if side not in held or sees:
                held[side] = product if side not in held else beta * held[side] + (1 - beta) * product
            factor, found = held[side], after[f"{side}_factor"]
            assert found.dtype == torch.promote_types(p.dtype, torch.float32)
            assert (found - factor).abs().max() <= 1e-6 * factor.abs().max()
            old, new = before.get(f"{side}_basis"), after[f"{side}_basis"]
            if old is None or turns:
                assert_eigenvectors(factor, None if old is None else old.double(), new.double())
            else:
                assert torch.equal(old, new)

    def _carried(self, pieces, h, before, after):
        """diag(P diag(h) Pᵀ) with P = (Q_L ⊗ Q_R)ᵀ of now times that of before."""
        bases = [key for key in before if key.endswith("basis")]
        if all(torch.equal(before[key], after[key]) for key in bases):
            return h
        carried = []
        both = zip(h.reshape(pieces[:3]), pieces.whole(before), pieces.whole(after), strict=True)
        for x, (old_left, old_right), (left, right) in both:
            overlap = torch.kron(left.T @ old_left, right.T @ old_right)
            carried.append((overlap @ torch.diag(x.flatten()) @ overlap.T).diagonal())
        return torch.stack(carried).reshape(h.shape)


def assert_eigenvectors(factors, old, new):
    """Orthonormal; F's own eigenvectors from the largest, or with `old` the Q of a QR of F·Q_old, sorted."""
    size = factors.shape[-1]
    eye = torch.eye(size, dtype=torch.float64)
    assert (new.mT @ new - eye).abs().max() < 1e-5
    for factor, q, q_old in zip(factors, new, [None] * len(new) if old is None else old, strict=True):
        trace = factor.trace()
        scaled = (factor / trace if trace > 0 else factor) + 1e-6 * eye
        if q_old is None:
            rotated = q.T @ scaled @ q
            assert (rotated - torch.diag(rotated.diagonal())).abs().max() < 1e-6
            assert (rotated.diagonal().diff() < 1e-6).all()
        else:
            images = scaled @ q_old
            order = (q_old * images).sum(0).argsort(descending=True)
            triangle = q.T @ images[:, order]
            below = triangle.tril(-1).abs()
            assert (below <= 1e-3 * images[:, order].norm(dim=0) + 2e-6).all()


def random_curvature(step, params):
    """ĥ that clips about half of the coordinates at rho 0.05, beta2 0.9 and unit gradients; a function of `step`."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [
        (torch.rand(p.shape, generator=generator) + 0.5)
        .mul_(8)
        .to(p.device, torch.promote_types(p.dtype, torch.float32))
        for p in params
    ]
