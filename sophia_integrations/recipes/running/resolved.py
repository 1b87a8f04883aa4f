"""A checked recipe as it is run and stored: defaults filled in, paths absolute, without the folder it runs in."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...text.files import absolute_globs
from ..reading.loader import CheckedRecipe
from ..reading.schema import Recipe
from .run_folder import RunFolder, choose_folder


@dataclass(frozen=True)
class Resolved:
    """A recipe of either framework.

    Attributes:
        file: where it was read.
        run_dir: the folder that it asks for, or None.
        settings: plain values, as ``recipe.yaml`` of a run folder holds them; for Lightning a LightningCLI config.
        recipe: what the Trainer's runner takes; None for Lightning.
    """

    file: Path
    run_dir: str | None
    settings: dict[str, Any]
    recipe: Recipe | None = None

    def folder(self, *, fresh: bool = False) -> RunFolder:
        """The run folder, or with `fresh` a new one beside it."""
        return self.folder_at(choose_folder(self.run_dir, self.file, fresh=fresh))

    def folder_at(self, path: Path) -> RunFolder:
        """The folder at `path` as that of this recipe."""
        return RunFolder(path, "trainer.default_root_dir" if self.recipe is None else "run_dir")


def resolve(checked: CheckedRecipe) -> Resolved:
    """The recipe as it is run."""
    if checked.recipe is None:
        run_dir = (checked.settings.get("trainer") or {}).get("default_root_dir")
        return Resolved(checked.file, run_dir, _lightning_settings(checked.settings))
    recipe = checked.recipe.model_copy(deep=True)
    run_dir, recipe.run_dir = recipe.run_dir, None
    data, model, tokenizer = recipe.data, recipe.model, recipe.tokenizer
    data.files, data.validation_files = _absolute(data.files), _absolute(data.validation_files)
    if data.hub is not None:
        data.hub.path = _absolute_folder(data.hub.path)
    for section in (model, tokenizer):
        if section is not None and section.pretrained is not None:
            section.pretrained = _absolute_folder(section.pretrained)
    return Resolved(checked.file, run_dir, recipe.settings(), recipe)


def _absolute(patterns: Sequence[str] | None) -> list[str] | None:
    return None if patterns is None else absolute_globs(patterns, Path.cwd())


def _absolute_folder(place: str) -> str:
    """A folder's full path; a hub id as it is."""
    folder = os.path.expanduser(place)
    return os.path.abspath(folder) if os.path.isdir(folder) else place


def _lightning_settings(config: dict[str, Any]) -> dict[str, Any]:
    settings = copy.deepcopy(config)
    trainer = settings["trainer"] = settings.get("trainer") or {}
    trainer.pop("default_root_dir", None)
    settings.pop("ckpt_path", None)
    if settings.get("seed_everything") in (None, True):
        settings["seed_everything"] = 0
    data = settings.get("data")
    if isinstance(data, dict) and str(data.get("class_path")).endswith("TextDataModule"):
        arguments = data.get("init_args") or {}
        for key in ("files", "validation_files"):
            if isinstance(arguments.get(key), list):
                arguments[key] = _absolute(arguments[key])
    return {"seed_everything": settings.pop("seed_everything"), **settings}
