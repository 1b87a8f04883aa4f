"""``sophia prepare``: everything a recipe needs from elsewhere, fetched and tokenized, so that it trains offline."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ...cache import cache_dir
from ...errors import UserError
from ..reading.loader import read
from ..reading.schema import Recipe
from .dry_run import arguments_here, build_alone
from .resolved import resolve


def prepare(file: str | os.PathLike[str], overrides: Sequence[str], say: Callable[[str], object]) -> None:
    """Loads data, tokenizer and weights, which leaves them in the caches of this machine, and tokenizes the data there.

    Writes no run folder.

    Args:
        file: the recipe.
        overrides: ``key=value`` with dots in the key.
        say: receives the lines for the reader.

    Raises:
        UserError: something cannot be had, or the data does not fit the recipe.
    """
    wanted = resolve(read(file, overrides))
    if wanted.recipe is not None:
        _prepare(wanted.recipe, say)
    else:
        data = build_alone(wanted.settings, say).datamodule
        if data is not None:
            data.prepare_data()
    say(f"Ready, in {cache_dir()} and the hub's own cache: {file} trains without the network; HF_HUB_OFFLINE=1 makes "
        "sure of it.")  # fmt: skip


def _prepare(recipe: Recipe, say: Callable[[str], object]) -> None:
    from .training_data import load

    _, data, _ = load(recipe, arguments_here(recipe).seed, say, empty=recipe.model.pretrained is None)
    hub = recipe.data.hub
    if "train" not in data.counts and hub is not None and not Path(hub.path).is_dir():
        raise UserError(
            f"data.streaming: the rows of {hub.path} are fetched while training, so this recipe cannot train offline; "
            "leave streaming out to fetch them all"
        )
