"""``--dry-run``: everything but the training, and what the training would be; the model stays without numbers."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reading.draft import Draft
from ..reading.loader import check, read
from ..reading.schema import Recipe
from .resolved import Resolved, resolve
from .run_folder import RunFolder
from .train import require_packages

if TYPE_CHECKING:
    from transformers import TrainingArguments

_GPU_ONLY = ("fp16", "fp16_full_eval", "tf32", "torch_compile")


@dataclass(frozen=True)
class Plan:
    """A training in numbers.

    Attributes:
        model: the line about the model and its optimizer.
        rows: of one micro-batch on one process.
        accumulated: micro-batches of an optimizer step on one process.
        processes: that train.
        tokens_per_row: on average where rows have different lengths.
        steps: optimizer steps.
        training_rows: None for a stream.
        interval: optimizer steps between two Hessian passes; None without any.
    """

    model: str
    rows: int
    accumulated: int
    processes: int
    tokens_per_row: float
    steps: int
    training_rows: int | None
    interval: int | None

    def describe(self) -> Iterator[str]:
        """A line for each thing that training takes."""
        yield self.model
        rows = self.rows * self.accumulated * self.processes
        factors = [f"{self.rows} rows"]
        factors += [f"{self.accumulated} accumulated"] if self.accumulated > 1 else []
        factors += [f"{self.processes} processes"] if self.processes > 1 else []
        whole = self.tokens_per_row == int(self.tokens_per_row)
        tokens = f"{self.tokens_per_row:,.0f} tokens" if whole else f"{self.tokens_per_row:,.1f} tokens on average"
        total = f"{'' if whole else 'about '}{rows * self.tokens_per_row:,.0f}"
        yield f"optimizer step: {' × '.join([*factors, tokens])} = {total} tokens"
        length = f"steps: {self.steps:,} ({self.steps * rows * self.tokens_per_row:,.0f} tokens"
        if self.training_rows is None:
            yield f"{length} of a stream)"
        else:
            yield f"{length}), {self.steps * rows / self.training_rows:.2f} epochs of {self.training_rows:,} rows"
        if self.interval is not None:
            yield f"Hessian passes: {math.ceil(self.steps / self.interval):,}, one every {self.interval} steps"


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
    recipe, here = resolve_for_this_machine(file, overrides)
    recipe.folder().require_same(recipe.settings)
    if here.recipe is None:
        _say_lightning(here.settings, recipe.settings["trainer"], say, nproc)
    else:
        _say_trainer(here.recipe, say, nproc)
    say("Nothing was trained, and no run folder written.")


def resolve_for_this_machine(file: str | os.PathLike[str], overrides: Sequence[str]) -> tuple[Resolved, Resolved]:
    """The recipe as it stands, and as this machine can take it, with or without a GPU; that one is checked in full.

    Raises `UserError` for every problem that is none of the machine's.
    """
    draft = read(file, overrides)
    require_packages(draft.framework)
    draft.raise_problems()
    adapted = read(file, [*overrides, *_without_gpu(draft)])
    check(adapted)
    return resolve(draft), resolve(adapted)


def _without_gpu(draft: Draft) -> list[str]:
    import torch

    if torch.cuda.is_available():
        return []
    if draft.recipe is None:
        return ["trainer.accelerator=cpu"] + (["trainer.precision=32-true"] if _is_half(draft.config) else [])
    training = draft.recipe.training
    words = [] if "use_cpu" in training else ["training.use_cpu=true"]
    return words + [f"training.{name}=false" for name in _GPU_ONLY if training.get(name)]


def _is_half(config: Any) -> bool:
    return str((config.get("trainer") or {}).get("precision", "")).startswith("16")


def _say_trainer(recipe: Recipe, say: Callable[[str], object], nproc: int) -> None:
    from ...hf import parse_optim_args
    from .batch_text import describe_batch, first_batch
    from .data import load_data
    from .model import build_model
    from .summary import size_of
    from .trainer_run import build_arguments, optimizer_name, require_optimizer

    arguments = build_arguments(recipe.training, RunFolder(Path(tempfile.gettempdir(), "unused")))
    tokenizer, data = load_data(recipe, arguments.seed, say)
    say(data.describe())
    model = build_model(recipe.model, recipe.task, tokenizer, data, arguments.seed, empty=True)
    require_optimizer(arguments, model)
    batch = first_batch(data, arguments.train_batch_size, arguments.seed)
    for line in describe_batch(batch, tokenizer, data.labels, answers=recipe.task == "seq2seq"):
        say(line)
    optimizer, rows = optimizer_name(arguments), len(data.train) if "train" in data.counts else None  # type: ignore[arg-type]
    interval = int(parse_optim_args(arguments.optim_args).get("hessian_interval", 10))
    plan = Plan(
        f"model: {model.config.model_type}, {size_of(model)}, optimizer {optimizer}",
        arguments.train_batch_size,
        arguments.gradient_accumulation_steps,
        nproc,
        data.tokens_per_row,
        _steps(arguments, rows, nproc),
        rows,
        interval if optimizer.startswith("sophia") else None,
    )
    for line in plan.describe():
        say(line)


def _steps(arguments: TrainingArguments, rows: int | None, processes: int) -> int:
    """Optimizer steps as the Trainer counts them."""
    if arguments.max_steps > 0 or rows is None:
        return arguments.max_steps
    batch = arguments.train_batch_size * processes
    batches = rows // batch if arguments.dataloader_drop_last else math.ceil(rows / batch)
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return math.ceil(arguments.num_train_epochs * per_epoch)


def _say_lightning(settings: dict[str, Any], asked: dict[str, Any], say: Callable[[str], object], nproc: int) -> None:
    from ...lightning import TextDataModule
    from .batch_text import describe_batch, first_batch
    from .lightning_run import describe, devices_of

    cli = build_alone(settings, say)
    data, trainer = cli.datamodule, cli.trainer
    if not isinstance(data, TextDataModule):
        return say(f"data: {type(data).__name__} prepares itself when training begins")
    data.prepare_data()
    prepared = data.prepared
    for line in describe_batch(first_batch(prepared, data.batch_size, data.seed), data.tokenizer_object):
        say(line)
    processes = max(nproc, (devices_of(asked) or 1) * asked.get("num_nodes", 1))
    rows, accumulated = len(prepared.train), trainer.accumulate_grad_batches
    per_epoch = max(1, rows // (data.batch_size * processes) // accumulated)
    steps = trainer.max_steps if trainer.max_steps > 0 else (trainer.max_epochs or 1) * per_epoch
    optimizer = (settings["model"].get("init_args") or {}).get("optimizer") or settings.get("optimizer") or {}
    sophia = "Sophia" in str(optimizer.get("class_path"))
    interval = (optimizer.get("init_args") or {}).get("hessian_interval", 10) if sophia else None
    model, tokens = describe(cli, settings), prepared.tokens_per_row
    for line in Plan(model, data.batch_size, accumulated, processes, tokens, steps, rows, interval).describe():
        say(line)


def build_alone(settings: dict[str, Any], say: Callable[[str], object]) -> Any:
    """A LightningCLI of one process for a config, with new weights left without numbers; its data is not prepared."""
    import torch

    from ...lightning import TextDataModule
    from ...lightning.cli import quiet
    from .lightning_run import build, in_folder

    trainer = {
        key: value for key, value in settings["trainer"].items() if key not in ("devices", "num_nodes", "strategy")
    }
    model = (settings["model"].get("init_args") or {}) if isinstance(settings["model"], dict) else {}
    with tempfile.TemporaryDirectory(prefix="sophia-dry-run-") as place, quiet():
        with torch.device("meta") if model.get("config") else torch.device("cpu"):
            cli = build(in_folder({**settings, "trainer": trainer}, RunFolder(Path(place))), [])
    if isinstance(cli.datamodule, TextDataModule):
        cli.datamodule.say = say
    return cli
