"""One run of a LightningCLI config in its folder: `SophiaCLI` builds it, its Trainer fits it, a callback writes."""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorboard  # noqa: F401  its absence is known now, not when TensorBoardLogger is made
import torch

from ...errors import UserError, first_line, one_line
from ...lightning import SophiaG, TextDataModule
from ...lightning.cli import SophiaCLI, quiet
from .checkpoints import put_aside_if_broken
from .lightning_callback import RunFolderCallback, Stopped, drop_stopped
from .processes import Processes
from .run_folder import RunFolder, is_about_the_disk, replace_folder
from .signals import StopRequest
from .summary import complete, evaluated_at, size_of

_OURS = __name__.partition(".")[0]
_LIBRARIES = ("lightning", "jsonargparse", "transformers", "peft", "huggingface_hub", "argparse")


def run(folder: RunFolder, config: dict[str, Any], processes: Processes, say: Callable[[str], object]) -> int:
    """Trains in `folder`, which this run holds, and returns the signal that stopped it, or 0 when it is complete.

    Args:
        folder: the run folder.
        config: a LightningCLI config, resolved.
        processes: all of them call this.
        say: receives the lines for the reader.
    """
    found = processes.first(lambda: newest_checkpoint(folder.checkpoints, processes, say))
    checkpoint, step = (found[0], found[1]) if found else (None, 0)
    stop = StopRequest(processes)
    callback = RunFolderCallback(folder, stop)
    with quiet():
        cli = build(in_folder(config, folder), [callback])
        _prepare_data(cli, folder, processes, say)
        say(describe(cli, config))
        if checkpoint is not None:
            callback.step = step
            if processes.main:
                callback.run_log.begin(step, None)
            if processes.first(lambda: _misses_evaluation(cli, folder, step)):
                _evaluate(cli, checkpoint)
        say(f"resuming from {checkpoint}" if checkpoint else f"training in {folder.path}")
        try:
            with stop.listening(), refusals_as_sentences(lambda: not callback.began):
                cli.trainer.fit(cli.model, datamodule=cli.datamodule, **_from(checkpoint, cli.trainer.fit))
        except Stopped:
            say(stop.sentence(callback.step, cli.trainer.max_steps, folder))
            return stop.signal
        _finish(cli, callback, folder, processes, say)
    return 0


def in_folder(config: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """The config as LightningCLI gets it: in its folder, on this machine's processes, with our lines and logger.

    Raises:
        UserError: the recipe asks for another number of devices than there are processes.
    """
    config = copy.deepcopy(config)
    trainer = config["trainer"]
    trainer.update(default_root_dir=str(folder.path), enable_progress_bar=False)
    trainer.setdefault("enable_model_summary", False)
    if trainer.get("logger") in (None, True):
        options = {"save_dir": str(folder.path), "name": folder.tensorboard.name, "version": ""}
        trainer["logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": options}
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
    wanted = devices_of(trainer)
    if wanted not in (None, 1, here):
        raise UserError(
            f"trainer.devices: the recipe asks for {wanted} devices, and this is one of {here} process(es) here; start "
            f"it with --nproc {wanted}"
        )
    if not isinstance(trainer.get("devices"), list):
        trainer["devices"] = here
    trainer["num_nodes"] = processes // here
    return config


def devices_of(trainer: dict[str, Any]) -> int | None:
    """How many devices of a machine a config asks for; None when it leaves that open."""
    devices = trainer.get("devices")
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdigit() else None


def build(config: dict[str, Any], callbacks: list[Any]) -> SophiaCLI:
    """Model, data and Trainer, by LightningCLI."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the user's own classes, as under `python -m`
    with refusals_as_sentences():
        return SophiaCLI(
            args=config,
            run=False,
            save_config_callback=None,
            trainer_defaults={"callbacks": callbacks},
            parser_kwargs={"exit_on_error": False},
        )


def describe(cli: SophiaCLI, config: dict[str, Any]) -> str:
    """The line about the model and its optimizer."""
    name, _ = optimizer_of(config)
    return f"model: {_model_name(cli.model)}, {size_of(cli.model)}" + (f", optimizer {name}" if name else "")


def optimizer_of(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of the optimizer that a config asks for; empty where the module makes its own."""
    spec = config.get("optimizer") or arguments_of(config["model"]).get("optimizer") or ""
    path = spec.get("class_path", "") if isinstance(spec, dict) else spec
    return str(path).rpartition(".")[2], arguments_of(spec)


def arguments_of(spec: Any) -> dict[str, Any]:
    """What a config gives a class that it asks for; nothing where it only names it."""
    return (spec.get("init_args") or {}) if isinstance(spec, dict) else {}


def newest_checkpoint(folder: Path, processes: Processes, say: Callable[[str], object]) -> tuple[str, int] | None:
    """The newest checkpoint of `folder` that can be read whole, and its optimizer step; or None.

    Those that cannot are reported through `say` and moved into ``broken/``; none is deleted.

    Raises:
        UserError: it was made by another number of processes, or holds objects that only running code could restore.
    """
    steps: dict[Path, int] = {}
    for path in folder.glob("*.ckpt"):
        with put_aside_if_broken(path, folder / "broken" / path.name, say):
            steps[path] = int(_read(path, whole=False)["global_step"])
    for path in sorted(steps, key=lambda path: (steps[path], path.name), reverse=True):
        with put_aside_if_broken(path, folder / "broken" / path.name, say):
            saved = (_read(path, whole=True).get("callbacks") or {}).get("ExactResume")
            if saved is not None:
                processes.require_same_number(len(saved["ranks"]), folder.parent)
            return str(path), steps[path]
    return None


def _read(path: Path, *, whole: bool) -> dict[str, Any]:
    """The state in a checkpoint (a folder, where ranks saved their shards), with its tensors when read `whole`."""
    file = path / "meta.pt" if path.is_dir() else path
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=not whole)
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():
            raise
        raise UserError(
            f"{path} holds objects that are not plain numbers, text and tensors, and running their code is not "
            f"safe; keep them out of save_hyperparameters and of on_save_checkpoint ({first_line(error)})"
        ) from None


