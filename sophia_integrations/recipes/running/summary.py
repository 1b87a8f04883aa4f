"""What ``summary.json`` says of a run, whichever framework trained it, and the sentence at its end."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folder import RunFolder, write_text

if TYPE_CHECKING:
    from torch import nn


def summarize(
    events: Sequence[dict[str, Any]],
    *,
    step: int,
    tokens: int,
    module: nn.Module,
    names: dict[str, str],
    hessian_updates: int | None,
    packages: Sequence[str],
    skipped_rows: int | None = None,
) -> dict[str, Any]:
    """What ``summary.json`` holds.  Losses are in nats per token; ``seconds`` is training time of all sessions.

    Args:
        events: of ``metrics.jsonl``.
        step: optimizer steps of the run.
        tokens: that it trained on; 0 when they are not known.
        module: the model.
        names: of the model, the optimizer and the device.
        hessian_updates: estimates made; None for an optimizer without.
        packages: whose versions matter.
        skipped_rows: left out of the data as bad; None where they are errors.
    """
    train = [event for event in events if "loss" in event]
    evaluations = [event for event in events if "eval_loss" in event]
    shares = [event["sophia/hessian_time_fraction"] for event in train if "sophia/hessian_time_fraction" in event]
    seconds = events[-1].get("seconds", 0.0) if events else 0.0
    summary: dict[str, Any] = {
        "train_loss": train[-1]["loss"] if train else None,
        "validation_loss": evaluations[-1]["eval_loss"] if evaluations else None,
        "steps": step,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        **names,
    }
    if evaluations and "eval_accuracy" in evaluations[-1]:
        summary["eval_accuracy"] = evaluations[-1]["eval_accuracy"]
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    if trained < summary["parameters"]:
        summary["trained_parameters"] = trained
    if hessian_updates is not None:
        summary["hessian_updates"] = hessian_updates
    if skipped_rows is not None:
        summary["skipped_rows"] = skipped_rows
    if shares:
        summary["hessian_time_fraction"] = round(sum(shares) / len(shares), 4)
    from ... import __version__

    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
    summary["versions"] = {"sophia-integrations": __version__, **versions}
    return summary


def complete(folder: RunFolder, summary: dict[str, Any], logged: bool, say: Callable[[str], object]) -> None:
    """Writes ``summary.json``, which makes the folder a complete run, and says the losses.

    Args:
        logged: whether any training loss was logged: one that is missing then was not finite.
    """
    write_text(folder.summary, json.dumps(summary, indent=2) + "\n")
    losses = {name: summary[f"{name}_loss"] for name in ("train", "validation")}
    missing = "not finite" if logged else "not logged"
    shown = ", ".join(f"{name} loss {missing if loss is None else f'{loss:.4f}'}" for name, loss in losses.items())
    if summary.get("eval_accuracy") is not None:
        shown += f", validation accuracy {summary['eval_accuracy']:.4f}"
    skipped = f", {summary['skipped_rows']:,} bad rows skipped" if summary.get("skipped_rows") else ""
    say(f"{shown} after {summary['steps']} steps and {summary['seconds']:.0f} s{skipped}")


def replace_folder(target: Path, fill: Callable[[Path], object]) -> None:
    """Lets `fill` make a folder beside `target`, which then takes its place: never half of one under the name."""
    aside = target.with_name(f".{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    fill(aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
