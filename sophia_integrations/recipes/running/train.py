"""A call of ``sophia train``: the recipe checked, its folder claimed, then the run, in one process or in several."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from ..reading.loader import read
from .processes import Processes
from .resolved import Resolved, resolve
from .run_folder import RunFolder


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
    with processes.speaking_once():
        recipe = processes.in_turn(lambda: resolve(read(file, overrides)))
        return _train(recipe, fresh, processes, say if processes.main else _silent)


def _train(recipe: Resolved, fresh: bool, processes: Processes, say: Callable[[str], object]) -> Outcome:
    path, is_complete = processes.first(lambda: _choose(recipe, fresh, say))
    if is_complete:
        return Outcome(Path(path), trained=False)
    if not processes.main:
        _hush()
    folder = recipe.folder_at(Path(path))
    with folder.lock() if processes.main else contextlib.nullcontext():
        processes.first(lambda: folder.claim(recipe.settings))
        if not folder.recipe.is_file():
            raise UserError(
                f"process {processes.rank} does not see the run folder {folder.path}; all processes need one folder: "
                f"choose one on a shared disk with {folder.setting}=PATH"
            )
        number = _run(folder, recipe, processes, say)
    return Outcome(folder.path, number, trained=processes.main and not number)


def _choose(recipe: Resolved, fresh: bool, say: Callable[[str], object]) -> tuple[str, bool]:
    """The folder to train in, made and writable, and whether a run of this recipe is complete there."""
    folder = recipe.folder(fresh=fresh)
    folder.require_same(recipe.settings)
    if folder.complete:
        loss = folder.read_summary().get("validation_loss")
        shown = "not finite" if loss is None else f"{loss:.4f}"
        say(f"{folder.path} is complete: validation loss {shown}. To train anew, add --fresh.")
        return str(folder.path), True
    folder.prepare()
    return str(folder.path), False


def _run(folder: RunFolder, recipe: Resolved, processes: Processes, say: Callable[[str], object]) -> int:
    """The framework's own fit; returns the signal that stopped it, or 0."""
    with folder.full_disk_as_sentence():
        if recipe.recipe is None:
            from .lightning_run import run

            return run(folder, recipe.settings, processes, say)
        from . import trainer_run

        return trainer_run.run(folder, recipe.recipe, processes, say)


def _hush() -> None:
    """What libraries have to say, rank 0 says too."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


def _silent(line: str) -> None:
    """For the processes that do not speak."""