def _from(checkpoint: str | None, entry: Callable[..., Any]) -> dict[str, Any]:
    """What `Trainer.fit` or `Trainer.validate` takes to begin there, without running code that the file holds."""
    if checkpoint is None:
        return {}
    safely = {"weights_only": True} if "weights_only" in inspect.signature(entry).parameters else {}
    return {"ckpt_path": checkpoint, **safely}


def _prepare_data(cli: SophiaCLI, folder: RunFolder, processes: Processes, say: Callable[[str], object]) -> None:
    """Of our own data module; any other prepares itself when training begins."""
    data = cli.datamodule
    if isinstance(data, TextDataModule):
        data.say = say
        processes.in_turn(data.prepare_data)
        processes.first(lambda: folder.require_same_data(data.prepared.to_json()))


def _misses_evaluation(cli: SophiaCLI, folder: RunFolder, step: int) -> bool:
    """Whether the run ended between the checkpoint and the evaluation of one step, which Lightning does not make up."""
    trainer, every = cli.trainer, cli.trainer.val_check_interval
    if not isinstance(every, int) or trainer.check_val_every_n_epoch is not None:
        return False
    return (step * trainer.accumulate_grad_batches) % every == 0 and not evaluated_at(folder, step)


def _evaluate(cli: SophiaCLI, checkpoint: str | None = None) -> None:
    """The validation loss of the weights as they are, or of a checkpoint; nothing without a validation step."""
    from lightning.pytorch.utilities.model_helpers import is_overridden

    has_data = any(is_overridden("val_dataloader", owner) for owner in (cli.model, cli.datamodule) if owner)
    if has_data and is_overridden("validation_step", cli.model) and cli.trainer.limit_val_batches:
        options = _from(checkpoint, cli.trainer.validate)
        cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False, **options)


def _finish(
    cli: SophiaCLI,
    callback: RunFolderCallback,
    folder: RunFolder,
    processes: Processes,
    say: Callable[[str], object],
) -> None:
    """Writes ``model/``, of a transformers model, and ``summary.json``, and says the losses; all processes call it."""
    step = callback.step = cli.trainer.global_step
    tokens, optimizers = callback.tokens, cli.trainer.optimizers
    if not processes.first(lambda: evaluated_at(folder, step)):
        _evaluate(cli)
    if not processes.main:
        return
    _save_model(cli, folder, say)
    drop_stopped(folder)
    names = {
        "model": _model_name(cli.model),
        "optimizer": type(optimizers[0]).__name__,
        "device": str(cli.trainer.strategy.root_device),
    }
    sophia = next((optimizer for optimizer in optimizers if isinstance(optimizer, SophiaG)), None)
    skipped = getattr(getattr(cli.datamodule, "prepared", None), "skipped_rows", None)
    counted = {"step": step, "tokens": tokens, "skipped_rows": skipped}
    complete(folder, say, module=cli.model, names=names, optimizer=sophia, **counted)


def _model_name(module: Any) -> str:
    """The type of the transformers model in a module, such as gpt2, or the name of the module's class."""
    config = getattr(getattr(module, "model", None), "config", None)
    return getattr(config, "model_type", None) or type(module).__name__


def _save_model(cli: SophiaCLI, folder: RunFolder, say: Callable[[str], object]) -> None:
    model, tokenizer = getattr(cli.model, "model", None), getattr(cli.datamodule, "tokenizer_object", None)
    if not hasattr(model, "save_pretrained"):
        return
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return say(f"The model is sharded over the processes; its weights are in {folder.checkpoints}.")

    def fill(aside: Any) -> None:
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)

    replace_folder(folder.model, fill)


@contextlib.contextmanager
def refusals_as_sentences(before_training: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Turns what libraries refuse into a `UserError`; an error in the user's own code keeps its traceback."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, MisconfigurationException, argparse.ArgumentError) as error:
        inner = error
        while _package(inner) == "jsonargparse" and inner.__cause__ is not None:
            inner = inner.__cause__  # what a constructor raised
        package = _package(inner)
        if not before_training() or is_about_the_disk(inner) or package not in (_OURS, *_LIBRARIES):
            raise inner from None
        if package == _OURS:
            raise UserError(str(inner)) from None
        keys = dict.fromkeys(re.findall(r'Parser key "([\w.]+)"', str(error)))  # of jsonargparse: the outer ones first
        raise UserError(": ".join([*([".".join(keys)] if keys else []), one_line(inner)])) from None


def _package(error: BaseException) -> str:
    """Whose code raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return name.partition(".")[0]
