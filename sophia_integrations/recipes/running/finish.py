"""The end of a run: final validation loss, the model, a sample of its text, the summary."""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ...text.blocks import Splits
from ..reading.schema import Recipe, Sample
from .events import read_metrics
from .folder import RunFolder, write_text
from .trainer import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers")


def finish(
    recipe: Recipe,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    folder: RunFolder,
    watch: Watch,
    say: Callable[[str], object],
) -> None:
    """Writes ``model/`` and ``summary.json``, prints the sample and the losses."""
    events, step = read_metrics(folder.metrics), trainer.state.global_step
    if not any("eval_loss" in event and event["step"] == step for event in events):
        trainer.evaluate()
        events = read_metrics(folder.metrics)
    _save_model(trainer, folder)
    if recipe.sample is not None:
        say(f"\n{generate(trainer.model, tokenizer, recipe.sample)}\n")
    summary = summarize(trainer, splits, events, step)
    write_text(folder.summary, json.dumps(summary, indent=2) + "\n")
    losses = {name: summary[f"{name}_loss"] for name in ("train", "validation")}
    missing = "not finite" if any("loss" in event for event in events) else "not logged"
    shown = ", ".join(f"{name} loss {missing if loss is None else f'{loss:.4f}'}" for name, loss in losses.items())
    say(f"{shown} after {step} steps and {summary['seconds']:.0f} s")


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """The prompt and what the model writes after it, by temperature sampling with the sample's own seed.

    The global random state is left as it was.  Text stops at the model's context length.
    """
    import torch

    inputs = tokenizer(sample.prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    room = int(min(sample.max_new_tokens, context - inputs.shape[1]))
    if room < 1:
        return sample.prompt
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sample.seed)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            temperature=sample.temperature,
            top_k=0,
            max_new_tokens=room,
            pad_token_id=tokenizer.eos_token_id,
        )
    model.train(was_training)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def summarize(trainer: Trainer, splits: Splits, events: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """What ``summary.json`` holds.  Losses are in nats per token; ``seconds`` is training time of all sessions."""
    train = [event for event in events if "loss" in event]
    evaluations = [event for event in events if "eval_loss" in event]
    shares = [event["sophia/hessian_time_fraction"] for event in train if "sophia/hessian_time_fraction" in event]
    seconds = events[-1].get("seconds", 0.0) if events else 0.0
    tokens = tokens_seen(trainer, splits, step)
    summary: dict[str, Any] = {
        "train_loss": train[-1]["loss"] if train else None,
        "validation_loss": evaluations[-1]["eval_loss"] if evaluations else None,
        "steps": step,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "model": trainer.model.config.model_type,
        "optimizer": getattr(trainer.args.optim, "value", str(trainer.args.optim)),
        "device": str(trainer.args.device),
    }
    updates = _hessian_updates(trainer)
    if updates is not None:
        summary["hessian_updates"] = updates
    if shares:
        summary["hessian_time_fraction"] = round(sum(shares) / len(shares), 4)
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
    from ... import __version__

    summary["versions"] = {"sophia-integrations": __version__, **versions}
    return summary


def tokens_seen(trainer: Trainer, splits: Splits, step: int) -> int:
    """Training tokens in `step` optimizer steps; the last step of an epoch may be smaller."""
    args, rows = trainer.args, len(splits.train)
    batch = args.train_batch_size
    batches = rows // batch if args.dataloader_drop_last else math.ceil(rows / batch)
    if args.dataloader_drop_last:
        rows = batches * batch
    epochs, rest = divmod(step, max(1, math.ceil(batches / args.gradient_accumulation_steps)))
    return (epochs * rows + rest * batch * args.gradient_accumulation_steps) * splits.train.rows.shape[1]


def _hessian_updates(trainer: Trainer) -> int | None:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    stats = optimizer.stats() if hasattr(optimizer, "stats") else {}
    return int(stats["hessian_updates"]) if "hessian_updates" in stats else None


def _save_model(trainer: Trainer, folder: RunFolder) -> None:
    aside = folder.path / ".model"
    shutil.rmtree(aside, ignore_errors=True)
    trainer.save_model(str(aside))
    shutil.rmtree(folder.model, ignore_errors=True)
    aside.rename(folder.model)
