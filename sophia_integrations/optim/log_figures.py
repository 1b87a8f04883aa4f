"""The figures that every trainer logs, under the same names."""

from __future__ import annotations

import time
from typing import Any

from .sophia import SophiaG


class LogFigures:
    """What a trainer logs of a Sophia optimizer, under the names that every trainer uses."""

    def __init__(self) -> None:
        self._wall = self._hessian = 0.0

    def restart(self, sophia: SophiaG) -> None:
        """Let the time fraction count from now."""
        self._wall, self._hessian = time.perf_counter(), sophia.hessian_seconds

    def flush(self, sophia: SophiaG) -> dict[str, Any]:
        """The figures since the last restart, and a restart. Tensors stay on their device.

        Returns:
            `sophia/win_rate`, `sophia/curvature_share`, `sophia/hessian_norm`, `sophia/hessian_time_fraction` (share of
            wall-clock time since the last restart that this process spent in Hessian passes). `sophia/rho` where it is
            set by itself; where it is a number `sophia/ratio_q10` and `sophia/ratio_q50`, the ρ that would have left
            10 and 50 % of the coordinates alone at the last refresh. Once an estimate was dropped,
            `sophia/hessian_skipped`.
        """
        stats = sophia.stats()
        spent = (stats["hessian_seconds"] - self._hessian) / max(time.perf_counter() - self._wall, 1e-9)
        self.restart(sophia)
        figures = {f"sophia/{name}": stats[name] for name in ("win_rate", "curvature_share", "hessian_norm")}
        figures["sophia/hessian_time_fraction"] = spent
        if any(group["rho"] == "auto" for group in sophia.param_groups):
            figures["sophia/rho"] = stats["rho"]
        else:
            figures.update(_ratios(stats["ratio_quantiles"]))
        if stats["hessian_skipped"]:
            figures["sophia/hessian_skipped"] = stats["hessian_skipped"]
        return figures


def _ratios(deciles: list[float | None] | None) -> dict[str, float]:
    """The two quantiles of |m|/h that `reports.doctor` needs to propose a ρ."""
    wanted = {"sophia/ratio_q10": 0, "sophia/ratio_q50": 4}
    return {name: deciles[i] for name, i in wanted.items() if deciles is not None and deciles[i] is not None}
