"""Times of several things that take turns, and the machine that they were taken on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ... import __version__


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Wall-clock time of one call, the work on a GPU included."""
    wait = _nothing
    if device == "cuda":
        import torch

        wait = torch.cuda.synchronize
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def in_turns(runs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call: each of `runs` once, then all of them again, `rounds` times."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of pairs that were measured side by side."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def sums(seconds: list[float], length: int) -> list[float]:
    """Of every `length` in a row."""
    return [sum(seconds[i : i + length]) for i in range(0, len(seconds), length)]


def environment(device: str) -> dict[str, Any]:
    """`machine` and the versions of packages."""
    versions = {"sophia-integrations": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "sophia-opt", "pytorch_optimizer"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**machine(device), "versions": versions}


def machine(device: str) -> dict[str, Any]:
    """Device, cores, threads of this process, and the load: how many processes ran on average in the last minute."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def _nothing() -> None:
    pass


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
