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
            wall-clock time since the last restart that this process spent in Hessian passes), `sophia/rho` where it is
            set by itself and, once an estimate was dropped, `sophia/hessian_skipped`.
        """
        stats = sophia.stats()
        spent = (stats["hessian_seconds"] - self._hessian) / max(time.perf_counter() - self._wall, 1e-9)
        self.restart(sophia)
        figures = {f"sophia/{name}": stats[name] for name in ("win_rate", "curvature_share", "hessian_norm")}
        figures["sophia/hessian_time_fraction"] = spent
        if any(group["rho"] == "auto" for group in sophia.param_groups):
            figures["sophia/rho"] = stats["rho"]
        if stats["hessian_skipped"]:
            figures["sophia/hessian_skipped"] = stats["hessian_skipped"]
        return figures
