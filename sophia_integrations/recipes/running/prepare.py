"""``sophia prepare``: everything a recipe needs from elsewhere, fetched and tokenized, so that it trains offline."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from .anywhere import read_anywhere
from .folder import RunFolder
from .plan import memory
from .train import folder_and_settings, require_packages, require_packages_of

_NEEDED = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]
_WEIGHTS = ("*.safetensors", "*.bin")
_ELSEWHERE = ["*/*"]  # folders of a repository hold the weights in other forms


def prepare(file: str | os.PathLike[str], overrides: Sequence[str], say: Callable[[str], object]) -> None:
    """Fetches data, tokenizer and weights into the caches of this machine and tokenizes the data there.

    Says what is where and how big it is.  Writes no run folder.

    Args:
        file: the recipe.
        overrides: ``key=value`` with dots in the key.
        say: receives the lines for the reader.

    Raises:
        UserError: something cannot be had, or the data does not fit the recipe.
    """
    require_packages()
    draft, adapted = read_anywhere(file, overrides)
    lightning = draft.framework == "lightning"
    require_packages_of(lightning)
    folder, settings = folder_and_settings(adapted)
    model = (settings["model"].get("init_args") or {}) if lightning else settings["model"]
    if isinstance(model.get("pretrained"), str):
        place = fetch_weights(model)
        say(f"weights: {model['pretrained']}, {memory(_bytes(place))} in {place}")
    with tempfile.TemporaryDirectory(prefix="sophia-prepare-") as temporary:
        aside = RunFolder(Path(temporary) / "run", folder.setting)
        aside.path.mkdir()
        (_prepare_lightning if lightning else _prepare)(settings, aside, say)
    for line in _where():
        say(line)
    say(f"Ready: {file} trains without the network; HF_HUB_OFFLINE=1 makes sure of it.")


def fetch_weights(model: Mapping[str, Any]) -> Path:
    """The folder with a pretrained model's files: the local one, or the one in the hub's cache, fetched if need be.

    Args:
        model: ``pretrained`` and ``revision`` of a recipe's model.

    Raises:
        UserError: there is no such model, or it has no weights.
    """
    from huggingface_hub import snapshot_download

    wanted = model["pretrained"]
    if Path(wanted).is_dir():
        place = Path(wanted)
    else:
        for weights in _WEIGHTS:
            try:
                options = {"allow_patterns": [*_NEEDED, weights], "ignore_patterns": _ELSEWHERE}
                place = Path(snapshot_download(wanted, revision=model.get("revision"), **options))
            except Exception as error:  # no such id, no network, a gate, a full disk: each has its own class
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"model.pretrained: {wanted!r} cannot be fetched: {reason}") from None
            if any(place.glob(weights)):
                break
    if not any(path for weights in _WEIGHTS for path in place.glob(weights)):
        raise UserError(f"model.pretrained: {place} holds no weights ({' or '.join(_WEIGHTS)})")
    return place


def _prepare(settings: dict[str, Any], aside: RunFolder, say: Callable[[str], object]) -> None:
    from ..reading.schema import Recipe
    from .data import load_data
    from .model import empty_model
    from .trainer import build_arguments

    recipe = Recipe.model_validate(settings)
    tokenizer, data = load_data(recipe, aside, build_arguments(recipe.training, aside).seed, say)
    say(data.describe())
    empty_model(recipe.model, recipe.task, tokenizer, data)
    hub = recipe.data.hub
    if "train" not in data.counts and hub is not None and not Path(hub.path).is_dir():
        raise UserError(
            f"data.streaming: the rows of {hub.path} are fetched while training, so this recipe cannot train offline; "
            "leave streaming out to fetch them all"
        )


def _prepare_lightning(settings: dict[str, Any], aside: RunFolder, say: Callable[[str], object]) -> None:
    import torch

    from ...lightning import TextDataModule
    from .lightning.dry_run import for_this_machine
    from .lightning.run import build, quiet
    from .lightning.settings import for_this_run

    here, _ = for_this_machine(settings)
    small = (here["model"].get("init_args") or {}).get("config") is not None
    with quiet(), torch.device("meta") if small else torch.device("cpu"):
        cli = build(for_this_run(here, aside), [])
    if isinstance(cli.datamodule, TextDataModule):
        cli.datamodule.say = say
    if cli.datamodule is not None:
        cli.datamodule.prepare_data()


def _where() -> list[str]:
    """The caches that hold something."""
    from huggingface_hub import constants

    from ...text.cache import cache_dir

    caches = {"tokens and tokenizers": cache_dir(), "models of the hub": Path(constants.HF_HUB_CACHE)}
    try:
        from datasets import config

        caches["data sets"] = Path(config.HF_DATASETS_CACHE)
    except ImportError:
        pass
    sizes = {name: _bytes(place) for name, place in caches.items() if place.is_dir()}
    return [f"{name}: {memory(size)} in {caches[name]}, of all recipes" for name, size in sizes.items() if size]


def _bytes(place: Path) -> int:
    return sum(path.stat().st_size for path in {path.resolve() for path in place.rglob("*") if path.is_file()})
