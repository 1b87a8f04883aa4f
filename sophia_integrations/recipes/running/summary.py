"""What ``summary.json`` says of a run, whichever framework trained it, and the sentence at its end."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

from .events import read_metrics
from .run_folder import RunFolder, write_text

if TYPE_CHECKING:
    from torch import nn

_PACKAGES = ("torch", "transformers", "accelerate", "lightning", "tokenizers")


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


def complete(
    folder: RunFolder,
    say: Callable[[str], object],
    *,
    step: int,
    tokens: int,
    module: nn.Module,
    names: dict[str, str],
    optimizer: Any,
    skipped_rows: int | None,
) -> None:
    """Writes ``summary.json``, which makes the folder a complete run, and says the losses.

    Losses are in nats per token; ``seconds`` is training time of all sessions.

    Args:
        folder: whose ``metrics.jsonl`` is summed up.
        say: receives the lines for the reader.
        step: optimizer steps of the run.
        tokens: that it trained on; 0 when they are not known.
        module: the model.
        names: of the model, the optimizer and the device.
        optimizer: whose Hessian estimates are counted; may be wrapped.
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
    summary["versions"] = _versions()
    write_text(folder.summary, json.dumps(summary, indent=2) + "\n")
    missing = "not finite" if train else "not logged"
    losses = {name: summary[f"{name}_loss"] for name in ("train", "validation")}
    shown = ", ".join(f"{name} loss {missing if loss is None else f'{loss:.4f}'}" for name, loss in losses.items())
    if summary.get("eval_accuracy") is not None:
        shown += f", validation accuracy {summary['eval_accuracy']:.4f}"
    skipped = f", {skipped_rows:,} bad rows skipped" if skipped_rows else ""
    say(f"{shown} after {step} steps and {summary['seconds']:.0f} s{skipped}")


def _versions() -> dict[str, str]:
    """Of everything that a run's numbers may depend on and that is installed."""
    from ... import __version__

    found = {"sophia-integrations": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
