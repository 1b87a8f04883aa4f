"""``sophia prepare``: everything a recipe needs from elsewhere, fetched and tokenized, so that it trains offline."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError, first_line
from ..reading.schema import Recipe
from .dry_run import build_alone, resolve_for_this_machine
from .run_folder import RunFolder

_CONFIGS = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]
_WEIGHTS = ("*.safetensors", "*.bin")
_ELSEWHERE = ["*/*"]  # folders of a repository hold the weights in other forms


def prepare(file: str | os.PathLike[str], overrides: Sequence[str], say: Callable[[str], object]) -> None:
    """Fetches data, tokenizer and weights into the caches of this machine and tokenizes the data there.

    Says what is where.  Writes no run folder.

    Args:
        file: the recipe.
        overrides: ``key=value`` with dots in the key.
        say: receives the lines for the reader.

    Raises:
        UserError: something cannot be had, or the data does not fit the recipe.
    """
    _, here = resolve_for_this_machine(file, overrides)
    lightning = here.recipe is None
    model = (here.settings["model"].get("init_args") or {}) if lightning else here.settings["model"]
    if isinstance(model.get("pretrained"), str):
        say(f"weights: {model['pretrained']} in {fetch_weights(model)}")
    if here.recipe is not None:
        _prepare(here.recipe, say)
    else:
        data = build_alone(here.settings, say).datamodule
        if data is not None:
            data.prepare_data()
    from ...text.cache import cache_dir

    say(f"tokens and tokenizers: in {cache_dir()}")
    say(f"Ready: {file} trains without the network; HF_HUB_OFFLINE=1 makes sure of it.")


def fetch_weights(model: Mapping[str, Any]) -> Path:
    """The folder with a pretrained model's files: the local one, or the one in the hub's cache, fetched if need be.

    Args:
        model: ``pretrained`` and ``revision`` of a recipe's model.

    Raises:
        UserError: there is no such model, or it has no weights.
    """
    from huggingface_hub import snapshot_download

    place = Path(model["pretrained"])
    for weights in _WEIGHTS:
        if not Path(model["pretrained"]).is_dir():
            options = {"allow_patterns": [*_CONFIGS, weights], "ignore_patterns": _ELSEWHERE}
            try:
                place = Path(snapshot_download(model["pretrained"], revision=model.get("revision"), **options))
            except Exception as error:  # no such id, no network, a gate, a full disk: each has its own class
                raise UserError(
                    f"model.pretrained: {model['pretrained']!r} cannot be fetched: {first_line(error)}"
                ) from None
        if any(place.glob(weights)):
            return place
    raise UserError(f"model.pretrained: {place} holds no weights ({' or '.join(_WEIGHTS)})")


def _prepare(recipe: Recipe, say: Callable[[str], object]) -> None:
    from .data import load_data
    from .model import build_model
    from .trainer_run import build_arguments

    seed = build_arguments(recipe.training, RunFolder(Path(tempfile.gettempdir(), "unused"))).seed
    tokenizer, data = load_data(recipe, seed, say)
    say(data.describe())
    build_model(recipe.model, recipe.task, tokenizer, data, seed, empty=True)
    hub = recipe.data.hub
    if "train" not in data.counts and hub is not None and not Path(hub.path).is_dir():
        raise UserError(
            f"data.streaming: the rows of {hub.path} are fetched while training, so this recipe cannot train offline; "
            "leave streaming out to fetch them all"
        )
