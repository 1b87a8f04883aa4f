"""The eigenbasis: where a matrix's curvature is close to diagonal, kept up to date from its training gradients.

For a matrix with gradient G the factors are running averages of G·Gᵀ and Gᵀ·G, and the basis their eigenvectors Q_L and
Q_R (Shampoo's, arXiv 1802.09568; SOAP runs Adam in it, arXiv 2409.11321, §4). X has the coordinates Q_Lᵀ X Q_R there.
A side longer than a cap is cut into pieces of equal length with a factor each: the factor becomes block diagonal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .eigenvectors import full_float32, refresh
from .gradients import usable_gradient
from .state import Groups, States, sophia_members, state_dtype, state_of

SHORTEST_CAP, ASPECT = 128, 4
"""A piece of the longer side is at most `ASPECT` times the shorter one, which bounds the state of LoRA's thin matrices;
up to `SHORTEST_CAP` no side is cut but by the caller's own cap."""

CPU_BATCH, DEVICE_BATCH = 1 << 18, 1 << 24
"""Elements that one product takes at most, unless a single parameter has more: many small matrices fill a device, and
the temporaries stay small beside a model's parameters."""

_LARGEST = 2.0**50
"""Larger gradients are scaled down to it for the factors, whose float32 their squares would not fit into."""


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

    def of(self, parameters: int) -> Layout:
        """The layout of several parameters with this one, one behind the other."""
        return replace(self, matrices=self.matrices * parameters)

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
        self.layout, self.state = layout, state

    def into(self, x: Tensor) -> Tensor:
        """Q_Lᵀ x Q_R, in the shape of `x`."""
        return into([self], [x])[0]

    def out_of(self, x: Tensor) -> Tensor:
        """Q_L x Q_Rᵀ, in the shape of `x`."""
        return out_of([self], [x])[0]

    def sides(self) -> list[tuple[dict[str, Tensor], str]]:
        """(state, "left" or "right") of every side that is rotated."""
        return [(self.state, side) for side in ("left", "right") if f"{side}_factor" in self.state]

    @property
    def is_known(self) -> bool:
        """Whether the first gradient has come."""
        return "left_basis" in self.state or "right_basis" in self.state


def into(bases: Sequence[Basis], xs: Sequence[Tensor]) -> list[Tensor]:
    """Q_Lᵀ x Q_R of each of one of `batches`, in the shape of `x`, by one product."""
    return _product(bases, xs, transposed=True)


def out_of(bases: Sequence[Basis], xs: Sequence[Tensor]) -> list[Tensor]:
    """Q_L x Q_Rᵀ of each of one of `batches`, in the shape of `x`, by one product."""
    return _product(bases, xs, transposed=False)


def average(bases: Sequence[Basis], gradients: Sequence[Tensor], beta: float) -> None:
    """Let the factors follow: F ← β F + (1 − β) G·Gᵀ; the first gradient counts whole, and what is not finite as 0."""
    for members in batches(bases, gradients, "factor"):
        states = [bases[i].state for i in members]
        layout = bases[members[0]].layout.of(len(members))
        gradient = _stack([gradients[i].to(state_dtype(gradients[i])) for i in members])
        _, gradient = usable_gradient(gradient, gradient.dtype, False)
        gradient = gradient.reshape(len(members), -1)
        largest = torch.linalg.vector_norm(gradient, math.inf, dim=1, keepdim=True)
        with full_float32():
            products = layout.products(gradient * (_LARGEST / largest.clamp_min(_LARGEST)))
        for name, product in products.items():
            if name in states[0]:
                _held_together(states, name).lerp_(product, 1 - beta)
            else:
                _hold(states, name, product)


