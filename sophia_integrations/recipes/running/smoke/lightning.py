"""A LightningCLI config in miniature: our model and data made small as in a recipe for the Trainer, any other left."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from .data import Sample, sample
from .sizes import INTERVAL, LENGTH, LONGEST, ROWS, STEPS

_DROPPED = (
    "max_epochs", "min_epochs", "min_steps", "max_time", "limit_train_batches", "limit_test_batches", "overfit_batches",
    "fast_dev_run", "strategy", "num_nodes", "logger", "profiler",
)  # fmt: skip


def miniature(settings: dict[str, Any], place: Path) -> tuple[dict[str, Any], list[str]]:
    """The config in miniature, its files in `place`, and what was changed."""
    small, changes = copy.deepcopy(settings), list[str]()
    model, data = small.get("model"), small.get("data")
    ours = _is(model, "CausalLM") and _is(data, "TextDataModule")
    if ours:
        options, wanted = data.setdefault("init_args", {}), model["init_args"]
        task = options.get("task") or "pretrain"
        rows = sample(options, task)
        changes.append(f"data: {rows.note}")
        _shrink_data(options, rows, place, changes)
        _shrink_model(wanted, options, task, rows, place, changes)
        _more_passes(wanted.get("optimizer"), changes)
    else:
        changes.append("model and data are not this package's and stay as they are")
    _shrink_trainer(small.setdefault("trainer", {}), changes)
    return small, changes


def _is(section: Any, name: str) -> bool:
    return isinstance(section, dict) and str(section.get("class_path", "")).rpartition(".")[2] == name


def _shrink_data(options: dict[str, Any], rows: Sample, place: Path, changes: list[str]) -> None:
    for key in ("hub", "columns", "validation_fraction", "cache_dir"):
        options.pop(key, None)
    options.update({key: [str(place / name) for name in names] for key, names in rows.write(place).items()})
    before = options.get("block_size", 128)
    length = min(before, LENGTH if rows.format == "text" else LONGEST)
    if length < before:
        changes.append(f"data.block_size: {before} → {length}")
    options.update(format=rows.format, block_size=length, batch_size=min(ROWS, options.get("batch_size", 8)))


def _shrink_model(
    wanted: dict[str, Any], options: dict[str, Any], task: str, rows: Sample, place: Path, changes: list[str]
) -> None:
    from .model import VOCABULARY, small_config, smoke_model, smoke_tokenizer

    words = None
    if options.get("tokenizer") is not None:
        (place / "t").mkdir()
        words, note = smoke_tokenizer(options["tokenizer"], {}, rows, task, place / "t")
        changes.extend([note] if note else [])
        options["tokenizer"] = str(place / "t")
    else:
        options["vocab_size"] = min(VOCABULARY, options.get("vocab_size", VOCABULARY))
    if wanted.get("pretrained") is not None:
        (place / "m").mkdir()
        section, more = smoke_model(wanted, task, words, place / "m")
        wanted.pop("revision", None)
        wanted.pop("trust_remote_code", None)
        wanted.update(section)
        changes.extend(more)
    else:
        vocabulary = len(words) if words is not None else options["vocab_size"]
        before = wanted["config"].get("vocab_size")
        wanted["config"], sizes = small_config(wanted["config"], task, vocabulary)
        if before != vocabulary:
            sizes.append(f"vocab_size {before or 'unset'} → {vocabulary}")
        wanted["config"]["vocab_size"] = vocabulary
        changes.extend([f"model.config: {', '.join(sizes)}"] if sizes else [])


def _more_passes(optimizer: Any, changes: list[str]) -> None:
    if isinstance(optimizer, dict) and "Sophia" in str(optimizer.get("class_path")):
        options = optimizer.setdefault("init_args", {})
        before = options.get("hessian_interval", 10)
        if before > INTERVAL:
            options["hessian_interval"] = INTERVAL
            changes.append(f"hessian_interval: {before} → {INTERVAL}")


def _shrink_trainer(trainer: dict[str, Any], changes: list[str]) -> None:
    dropped = [key for key in _DROPPED if trainer.pop(key, None) not in (None, False, "auto", 1, -1)]
    if str(trainer.get("precision", "")).startswith("16"):
        dropped.append("precision")
        del trainer["precision"]
    if dropped:
        changes.append(f"trainer: without {', '.join(dropped)}")
    accumulated = min(2, trainer.get("accumulate_grad_batches", 1))
    trainer.update(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        accumulate_grad_batches=accumulated,
        log_every_n_steps=2,
        val_check_interval=STEPS // 2 * accumulated,
        check_val_every_n_epoch=None,
        limit_val_batches=4,
    )
    for callback in trainer.get("callbacks") or []:
        if str(callback.get("class_path", "")).endswith("ModelCheckpoint"):
            options = callback.setdefault("init_args", {})
            for key in ("every_n_epochs", "train_time_interval"):
                options.pop(key, None)
            options["every_n_train_steps"] = STEPS // 2
    changes.append(f"trainer: {STEPS} steps of {ROWS} rows × {accumulated}, on the CPU")
