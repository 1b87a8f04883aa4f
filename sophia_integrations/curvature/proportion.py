"""How well the rows of a gradient are proportional to the softmax beside their label."""

from __future__ import annotations

import torch
from torch import Tensor

MEDIAN_OVER = 1024
"""Classes that a median looks at."""


def ragged_by(p: Tensor, g: Tensor, label: Tensor) -> Tensor:
    """[rows] the median of |g / (m p) − 1| over the entries beside the label, with m the median of g / p.

    A mixture of two targets leaves most entries alone.
    """
    beside = torch.ones_like(p, dtype=torch.bool).scatter(-1, label, False) & (g != 0)
    ratio = (g / p).where(beside, torch.nan)[:, :MEDIAN_OVER]
    return (ratio / ratio.nanmedian(-1, keepdim=True).values - 1).abs().nanmedian(-1).values.nan_to_num(0)


def fit(p: Tensor, g: Tensor, label: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """[rows] w that brings w · p (+ constant) closest to g beside the label, and how far it stays from it.

    What a row does not sum to 0 by is the part of w that a penalty on the log-sum-exp of the logits has added. The
    largest p rules the fit; so the others must have the same w, or the row is taken to be as far off as theirs.
    """
    weights, off = _line(p, g, label, shifted)
    if p.shape[-1] > 2:
        largest = p.scatter(-1, label, -1).argmax(-1, keepdim=True)
        rest, rest_off = _line(p, g, torch.cat([label, largest], -1), shifted)
        off = torch.stack([off, rest_off, (rest / weights - 1).abs().nan_to_num(torch.inf)]).amax(0)
    return weights - g.sum(-1), off


def _line(p: Tensor, g: Tensor, without: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """[rows] slope of g over p, and the error relative to g, without the entries `without` [rows, k]."""
    p, g = p.scatter(-1, without, 0), g.scatter(-1, without, 0)
    if shifted:
        number = max(p.shape[-1] - without.shape[-1], 1)
        p, g = ((x - x.sum(-1, keepdim=True) / number).scatter(-1, without, 0) for x in (p, g))
    tiny = torch.finfo(p.dtype).tiny
    slope = (p * g).sum(-1) / p.square().sum(-1).clamp_min(tiny)
    return slope, (g - slope[:, None] * p).norm(dim=-1) / g.norm(dim=-1).clamp_min(tiny)
