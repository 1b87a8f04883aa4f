"""The eigenbasis: where a matrix's curvature is close to diagonal, kept up to date from its training gradients.

For a matrix with gradient G the factors are running averages of G·Gᵀ and Gᵀ·G, and the basis their eigenvectors Q_L and
Q_R (Shampoo's, arXiv 1802.09568; SOAP runs Adam in it, arXiv 2409.11321, §4). X has the coordinates Q_Lᵀ X Q_R there.
A side longer than a cap is cut into pieces of equal length with a factor each: the factor becomes block diagonal.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gradients import usable_gradient
from .state import Groups, States, sophia_members, state_dtype, state_of

SHORTEST_CAP, ASPECT = 128, 4
"""A piece of the longer side is at most `ASPECT` times the shorter one, which bounds the state of LoRA's thin matrices;
up to `SHORTEST_CAP` no side is cut but by the caller's own cap."""

_LARGEST = 2.0**50
"""Larger gradients are scaled down to it for the factors, whose float32 their squares would not fit into."""

_DAMPING = 1e-6
"""Share of a factor's trace added to its diagonal: directions without gradient keep their eigenvectors."""


@dataclass(frozen=True)
class Layout:
    """A parameter as matrices [matrices, rows, columns], each side in pieces of one length; 0 leaves a side alone."""

    matrices: int
    rows: int
    columns: int
    left: int
    right: int

    @property
    def floats(self) -> int:
        """Numbers that factors and eigenvectors take."""
        return 2 * self.matrices * (self.rows * self.left + self.columns * self.right)

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """The shape of each state tensor."""
        pieces = {"left": (self.rows, self.left), "right": (self.columns, self.right)}
        return {
            f"{side}_{what}": (self.matrices * size // length, length, length)
            for side, (size, length) in pieces.items()
            if length
            for what in ("factor", "basis")
        }

    def apply(self, x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        """left · x · rightᵀ, piece by piece.

        Args:
            x: anything with the parameter's elements in its order.
            left: [matrices · pieces, left, left], or None for a side to leave.
            right: [matrices · pieces, right, right], or None.

        Returns:
            [matrices, rows, columns].
        """
        if left is not None:
            x = torch.bmm(left, x.reshape(left.shape[0], self.left, self.columns))
        if right is not None and self.right == self.columns:
            x = torch.bmm(x.reshape(self.matrices, self.rows, self.columns), right.mT)
        elif right is not None:
            pieces = self.columns // self.right
            x = x.reshape(self.matrices, self.rows, pieces, self.right).transpose(1, 2)
            x = torch.matmul(x, right.view(self.matrices, pieces, self.right, self.right).mT).transpose(1, 2)
        return x.reshape(self.matrices, self.rows, self.columns)

    def products(self, gradient: Tensor) -> dict[str, Tensor]:
        """G·Gᵀ and Gᵀ·G of the pieces, under the names of the factors."""
        products = {}
        if self.left:
            g = gradient.reshape(-1, self.left, self.columns)
            products["left_factor"] = torch.bmm(g, g.mT)
        if self.right:
            g = gradient.reshape(self.matrices, self.rows, -1, self.right).transpose(1, 2)
            products["right_factor"] = torch.matmul(g.mT, g).reshape(-1, self.right, self.right)
        return products


@functools.cache
def layout_of(shape: torch.Size, max_dim: int | None, flatten: bool = False) -> Layout | None:
    """How a parameter of `shape` is rotated; None where it is not: no matrix, or both sides too long to be cut.

    Three dimensions are a batch of matrices, more are a convolution's and become [rows, rest].

    Args:
        max_dim: longest piece of a side. None: the shorter side of the matrix, or `SHORTEST_CAP`.
        flatten: take three dimensions for a convolution's as well.
    """
    if len(shape) < 2 or 0 in shape or sum(size > 1 for size in shape) < 2:
        return None
    batched = len(shape) == 3 and not flatten and shape[1] > 1 and shape[2] > 1
    matrices, rows = (shape[0], shape[1]) if batched else (1, shape[0])
    columns = math.prod(shape) // (matrices * rows)
    shorter = min(rows, columns)
    cap = max(shorter, SHORTEST_CAP) if max_dim is None else min(max_dim, max(ASPECT * shorter, SHORTEST_CAP))
    layout = Layout(matrices, rows, columns, _piece(rows, cap), _piece(columns, cap))
    return layout if layout.left or layout.right else None


def _piece(size: int, cap: int) -> int:
    """The longest divisor of `size` that is at most `cap`; 0 for none above half the cap, and for a side of one."""
    best = next((d for d in range(min(size, cap), 0, -1) if size % d == 0), 1)
    return best if 1 < best and 2 * best > min(size, cap) else 0


class Basis:
    """The eigenbasis of one parameter, as views of its optimizer state."""

    def __init__(self, layout: Layout, state: dict[str, Tensor]) -> None:
        self.layout, self._state = layout, state

    def into(self, x: Tensor) -> Tensor:
        """Q_Lᵀ x Q_R, in the shape of `x`."""
        left, right = self._state.get("left_basis"), self._state.get("right_basis")
        return self._applied(x, None if left is None else left.mT, None if right is None else right.mT)

    def out_of(self, x: Tensor) -> Tensor:
        """Q_L x Q_Rᵀ, in the shape of `x`."""
        return self._applied(x, self._state.get("left_basis"), self._state.get("right_basis"))

    def average(self, gradient: Tensor, beta: float) -> None:
        """Let the factors follow: F ← β F + (1 − β) G·Gᵀ; the first gradient counts whole."""
        gradient = gradient * (_LARGEST / torch.linalg.vector_norm(gradient, math.inf).clamp_min(_LARGEST))
        with _full_float32():
            for name, product in self.layout.products(gradient).items():
                factor = self._state.get(name)
                if factor is None:
                    self._state[name] = product
                else:
                    factor.lerp_(product, 1 - beta)

    def sides(self) -> list[tuple[dict[str, Tensor], str]]:
        """(state, "left" or "right") of every side that is rotated."""
        return [(self._state, side) for side in ("left", "right") if f"{side}_factor" in self._state]

    @property
    def is_known(self) -> bool:
        """Whether the first gradient has come."""
        return "left_basis" in self._state or "right_basis" in self._state

    def carry_hessian(self, turned: dict[int, dict[str, Tensor]]) -> None:
        """Bring h of the old basis into the new: Σ_j P_ij² h_j, what a matrix diagonal there has on its diagonal here.

        Args:
            turned: what `refresh` returned, P = Q_newᵀ Q_old of each side.
        """
        overlaps = turned.get(id(self._state))
        if overlaps:
            left, right = (None if p is None else p.square() for p in (overlaps.get("left"), overlaps.get("right")))
            self._state["hessian"] = self._applied(self._state["hessian"], left, right)

    def _applied(self, x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        return self.layout.apply(x, left, right).view(x.shape)


def refresh(
    sides: Iterable[tuple[dict[str, Tensor], str]], agree: Callable[[Tensor], object] = lambda vectors: None
) -> dict[int, dict[str, Tensor]]:
    """Turn the eigenvectors of many sides towards those of their factors; sides of one length go in one batch.

    A side without eigenvectors gets its factor's own. The others make one power iteration in the order of their
    eigenvalues, and are made orthonormal.

    Args:
        sides: as `Basis.sides` gives them.
        agree: called with the new eigenvectors of each batch, which it may replace in place by another rank's.

    Returns:
        P = Q_newᵀ Q_old by `id` of the state and side, for the sides that had eigenvectors.
    """
    batches: dict[tuple, list[tuple[dict[str, Tensor], str]]] = defaultdict(list)
    for state, side in sides:
        factor = state[f"{side}_factor"]
        batches[factor.shape[-1], factor.device, factor.dtype, f"{side}_basis" in state].append((state, side))
    turned: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for (*_, known), members in batches.items():
        factors = _damped(torch.cat([state[f"{side}_factor"] for state, side in members]))
        old = torch.cat([state[f"{side}_basis"] for state, side in members]) if known else None
        with _full_float32():
            new = _eigenvectors(factors) if old is None else _power_iteration(factors, old)
            agree(new)
            overlaps = None if old is None else torch.bmm(new.mT, old)
        sizes = [state[f"{side}_factor"].shape[0] for state, side in members]
        for i, ((state, side), part) in enumerate(zip(members, new.split(sizes), strict=True)):
            state[f"{side}_basis"] = part.clone()
            if overlaps is not None:
                turned[id(state)][side] = overlaps.split(sizes)[i]
    return turned


def _damped(factors: Tensor) -> Tensor:
    """The factors over their trace, with `_DAMPING` on the diagonal; a factor of zeros becomes a multiple of I."""
    trace = factors.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    scaled = torch.where(trace > 0, factors / trace.clamp_min(torch.finfo(factors.dtype).tiny), 0)
    return scaled + _DAMPING * torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)


def _eigenvectors(factors: Tensor) -> Tensor:
    """[batch, n, n], columns from the largest eigenvalue to the smallest."""
    return torch.linalg.eigh(factors)[1].flip(2).contiguous()


def _power_iteration(factors: Tensor, vectors: Tensor) -> Tensor:
    """Q ← orthonormalised F·Q, columns sorted by their Rayleigh quotients first."""
    images = torch.bmm(factors, vectors)
    order = (vectors * images).sum(1).argsort(dim=1, descending=True)
    images = images.gather(2, order[:, None, :].expand_as(images))
    vectors = _cholesky_orthonormal(images)
    eye = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    failed = ~((torch.bmm(vectors.mT, vectors) - eye).abs().amax((1, 2)) < 1e-4)  # True for NaN as well
    if bool(failed.any()):
        vectors[failed] = torch.linalg.qr(images[failed])[0]
    return vectors


def _cholesky_orthonormal(vectors: Tensor) -> Tensor:
    """Gram-Schmidt by Cholesky, twice; without meaning where the columns are nearly dependent."""
    for _ in range(2):
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        triangle, _ = torch.linalg.cholesky_ex(torch.bmm(vectors.mT, vectors))
        vectors = torch.linalg.solve_triangular(triangle, vectors.mT, upper=False).mT
    return vectors.contiguous()


class _full_float32:
    """No TF32 inside: it destroys the small eigenvalues."""

    def __enter__(self) -> None:
        matmul = torch.backends.cuda.matmul  # since torch 2.9 allow_tf32 cannot be read once fp32_precision was set
        self._name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
        self._before = getattr(matmul, self._name)
        setattr(matmul, self._name, exact)

    def __exit__(self, *_: object) -> None:
        setattr(torch.backends.cuda.matmul, self._name, self._before)


def asked_layout(param: Tensor, group: Mapping[str, Any]) -> Layout | None:
    """How `group` asks for a parameter to be rotated; None where it is not."""
    if group["update"] != "sophia" or group["basis"] is None:
        return None
    return layout_of(param.shape, group["basis_max_dim"], group["basis_flatten"])


def basis_layout(param: Tensor, group: Mapping[str, Any]) -> Layout | None:
    """`asked_layout` of a parameter that is about to be rotated.

    Raises:
        ValueError: the matrix is sharded.
    """
    layout = asked_layout(param, group)
    if layout is not None and hasattr(param, "to_local"):
        raise ValueError(
            "basis='eigen' rotates whole matrices, and these are sharded over ranks (FSDP2 or tensor parallelism): "
            "use DDP, or basis=None."
        )
    return layout


def known_bases(groups: Groups, states: States) -> dict[Tensor, Basis]:
    """The parameters that have an eigenbasis by now."""
    layouts = {p: basis_layout(p, group) for p, group in sophia_members(groups)}
    bases = {p: Basis(layout, states[p]) for p, layout in layouts.items() if layout and p in states}
    return {p: basis for p, basis in bases.items() if basis.is_known}


def turn_bases(groups: Groups, states: States, agree: Callable[[Tensor], object]) -> None:
    """Let the factors see this step's gradients, and refresh the eigenvectors that are due; h is carried over."""
    due: list[Basis] = []
    for param, group in sophia_members(groups):
        layout = basis_layout(param, group) if param.grad is not None else None
        if layout is None:
            continue
        basis = Basis(layout, state_of(states, param))
        basis.average(usable_gradient(param.grad, state_dtype(param), False)[1], group["basis_beta"])
        step = group["step"]
        if step % group["basis_interval"] == 0 or step < group["basis_warmup"] or not basis.is_known:
            due.append(basis)
    turned = refresh([side for basis in due for side in basis.sides()], agree)
    for basis in due:
        basis.carry_hessian(turned)
