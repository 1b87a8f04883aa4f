"""What a step, a Hessian pass and a training step cost on this machine, beside what else there is.

Everything is timed in one process, in turns (A B A B …), and compared pair by pair: what slows the machine down for a
while slows both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .tables import as_text
from .timing import environment

KINDS = ("step", "pass", "train")


def bench(
    what: str,
    *,
    size: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    device: str | None = None,
    cycles: int = 5,
    json: Path | None = None,
) -> dict[str, Any]:
    """Measure, print a table, and write JSON where asked.

    Args:
        what: one of `KINDS`.
        size: of the parameters or of the model; by default the smallest that says something.
        cycles: of 10 steps, one with an estimate among them.

    Returns:
        `environment` (device, threads, versions) and `rows`, times in milliseconds.

    Raises:
        UserError: a size that there is not, or a device that this machine does not have.
    """
    import torch

    from ...errors import UserError

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here.")
    if cycles < 1:
        raise UserError(f"--cycles must be at least 1, got {cycles}.")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        found = {"what": what, "environment": environment(device), **_measure(what, size, dtype, device, cycles)}
    finally:
        torch.set_num_threads(before)
    print(as_text(found), flush=True)
    if json is not None:
        _write(json, found)
    return found


def _measure(what: str, size: str | None, dtype: str, device: str, cycles: int) -> dict[str, Any]:
    from . import hessian_pass, step, train

    if what == "step":
        return step.measure(size or "10m", dtype, device, cycles)
    module = {"pass": hessian_pass, "train": train}[what]
    return module.measure(size or "small", device, cycles)


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
