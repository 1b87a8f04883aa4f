"""``--dry-run``: everything but the training, and what the training would be; the model stays without numbers."""

from __future__ import annotations

import inspect
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reading.loader import read
from ..reading.schema import Recipe
from .resolved import resolve
from .run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import TrainingArguments

_GPU_ONLY = {"fp16", "fp16_full_eval", "tf32", "torch_compile"}


def dry_run(
    file: str | os.PathLike[str], overrides: Sequence[str], say: Callable[[str], object], nproc: int = 1
) -> None:
    """Builds what `train` would build, and says what it is.

    Reads and tokenizes the data (the cache keeps that), builds the model from its shapes alone, makes the optimizer,
    shows a batch as text, and writes no run folder.

    Args:
        file: the recipe.
        overrides: ``key=value`` with dots in the key.
        say: receives the lines for the reader.
        nproc: work it out for so many processes; a Lightning recipe says how many by itself.

    Raises:
        UserError: what `train` would raise before training.
    """
    recipe = resolve(read(file, overrides))
    recipe.folder().require_same(recipe.settings)
    if recipe.recipe is None:
        _say_lightning(recipe.settings, say, nproc)
    else:
        _say_trainer(recipe.recipe, say, nproc)
    say("Nothing was trained, and no run folder written.")


def arguments_here(recipe: Recipe) -> TrainingArguments:
    """The recipe's TrainingArguments as this machine can take them, with or without a GPU; of no run folder."""
    import torch

    from .trainer_run import build_arguments

    training = recipe.training
    if not torch.cuda.is_available():
        training = {"use_cpu": True, **training, **dict.fromkeys(_GPU_ONLY & training.keys(), False)}
    return build_arguments(training, RunFolder(Path(tempfile.gettempdir(), "unused")))


def _say_trainer(recipe: Recipe, say: Callable[[str], object], nproc: int) -> None:
    from transformers import Trainer

    from .batch_text import describe_batch, first_batch
    from .trainer_run import describe, refused_optimizer
    from .training_data import load

    arguments = arguments_here(recipe)
    tokenizer, data, model = load(recipe, arguments.seed, say, empty=True)
    with refused_optimizer():
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        parameters = options.pop("params", None) or [p for p in model.parameters() if p.requires_grad]
        optimizer = kind(parameters, **options)
    batch = first_batch(data, arguments.train_batch_size, arguments.seed)
    for line in describe_batch(batch, tokenizer, data.labels, answers=recipe.task == "seq2seq"):
        say(line)
    say(describe(model, arguments))
    rows, accumulated, per_epoch = arguments.train_batch_size, arguments.gradient_accumulation_steps, None
    if "train" in data.counts:
        batches = len(data.train) / (rows * nproc)  # type: ignore[arg-type]
        batches = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
        per_epoch = max(1, math.ceil(batches / accumulated))
    steps = arguments.max_steps
    if steps <= 0:
        steps = math.ceil(arguments.num_train_epochs * per_epoch)
    interval = optimizer.defaults.get("hessian_interval")
    _say_numbers(say, (rows, accumulated, nproc), data.tokens_per_row, steps, per_epoch, interval)


def _say_lightning(settings: dict[str, Any], say: Callable[[str], object], nproc: int) -> None:
    from ...lightning import SophiaG, TextDataModule
    from .batch_text import describe_batch, first_batch
    from .lightning_run import describe, devices_of, optimizer_of

    cli = build_alone(settings, say)
    data, trainer = cli.datamodule, cli.trainer
    if not isinstance(data, TextDataModule):
        return say(f"data: {type(data).__name__} prepares itself when training begins")
    data.prepare_data()
    prepared = data.prepared
    for line in describe_batch(first_batch(prepared, data.batch_size, data.seed), data.tokenizer_object):
        say(line)
    asked = settings["trainer"]
    processes = max(nproc, (devices_of(asked) or 1) * asked.get("num_nodes", 1))
    say(describe(cli, settings))
    per_epoch = max(1, len(prepared.train) // (data.batch_size * processes) // trainer.accumulate_grad_batches)
    steps = trainer.max_steps if trainer.max_steps > 0 else (trainer.max_epochs or 1) * per_epoch
    optimizer, options = optimizer_of(settings)
    default = inspect.signature(SophiaG).parameters["hessian_interval"].default
    interval = options.get("hessian_interval", default) if "Sophia" in optimizer else None
    factors = (data.batch_size, trainer.accumulate_grad_batches, processes)
    _say_numbers(say, factors, prepared.tokens_per_row, steps, per_epoch, interval)


def _say_numbers(
    say: Callable[[str], object],
    factors: tuple[int, int, int],
    tokens_per_row: float,
    steps: int,
    per_epoch: int | None,
    interval: int | None,
) -> None:
    """Tokens of a step, steps, Hessian passes.

    Args:
        say: receives the lines for the reader.
        factors: rows of a micro-batch on one process, micro-batches accumulated, processes.
        tokens_per_row: on average where rows have different lengths.
        steps: optimizer steps.
        per_epoch: of an epoch; None for a stream.
        interval: optimizer steps between two Hessian passes; None without any.
    """
    names = zip(factors, ("rows", "accumulated", "processes"), strict=True)
    shown = [f"{number} {name}" for number, name in names if number > 1 or name == "rows"]
    tokens = math.prod(factors) * tokens_per_row
    say(f"optimizer step: {' × '.join([*shown, f'{tokens_per_row:,.5g} tokens'])} = {tokens:,.0f} tokens")
    epochs = "of a stream" if per_epoch is None else f"{steps / per_epoch:.2f} epochs"
    say(f"steps: {steps:,}, {steps * tokens:,.0f} tokens, {epochs}")
    if interval is not None:
        say(f"Hessian passes: {math.ceil(steps / interval):,}, one every {interval} steps")


def build_alone(settings: dict[str, Any], say: Callable[[str], object]) -> Any:
    """A LightningCLI for a config, in one process and with or without a GPU; its data is not prepared.

    New weights are left without numbers.
    """
    import torch

    from ...lightning import TextDataModule
    from ...lightning.cli import quiet
    from .lightning_run import arguments_of, build, in_folder

    asked = settings["trainer"]
    trainer = {key: value for key, value in asked.items() if key not in ("devices", "num_nodes", "strategy")}
    if not torch.cuda.is_available():
        trainer["accelerator"] = "cpu"
        if str(trainer.get("precision", "")).startswith("16"):
            trainer["precision"] = "32-true"
    with tempfile.TemporaryDirectory(prefix="sophia-dry-run-") as place, quiet():
        with torch.device("meta") if arguments_of(settings["model"]).get("config") else torch.device("cpu"):
            cli = build(in_folder({**settings, "trainer": trainer}, RunFolder(Path(place))), [])
    if isinstance(cli.datamodule, TextDataModule):
        cli.datamodule.say = say
    return cli
