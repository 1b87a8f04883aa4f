"""Diagnostics computed from m and h on request: nothing runs during training, nothing is read from the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .functional import CPU_CHUNK, DEVICE_CHUNK, memory_order
from .sharding import local, sum_over_shards

if TYPE_CHECKING:
    from .sophia import SophiaG

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The quantiles of h that `hessian_quantiles` gives, from an even sample of its coordinates."""

_SAMPLE = 65_536


def curvature_statistics(groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `SophiaG.stats()` says about m and h; with sharded parameters every rank must call it.

    Returns:
        `win_rate`: share of coordinates that are not clipped, |m| < ρh.
        `hessian_norm`: L2 norm of h, in loss / θ².
        `hessian_zero_fraction`: share of coordinates with h = 0.
        `hessian_quantiles`: [5], the `QUANTILES` of h on this rank, in loss / θ².
    """
    totals: dict[str, list[Tensor]] = {"unclipped": [], "squares": [], "zeros": []}
    samples, numel = [], 0
    held = [(p, g["rho"]) for g in groups for p in g["params"] if "hessian" in state.get(p, {})]
    coordinates = sum(local(p).numel() for p, _ in held)
    for param, rho in held:
        numel += param.numel()
        sums = [torch.zeros((), dtype=torch.float64, device=param.device) for _ in totals]
        for m, h in _chunks(state[param]["exp_avg"], state[param]["hessian"]):
            sums[0] += (m.abs() < rho * h).sum()
            sums[1] += torch.linalg.vector_norm(h).to(sums[1].dtype).square()
            sums[2] += (h == 0).sum()
        for values, value in zip(totals.values(), sums, strict=True):
            values.append(sum_over_shards(value, param))
        samples.append(local(state[param]["hessian"]).flatten()[:: max(1, coordinates // _SAMPLE)].float())
    unclipped, squares, zeros = (total(values) for values in totals.values())
    first = samples[0].device if samples else None
    sample = torch.cat([s.to(first) for s in samples]) if samples else torch.zeros(1)
    return {
        "win_rate": unclipped / max(numel, 1),
        "hessian_norm": squares.sqrt(),
        "hessian_zero_fraction": zeros / max(numel, 1),
        "hessian_quantiles": torch.quantile(sample, torch.tensor(QUANTILES, device=sample.device)),
    }


def total(values: list[Tensor]) -> Tensor:
    """Sum of 0-dim tensors that may lie on several devices."""
    if not values:
        return torch.zeros(())
    return torch.stack([v.to(values[0].device) for v in values]).sum()


def _chunks(m: Tensor, h: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of both in memory order, so that temporaries stay small."""
    m, h = local(m), local(h)
    length = CPU_CHUNK if m.device.type == "cpu" else DEVICE_CHUNK
    order = memory_order(m)
    yield from zip(*(x.permute(order).flatten().split(length) for x in (m, h)), strict=True)


class LogFigures:
    """What a trainer logs of a Sophia optimizer, under the names that every trainer uses."""

    def __init__(self) -> None:
        self._wall = self._hessian = 0.0

    def restart(self, sophia: SophiaG) -> None:
        """Let the time fraction count from now."""
        self._wall, self._hessian = time.perf_counter(), sophia.hessian_seconds

    def read(self, sophia: SophiaG) -> dict[str, Any]:
        """The figures, and a restart. Tensors stay on their device.

        Returns:
            `sophia/win_rate`, `sophia/hessian_norm`, `sophia/hessian_time_fraction` (share of wall-clock time since the
            last restart that this process spent in Hessian passes) and, once an estimate was dropped,
            `sophia/hessian_skipped`.
        """
        stats = sophia.stats()
        spent = (stats["hessian_seconds"] - self._hessian) / max(time.perf_counter() - self._wall, 1e-9)
        self.restart(sophia)
        figures = {f"sophia/{name}": stats[name] for name in ("win_rate", "hessian_norm")}
        figures["sophia/hessian_time_fraction"] = spent
        if stats["hessian_skipped"]:
            figures["sophia/hessian_skipped"] = stats["hessian_skipped"]
        return figures
