"""A call of ``sophia train``: the recipe checked, its folder claimed, then the run, in one process or in several."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..reading.draft import Draft
from ..reading.lightning import is_lightning
from ..reading.loader import check, read
from .folder import RunFolder, choose_folder, resolve
from .launch import end_with_launcher
from .lightning.settings import RUN_DIR, resolve_lightning, run_dir
from .processes import Processes

NEEDED = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "tqdm", "tensorboard")


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        folder: the run folder.
        signal: the number of the signal that stopped it; 0 when the run is complete.
        trained: whether this process completed the run just now.
    """

    folder: Path
    signal: int = 0
    trained: bool = True


def require_packages(names: Sequence[str] = NEEDED, extra: str = "recipes") -> None:
    """Raises `UserError` naming the packages of an extra that are not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{'recipes' if extra == 'recipes' else 'recipes for Lightning'} need {', '.join(missing)}, not installed "
            f"here: pip install 'sophia-integrations[{extra}]'"
        )


def train(
    file: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    say: Callable[[str], object] = print,
) -> Outcome:
    """Trains a recipe, goes on with an interrupted run of it, or says that it is complete.

    Several processes, such as torchrun starts, make one run: rank 0 speaks and writes.

    Args:
        file: the recipe.
        overrides: ``key=value`` with dots in the key.
        fresh: start in a new numbered folder instead of going on.
        say: receives the lines for the reader.

    Raises:
        UserError: anything the user can mend; before training where it can be known then.
    """
    processes = Processes()
    if processes.count == 1:
        return _train(file, overrides, fresh, processes, say)
    end_with_launcher()
    failed = True
    try:
        with processes.quiet_if_another_failed():
            outcome = _train(file, overrides, fresh, processes, say if processes.main else _silent)
        failed = False
        return outcome
    except KeyboardInterrupt:
        if processes.main:
            raise
        raise SystemExit(130) from None
    finally:
        processes.leave(failed=failed)


def _train(
    file: str | os.PathLike[str],
    overrides: Sequence[str],
    fresh: bool,
    processes: Processes,
    say: Callable[[str], object],
) -> Outcome:
    def choose() -> tuple[str, dict[str, Any] | None]:
        folder, settings = _choose(file, overrides, fresh, say)
        return str(folder.path), settings

    path, settings = processes.first(choose)
    if settings is None:
        return Outcome(Path(path), trained=False)
    require_packages_of(is_lightning(settings))
    if not processes.main:
        _hush()
    return run_in(Path(path), settings, processes, say)


def run_in(
    path: Path,
    settings: dict[str, Any],
    processes: Processes,
    say: Callable[[str], object],
    bring: Path | None = None,
) -> Outcome:
    """The run of a resolved recipe in the folder `path`, held by this process meanwhile; all processes call it.

    Files in `bring` are copied to ``inputs/`` in it first.
    """
    lightning = is_lightning(settings)
    folder = _run_folder(path, lightning)
    with contextlib.ExitStack() as held:

        def claim() -> None:
            held.enter_context(folder.lock())
            folder.claim(settings)
            if bring is not None:
                shutil.copytree(bring, folder.path / "inputs")

        processes.first(claim)
        if not folder.recipe.is_file():
            raise UserError(
                f"process {processes.rank} does not see the run folder {folder.path}; all processes need one folder: "
                f"choose one on a shared disk with {folder.setting}=PATH"
            )
        if lightning:
            from .lightning.run import run
        else:
            from .run import run

        number = run(folder, settings, processes, say)
        return Outcome(folder.path, number, trained=processes.main and not number)


def _choose(
    file: str | os.PathLike[str], overrides: Sequence[str], fresh: bool, say: Callable[[str], object]
) -> tuple[RunFolder, dict[str, Any] | None]:
    """The folder and the resolved recipe; None for a recipe when the run in the folder is complete."""
    draft = read(file, overrides)
    if not draft.problems and not fresh:
        folder, settings = folder_and_settings(draft)
        if folder.complete:
            try:
                folder.require_same(settings)
            except UserError:
                check(draft)  # a misspelt key is that, not another recipe
                raise
            loss = folder.read_summary().get("validation_loss")
            shown = "not finite" if loss is None else f"{loss:.4f}"
            say(f"{folder.path} is complete: validation loss {shown}. To train anew, add --fresh.")
            return folder, None
    require_packages_of(draft.framework == "lightning")
    check(draft)
    folder, settings = folder_and_settings(draft, fresh=fresh)
    folder.require_same(settings)
    folder.prepare()
    return folder, settings


def folder_and_settings(draft: Draft, *, fresh: bool = False) -> tuple[RunFolder, dict[str, Any]]:
    """The run folder and the resolved recipe of a draft without problems."""
    if draft.config is not None:
        wanted, settings = run_dir(draft.config), resolve_lightning(draft.config)
    else:
        assert draft.recipe is not None
        wanted, settings = draft.recipe.run_dir, resolve(draft.recipe)
    return _run_folder(choose_folder(wanted, draft.file, fresh=fresh), draft.config is not None), settings


def _run_folder(path: Path, lightning: bool) -> RunFolder:
    return RunFolder(path, RUN_DIR if lightning else "run_dir")


def require_packages_of(lightning: bool) -> None:
    """Raises `UserError` naming what a recipe of this framework needs and is not installed."""
    require_packages()
    if lightning:
        require_packages(("lightning", "jsonargparse"), extra="lightning")


def _hush() -> None:
    """What libraries have to say, rank 0 says too."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


def _silent(line: str) -> None:
    """For the processes that do not speak."""
