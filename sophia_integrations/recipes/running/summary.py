"""What ``summary.json`` says of a run, whichever framework trained it, and the sentence at its end."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from .events import read_metrics
from .run_folder import RunFolder, write_text

if TYPE_CHECKING:
    from torch import nn


def size_of(module: nn.Module) -> str:
    """``1,421,760 parameters``, and how many of them are trained when not all are."""
    total, trained = _parameters(module)
    if trained == total:
        return f"{total:,} parameters"
    return f"{total:,} parameters of which {trained:,} are trained ({trained / total:.2%})"


def _parameters(module: nn.Module) -> tuple[int, int]:
    """How many numbers a model has, and how many of them are trained."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def evaluated_at(folder: RunFolder, step: int) -> bool:
    """Whether the validation loss of a step has been logged."""
    return any("eval_loss" in event and event["step"] == step for event in read_metrics(folder.metrics))


def summarize(
    folder: RunFolder,
    step: int,
    tokens: int,
    module: nn.Module,
    names: dict[str, str],
    optimizer: Any,
    packages: Sequence[str],
    skipped_rows: int | None,
) -> dict[str, Any]:
    """What ``summary.json`` holds.  Losses are in nats per token; ``seconds`` is training time of all sessions.

    Args:
        folder: whose ``metrics.jsonl`` is summed up.
        step: optimizer steps of the run.
        tokens: that it trained on; 0 when they are not known.
        module: the model.
        names: of the model, the optimizer and the device.
        optimizer: whose Hessian estimates are counted; may be wrapped.
        packages: whose versions matter.
        skipped_rows: left out of the data as bad; None where they are errors.
    """
    events = read_metrics(folder.metrics)
    train = [event for event in events if "loss" in event]
    evaluations = [event for event in events if "eval_loss" in event]
    shares = [event["sophia/hessian_time_fraction"] for event in train if "sophia/hessian_time_fraction" in event]
    seconds = events[-1].get("seconds", 0.0) if events else 0.0
    total, trained = _parameters(module)
    summary: dict[str, Any] = {
        "train_loss": train[-1]["loss"] if train else None,
        "validation_loss": evaluations[-1]["eval_loss"] if evaluations else None,
        "steps": step,
        "parameters": total,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        **names,
    }
    if evaluations and "eval_accuracy" in evaluations[-1]:
        summary["eval_accuracy"] = evaluations[-1]["eval_accuracy"]
    if trained < total:
        summary["trained_parameters"] = trained
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if hasattr(optimizer, "stats"):
        summary["hessian_updates"] = int(optimizer.stats()["hessian_updates"])
    if skipped_rows is not None:
        summary["skipped_rows"] = skipped_rows
    if shares:
        summary["hessian_time_fraction"] = round(sum(shares) / len(shares), 4)
    from ... import __version__

    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
    summary["versions"] = {"sophia-integrations": __version__, **versions}
    return summary


def complete(folder: RunFolder, summary: dict[str, Any], say: Callable[[str], object]) -> None:
    """Writes ``summary.json``, which makes the folder a complete run, and says the losses."""
    write_text(folder.summary, json.dumps(summary, indent=2) + "\n")
    logged = any("loss" in event for event in read_metrics(folder.metrics))
    missing = "not finite" if logged else "not logged"
    losses = {name: summary[f"{name}_loss"] for name in ("train", "validation")}
    shown = ", ".join(f"{name} loss {missing if loss is None else f'{loss:.4f}'}" for name, loss in losses.items())
    if summary.get("eval_accuracy") is not None:
        shown += f", validation accuracy {summary['eval_accuracy']:.4f}"
    skipped = f", {summary['skipped_rows']:,} bad rows skipped" if summary.get("skipped_rows") else ""
    say(f"{shown} after {summary['steps']} steps and {summary['seconds']:.0f} s{skipped}")