def carry_hessian(bases: Sequence[Basis], turned: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Bring h of the old basis into the new: Σ_j P_ij² h_j, what a matrix diagonal there has on its diagonal here.

    Args:
        turned: what `refresh` returned, P = Q_newᵀ Q_old of each side.
    """
    bases = [basis for basis in bases if id(basis.state) in turned]
    hessians = [basis.state["hessian"] for basis in bases]
    for members in batches(bases, hessians, "basis"):
        overlaps = [turned[id(bases[i].state)] for i in members]
        left, right = (
            torch.cat([o[side] for o in overlaps]).square() if side in overlaps[0] else None
            for side in ("left", "right")
        )
        carried = bases[members[0]].layout.of(len(members)).apply(_stack([hessians[i] for i in members]), left, right)
        for i, h in zip(members, carried.view(len(members), -1), strict=True):
            hessians[i].copy_(h.view(hessians[i].shape))


def _product(bases: Sequence[Basis], xs: Sequence[Tensor], transposed: bool) -> list[Tensor]:
    states = [basis.state for basis in bases]
    sides = (_held_together(states, f"{side}_basis") for side in ("left", "right"))
    left, right = (q if q is None or not transposed else q.mT for q in sides)
    product = bases[0].layout.of(len(bases)).apply(_stack(xs), left, right)
    return [part.view(x.shape) for part, x in zip(product.view(len(bases), -1), xs, strict=True)]


def batches(bases: Sequence[Basis], xs: Sequence[Tensor], what: str) -> list[list[int]]:
    """Which of them go into one product: equal layouts, as long as their stack stays short of `BATCH` elements.

    Args:
        what: of the state that is used, so that a parameter without it is not put beside one that has it.
    """
    found: list[list[int]] = []
    latest: dict[tuple, list[int]] = {}
    for i, (basis, x) in enumerate(zip(bases, xs, strict=True)):
        known = tuple(f"{side}_{what}" in basis.state for side in ("left", "right"))
        key = (basis.layout, x.device, x.dtype, known)
        members = latest.get(key)
        if members is None or (len(members) + 1) * x.numel() > _batch_elements(x):
            members = latest[key] = []
            found.append(members)
        members.append(i)
    return found


def _batch_elements(x: Tensor) -> int:
    return CPU_BATCH if x.device.type == "cpu" else DEVICE_BATCH


def _stack(xs: Sequence[Tensor]) -> Tensor:
    """The elements of all of them in their order; of one alone without a copy."""
    return xs[0] if len(xs) == 1 else torch.stack([x.reshape(-1) for x in xs])


def _hold(states: Sequence[dict[str, Tensor]], name: str, together: Tensor) -> None:
    """Let each state have its part of `together` under `name`."""
    for state, part in zip(states, together.tensor_split(len(states)), strict=True):
        state[name] = part


def _held_together(states: Sequence[dict[str, Tensor]], name: str) -> Tensor | None:
    """One tensor whose parts the states have under `name`, which are moved there at first; None if they have none.

    So that a step multiplies with the eigenvectors of many parameters where they lie, without a copy.
    """
    if name not in states[0]:
        return None
    parts = [state[name] for state in states]
    if len(parts) == 1:
        return parts[0]
    whole = parts[0]._base
    if not _are_the_parts_of(whole, parts):
        whole = torch.cat(parts)
        _hold(states, name, whole)
    return whole.view(-1, *parts[0].shape[1:])


def _are_the_parts_of(whole: Tensor | None, parts: Sequence[Tensor]) -> bool:
    if whole is None or any(part._base is not whole for part in parts):
        return False
    starts = [part.storage_offset() for part in parts]
    expected = range(whole.storage_offset(), whole.storage_offset() + whole.numel(), parts[0].numel())
    return whole.is_contiguous() and starts == list(expected)


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


def turn_bases(groups: Groups, states: States, step: int, agree: Callable[[Tensor], object]) -> None:
    """Let the factors see this step's gradients, and refresh the eigenvectors that are due; h is carried over."""
    due: list[Basis] = []
    for group in groups:
        if group["update"] != "sophia" or group["basis"] is None:
            continue
        with_gradient = [p for p in group["params"] if p.grad is not None]
        layouts = {p: layout for p in with_gradient if (layout := basis_layout(p, group)) is not None}
        bases = {p: Basis(layout, state_of(states, p, group)) for p, layout in layouts.items()}
        turning = _is_time(group, step, "basis_interval")
        looking = _is_time(group, step, "basis_factor_interval")
        due += [basis for basis in bases.values() if turning or not basis.is_known]
        seeing = {p: basis for p, basis in bases.items() if looking or not basis.is_known}
        average(list(seeing.values()), [p.grad for p in seeing], group["basis_beta"])
    turned = refresh([side for basis in due for side in basis.sides()], agree)
    carry_hessian(due, turned)


def _is_time(group: Mapping[str, Any], step: int, interval: str) -> bool:
    """Whether what happens every `interval` steps, and at each one in the beginning, happens at `step`."""
    return step < group["basis_warmup"] or step % group[interval] == 0
