"""A LightningCLI config as a run: where it goes, what of it is kept in the run folder, what a run sets itself."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from ....errors import UserError
from ....text.files import absolute_globs
from ..folder import RunFolder

RUN_DIR = "trainer.default_root_dir"


def run_dir(config: dict[str, Any]) -> str | None:
    """The run folder that a config asks for."""
    return (config.get("trainer") or {}).get("default_root_dir")


def resolve_lightning(config: dict[str, Any]) -> dict[str, Any]:
    """The config with a seed and file patterns made absolute; without its folder, so that a run can be moved.

    Raises:
        UserError: it says where checkpoints are or where to go on, which a run folder settles.
    """
    settings = copy.deepcopy(config)
    trainer = settings["trainer"] = settings.get("trainer") or {}
    trainer.pop("default_root_dir", None)
    if settings.pop("ckpt_path", None) is not None:
        raise UserError("ckpt_path: leave it out: a run goes on from its own last whole checkpoint by itself")
    if any(arguments.get("dirpath") is not None for arguments in _checkpointing(trainer)):
        raise UserError(
            "trainer.callbacks: leave dirpath out of ModelCheckpoint: checkpoints are kept in the run folder, and a "
            "run goes on from them"
        )
    if settings.get("seed_everything") in (None, True):
        settings["seed_everything"] = 0
    data = settings.get("data")
    if isinstance(data, dict) and str(data.get("class_path")).endswith("TextDataModule"):
        arguments = data.get("init_args") or {}
        for key in ("files", "validation_files"):
            if isinstance(arguments.get(key), list):
                arguments[key] = absolute_globs(arguments[key], Path.cwd())
    return {"seed_everything": settings.pop("seed_everything"), **settings}


def for_this_run(settings: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """The config as LightningCLI gets it: in its folder, on this machine's processes, with our progress and logger.

    Raises:
        UserError: the recipe asks for another number of devices than there are processes.
    """
    config = copy.deepcopy(settings)
    trainer = config["trainer"]
    trainer.update(default_root_dir=str(folder.path), enable_progress_bar=False)
    trainer.setdefault("enable_model_summary", False)
    if trainer.get("logger") in (None, True):
        options = {"save_dir": str(folder.path), "name": folder.tensorboard.name, "version": ""}
        trainer["logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": options}
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
    wanted = _count(trainer.get("devices"))
    if wanted is not None and wanted > 1 and wanted != here:
        raise UserError(
            f"trainer.devices: the recipe asks for {wanted} devices, and this is one of {here} process(es) here; start "
            f"it with --nproc {wanted}"
        )
    if not isinstance(trainer.get("devices"), list):
        trainer["devices"] = here
    trainer["num_nodes"] = processes // here
    return config


def _count(devices: Any) -> int | None:
    """How many devices a recipe asks for; None when it leaves that open."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices).strip()
    return int(text) if text.isdigit() else None


def _checkpointing(trainer: dict[str, Any]) -> list[dict[str, Any]]:
    callbacks = trainer.get("callbacks") or []
    entries = callbacks if isinstance(callbacks, list) else [callbacks]
    found = [entry for entry in entries if isinstance(entry, dict)]
    return [e.get("init_args") or {} for e in found if str(e.get("class_path")).endswith("ModelCheckpoint")]
