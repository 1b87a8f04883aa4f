"""Eigenvectors of many factors at a time: one power iteration and a QR, without waiting for the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_DAMPING = 1e-6
"""Share of a factor's trace added to its diagonal: directions without gradient keep their eigenvectors."""


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
        with full_float32():
            new = _eigenvectors(factors) if old is None else _power_iteration(factors, old)
            agree(new)
            overlaps = None if old is None else torch.bmm(new.mT, old)
        sizes = [state[f"{side}_factor"].shape[0] for state, side in members]
        for i, ((state, side), part) in enumerate(zip(members, new.split(sizes), strict=True)):
            if old is None:
                state[f"{side}_basis"] = part.clone()
            else:
                state[f"{side}_basis"].copy_(part)
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
    if images.device.type == "cpu":
        return torch.linalg.qr(images)[0].contiguous()
    return _cholesky_qr(images, otherwise=vectors)


def _cholesky_qr(vectors: Tensor, otherwise: Tensor) -> Tensor:
    """Gram-Schmidt by Cholesky, three times, the first with a shift that keeps nearly dependent columns from failing.

    For a condition number up to about 1/ε as good as Householder's QR (shifted Cholesky QR, arXiv 1809.11085), and
    made of products, which a GPU does in batches and without a word to the host; on a CPU it takes three times as long.

    Args:
        otherwise: what to return where rounding has won.
    """
    size = vectors.shape[-1]
    eye = torch.eye(size, dtype=vectors.dtype, device=vectors.device)
    for shift in (size * torch.finfo(vectors.dtype).eps, 0.0, 0.0):
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        triangle, _ = torch.linalg.cholesky_ex(torch.bmm(vectors.mT, vectors) + shift * eye)
        vectors = torch.linalg.solve_triangular(triangle, vectors.mT, upper=False).mT
    succeeded = (torch.bmm(vectors.mT, vectors) - eye).abs().amax((1, 2)) < 1e-4  # False for NaN
    return torch.where(succeeded[:, None, None], vectors, otherwise).contiguous()


class full_float32:
    """No TF32 inside: it destroys the small eigenvalues."""

    def __enter__(self) -> None:
        matmul = torch.backends.cuda.matmul  # since torch 2.9 allow_tf32 cannot be read once fp32_precision was set
        self._name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
        self._before = getattr(matmul, self._name)
        setattr(matmul, self._name, exact)

    def __exit__(self, *_: object) -> None:
        setattr(torch.backends.cuda.matmul, self._name, self._before)
