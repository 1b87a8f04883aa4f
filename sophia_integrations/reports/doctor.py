"""`sophia doctor RUN`: what is off with a run, and which line of its recipe to edit; reads a run folder only."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from .checks import Finding, examine
from .run_folder import Run, read_run

_LOOKED_AT = (
    *("loss", "eval_loss", "grad_norm", "lr", "sophia/win_rate", "sophia/curvature_share"),
    *("sophia/hessian_norm", "sophia/hessian_time_fraction"),
)


def doctor(run: str | os.PathLike[str], as_json: bool = False, say: Callable[[str], object] = print) -> int:
    """Says what is off with a run.

    Args:
        run: its folder.
        as_json: findings as one JSON object instead of lines.
        say: receives each line.

    Returns:
        0 when nothing is off, 1 otherwise.

    Raises:
        UserError: the folder cannot be read, for which the command line ends with 2.
    """
    read = read_run(run)
    findings = examine(read)
    if as_json:
        say(json.dumps(_as_dict(read, findings), indent=2, ensure_ascii=False))
    else:
        say(headline(read))
        for line in _lines(read, findings):
            say(line)
    return 1 if findings else 0


def headline(run: Run) -> str:
    """What was trained, how far, and its loss."""
    parts = []
    if size := run.summary.get("parameters"):
        parts.append(f"{run.summary.get('model', 'model')} of {size:,} parameters")
    if run.optimizer:
        parts.append(run.optimizer if "sophia" in run.optimizer.lower() else f"{run.optimizer}, not Sophia")
    elif not run.sophia:
        parts.append("no figure of Sophia's: another optimizer, or no SophiaCallback")
    state = " so far" if run.training else ""
    of = f" of {run.max_steps}" if run.max_steps else ""
    parts.append(f"{run.last_step}{of} steps{state}")
    for name, shown in (("loss", "loss"), ("eval_loss", "validation loss")):
        if values := list(run.series(name).values()):
            parts.append(
                f"{shown} {values[0]:.4g} → {values[-1]:.4g}" if len(values) > 1 else f"{shown} {values[0]:.4g}"
            )
    return f"{run.folder}: {', '.join(parts)} (from {run.source.relative_to(run.folder)})"


def _lines(run: Run, findings: list[Finding]) -> list[str]:
    if not findings:
        seen = [name for name in _LOOKED_AT if name in run.names]
        return [f"nothing off; looked at {', '.join(seen)}"]
    lines = []
    for finding in findings:
        lines.append(f"{finding.severity + ':':<9}{finding.sentence}")
        lines += [f"{'':<9}→ {edit}" for edit in finding.edits]
    return lines


def _as_dict(run: Run, findings: list[Finding]) -> dict[str, Any]:
    return {
        "run": str(run.folder),
        "source": str(run.source),
        "optimizer": run.optimizer,
        "sophia": run.sophia,
        "last_step": run.last_step,
        "max_steps": run.max_steps,
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
