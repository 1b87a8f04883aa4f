"""One run in its folder, from a resolved recipe to summary: data, model, Trainer, going on after a stop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ..reading.schema import Recipe
from .checkpoints import Checkpoint, last_good
from .data import load_data
from .disk import disk_trouble, reason, require_room, unwritable
from .finish import finish
from .folder import RunFolder
from .memory import groups_of, optimizer_maker, weigh
from .model import build_model
from .plan import checkpoints_kept, length_of, size_in_words
from .processes import Processes
from .saving import tidy
from .trainer import build_arguments, build_trainer


def run(folder: RunFolder, settings: dict[str, Any], processes: Processes, say: Callable[[str], object]) -> int:
    """Trains in `folder`, which this run holds, and returns the signal that stopped it, or 0 when it is complete.

    Args:
        folder: the run folder, holding the recipe.
        settings: the resolved recipe.
        processes: all of them call this.
        say: receives the lines for the reader.
    """
    recipe = Recipe.model_validate(settings)
    require_devices(recipe.training, int(os.environ.get("LOCAL_WORLD_SIZE") or processes.count))
    checkpoint = _checkpoint(folder, processes, say)
    arguments = build_arguments(recipe.training, folder)
    tokenizer, data = processes.in_turn(lambda: load_data(recipe, folder, arguments.seed, say))
    say(data.describe())
    model = processes.in_turn(lambda: build_model(recipe.model, recipe.task, tokenizer, data, arguments.seed))
    weight = weigh(model, optimizer_maker(arguments), groups_of(arguments, model))
    rows = len(data.train) if "train" in data.counts else None  # type: ignore[arg-type]
    length = length_of(arguments, rows, processes.count)
    missing = max(0, checkpoints_kept(arguments, length) - len(list(folder.path.glob("checkpoint-*"))))
    processes.first(lambda: require_room(folder.path, weight.checkpoints(missing)))
    optimizer = getattr(arguments.optim, "value", arguments.optim)
    say(f"model: {model.config.model_type}, {size_in_words(weight)}, optimizer {optimizer}")
    gpus = arguments.device.type == "cuda" and torch.cuda.device_count()
    if processes.count == 1 and gpus > 1:
        say(f"This process trains on one of {gpus} GPUs; --nproc {gpus} uses them all.")
    finished = checkpoint is not None and checkpoint.finished
    trainer, watch = build_trainer(model, tokenizer, data, arguments, folder, processes)
    if finished:
        best = checkpoint.state.get("best_model_checkpoint") if arguments.load_best_model_at_end else None
        trainer.load_weights(best or str(checkpoint.path))
        trainer.state.global_step = trainer.state.max_steps = checkpoint.step
        trainer.state.epoch = checkpoint.state["epoch"]
        if processes.main:
            watch.metrics.resume_at(checkpoint.step)
    else:
        with refused_optimizer():  # built now, so that arguments it refuses are known before training
            trainer.create_optimizer()
        say(f"resuming from {checkpoint.path}" if checkpoint else f"training in {folder.path}")
        with _in_words(folder), watch.stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        if watch.stop.signal is not None and trainer.state.global_step < trainer.state.max_steps:
            say(f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, checkpoint saved in "
                f"{folder.path}. To go on, run the same command again.")  # fmt: skip
            return watch.stop.signal
    with _in_words(folder):
        finish(recipe, trainer, tokenizer, data, folder, watch, say)
    return 0


def require_devices(training: dict[str, Any], processes: int) -> None:
    """Raises `UserError` when `processes` of this machine would share its GPUs."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and not training.get("use_cpu") else processes
    if processes > gpus:
        raise UserError(
            f"{processes} processes need as many GPUs, and this machine has {gpus}: start it with --nproc {gpus}, or "
            "train on the CPU with training.use_cpu=true"
        )


def _checkpoint(folder: RunFolder, processes: Processes, say: Callable[[str], object]) -> Checkpoint | None:
    def find() -> str | None:
        tidy(folder.path)
        found = last_good(folder.path, say)
        if found is not None and not found.finished and found.processes != processes.count:
            began = "one process" if found.processes == 1 else f"{found.processes} processes"
            raise UserError(
                f"the run in {folder.path} trains with {began}, and this is {processes.count}: its batches would be "
                f"others. Go on with --nproc {found.processes}, or use --fresh to start anew"
            )
        return str(found.path) if found is not None else None

    path = processes.first(find)
    return Checkpoint.at(Path(path)) if path is not None else None


@contextlib.contextmanager
def refused_optimizer() -> Iterator[None]:
    """Turns what an optimizer says of its arguments into a `UserError`."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training.optim, training.optim_args: {reason(error)}") from None


@contextlib.contextmanager
def _in_words(folder: RunFolder) -> Iterator[None]:
    """Turns what the user can mend of a training's errors into a `UserError`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) and "DataLoader worker" in str(error):
            raise UserError(str(error).strip().splitlines()[-1].partition(": ")[2]) from None
        if disk_trouble(error):
            raise unwritable(folder.path, error) from None
        if "find_unused_parameters" in str(error):
            raise UserError(
                "some parameters got no gradient, which several processes must know before: set "
                "training.ddp_find_unused_parameters=true"
            ) from None
        raise
