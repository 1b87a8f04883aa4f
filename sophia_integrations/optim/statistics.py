"""Diagnostics computed from h on request, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .sharding import local, sum_over_shards

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The quantiles of h that `hessian_quantiles` gives, from an even sample of its coordinates."""

_SAMPLE = 65_536


def curvature_statistics(params: Iterable[Tensor], state: Mapping[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `SophiaG.stats()` says about h; with sharded parameters every rank must call it.

    Returns:
        `hessian_norm`: L2 norm of h, in loss / θ².
        `hessian_zero_fraction`: share of coordinates with h = 0.
        `hessian_quantiles`: [5], the `QUANTILES` of h on this rank, in loss / θ².
    """
    held = [p for p in params if "hessian" in state.get(p, {})]
    coordinates = sum(local(p).numel() for p in held)
    squares, zeros, samples = [], [], []
    for param in held:
        h = local(state[param]["hessian"])
        squares.append(sum_over_shards(torch.linalg.vector_norm(h, dtype=torch.float64).square(), param))
        zeros.append(sum_over_shards((h == 0).sum(), param))
        samples.append(h.flatten()[:: max(1, coordinates // _SAMPLE)].float())
    sample = torch.cat([s.to(samples[0].device) for s in samples]) if samples else torch.zeros(1)
    return {
        "hessian_norm": total(squares).sqrt(),
        "hessian_zero_fraction": total(zeros) / max(sum(p.numel() for p in held), 1),
        "hessian_quantiles": torch.quantile(sample, torch.tensor(QUANTILES, device=sample.device)),
    }


def total(values: list[Tensor]) -> Tensor:
    """Sum of 0-dim tensors that may lie on several devices."""
    if not values:
        return torch.zeros(())
    return torch.stack([v.to(values[0].device) for v in values]).sum()
