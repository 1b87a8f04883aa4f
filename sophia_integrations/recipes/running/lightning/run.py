"""One run of a LightningCLI config in its folder: LightningCLI builds it, its Trainer trains it, ours is the folder."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import UserError
from ..disk import disk_trouble, reason, require_room, unwritable
from ..event_file import EventFile
from ..events import read_metrics
from ..folder import RunFolder
from ..processes import Processes
from ..signals import SignalWatch
from .settings import RUN_DIR, for_this_run

if TYPE_CHECKING:
    from ....lightning.cli import SophiaCLI
    from .checkpoints import LightningCheckpoint
    from .watch import RunMetrics

_OURS = __name__.partition(".")[0]
_LIBRARIES = ("lightning", "jsonargparse", "transformers", "peft", "huggingface_hub", "argparse")
_NOISE = (
    "LightningCLI's args parameter", ".*does not have many workers", ".*exists and is not empty",
    ".*isinstance.treespec, LeafSpec", ".is_gradient_checkpointing. is deprecated",
)  # fmt: skip


def run(folder: RunFolder, settings: dict[str, Any], processes: Processes, say: Callable[[str], object]) -> int:
    """As `running.run.run`, for a LightningCLI config."""
    with quiet():
        return _run(folder, settings, processes, say)


def _run(folder: RunFolder, settings: dict[str, Any], processes: Processes, say: Callable[[str], object]) -> int:
    from .checkpoints import KeptInFolder, LightningCheckpoint, last_good_lightning
    from .finish import evaluate, finish
    from .watch import RunMetrics, StopOnSignal, Stopped

    def find() -> tuple[str, int] | None:
        found = last_good_lightning(folder.checkpoints, processes.count, say)
        return (str(found.path), found.step) if found else None

    found = processes.first(find)
    checkpoint = LightningCheckpoint(Path(found[0]), found[1]) if found else None
    watch, metrics = SignalWatch(processes), RunMetrics(EventFile(folder.metrics), processes.main)
    callbacks = [KeptInFolder(folder.checkpoints), metrics, StopOnSignal(watch, folder)]
    cli = build(for_this_run(settings, folder), callbacks)
    _prepare_data(cli, folder, processes, say)
    processes.first(lambda: require_room(folder.path, _checkpoint_bytes(cli), RUN_DIR))
    say(_describe(cli, settings))
    if checkpoint is not None:
        metrics.step = checkpoint.step
        processes.first(lambda: metrics.events.resume_at(checkpoint.step))
        if processes.first(lambda: _misses_evaluation(cli, folder, checkpoint.step)):
            evaluate(cli, checkpoint)
    say(f"resuming from {checkpoint.path}" if checkpoint else f"training in {folder.path}")
    try:
        with watch.listening():
            _fit(cli, checkpoint, metrics)
    except Stopped:
        saved = f"checkpoint saved in {folder.path}" if metrics.step else "nothing to save yet"
        total = cli.trainer.max_steps
        say(f"Stopped at step {metrics.step}{f' of {total}' if total > 0 else ''}, {saved}. To go on, run the same "
            "command again.")  # fmt: skip
        return watch.signal
    except Exception as error:
        if disk_trouble(error):
            raise unwritable(folder.path, error) from None
        raise
    finish(cli, metrics, folder, processes, say)
    return 0


def build(config: dict[str, Any], callbacks: list[Any]) -> SophiaCLI:
    """Model, data and Trainer, by LightningCLI."""
    from ....lightning.cli import SophiaCLI

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the user's own classes, as under `python -m`
    with _as_sentence():
        return SophiaCLI(
            args=config,
            run=False,
            save_config_callback=None,
            trainer_defaults={"callbacks": callbacks},
            parser_kwargs={"exit_on_error": False},
        )


def _prepare_data(cli: SophiaCLI, folder: RunFolder, processes: Processes, say: Callable[[str], object]) -> None:
    """Of our own data module; any other prepares itself when training begins."""
    from ....lightning import TextDataModule

    data = cli.datamodule
    if not isinstance(data, TextDataModule):
        return
    data.say = say
    processes.in_turn(data.prepare_data)
    processes.first(lambda: folder.require_same_data(data.prepared.to_json()))


def _checkpoint_bytes(cli: SophiaCLI) -> int:
    """Of the checkpoints kept at once: weights and two moments in float32, and of the model at the end."""
    kept = 1 + max((abs(getattr(c, "save_top_k", 1)) for c in cli.trainer.checkpoint_callbacks), default=0)
    parameters = list(cli.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    stored = sum(p.numel() for p in parameters) if cli.model.strict_loading else trained
    return 4 * (kept * (stored + 2 * trained) + stored)


def _describe(cli: SophiaCLI, settings: dict[str, Any]) -> str:
    from .finish import model_name

    parameters = list(cli.model.parameters())
    total, trained = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (True, False))
    size = f"{total:,} parameters" + (f" of which {trained:,} are trained" if trained < total else "")
    arguments = settings["model"].get("init_args") if isinstance(settings["model"], dict) else None
    named = settings.get("optimizer") or (arguments or {}).get("optimizer") or ""
    optimizer = str(named.get("class_path", "") if isinstance(named, dict) else named).rpartition(".")[2]
    return f"model: {model_name(cli.model)}, {size}" + (f", optimizer {optimizer}" if optimizer else "")


def _misses_evaluation(cli: SophiaCLI, folder: RunFolder, step: int) -> bool:
    """Whether the run ended between the checkpoint and the evaluation of the same step."""
    trainer, every = cli.trainer, cli.trainer.val_check_interval
    if not isinstance(every, int) or trainer.check_val_every_n_epoch is not None:
        return False
    due = (step * trainer.accumulate_grad_batches) % every == 0
    return due and not any("eval_loss" in event and event["step"] == step for event in read_metrics(folder.metrics))


def _fit(cli: SophiaCLI, checkpoint: LightningCheckpoint | None, metrics: RunMetrics) -> None:
    options: dict[str, Any] = {"datamodule": cli.datamodule}
    if checkpoint is not None:
        options.update(checkpoint.options(cli.trainer.fit))
    with _as_sentence(lambda: not metrics.began):
        cli.trainer.fit(cli.model, **options)


@contextlib.contextmanager
def _as_sentence(here: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Turns what libraries refuse into a `UserError`; an error in the user's own code keeps its traceback."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, MisconfigurationException, argparse.ArgumentError) as error:
        inner = error
        while _package(inner) == "jsonargparse" and inner.__cause__ is not None:
            inner = inner.__cause__  # what a constructor raised
        package = _package(inner)
        if not here() or disk_trouble(inner) or package not in (_OURS, *_LIBRARIES):
            raise inner from None
        raise UserError(str(inner) if package == _OURS else reason(inner)) from None


def _package(error: BaseException) -> str:
    """Whose code raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return name.partition(".")[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's own lines of information and the warnings that a run folder answers."""
    import lightning.pytorch  # noqa: F401  (its import sets the levels that are set here)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar per file that is loaded or saved
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for pattern in _NOISE:
                warnings.filterwarnings("ignore", pattern)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
