"""The data of a recipe: its source read and split, its tokenizer, and both splits as tokens; and the model for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...text.prepare import Prepared, prepare
from ...text.source import Source, load_source
from ...text.tokenizer import load_tokenizer, train_tokenizer
from ..reading.schema import Recipe
from .model import build_model, require_sizes
from .run_folder import RunFolder, replace_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SOURCE = {
    "source", "files", "hub", "validation_files", "validation_fraction", "format", "columns", "streaming",
    "bad_rows",
}  # fmt: skip


def load(
    recipe: Recipe, seed: int, say: Callable[[str], object], folder: RunFolder | None = None, *, empty: bool = False
) -> tuple[PreTrainedTokenizerBase, Prepared, PreTrainedModel]:
    """The tokenizer, the data as tokens, and the model, which is sized to both.

    The tokenizer is that of `folder` if it has one, and is stored there otherwise.

    Args:
        recipe: resolved.
        seed: of the data's order and of new weights.
        say: receives the lines for the reader.
        folder: of the run; None without one.
        empty: the model has shapes but no numbers.

    Raises:
        UserError: the data cannot be read, is not what the run in `folder` began with, or does not fit the model.
    """
    require_sizes(recipe.model, recipe.task, recipe.data.block_size)
    tokenizer, data = _load_data(recipe, seed, say, folder)
    say(data.describe())
    return tokenizer, data, build_model(recipe.model, recipe.task, tokenizer, data, seed, empty=empty)


def _load_data(
    recipe: Recipe, seed: int, say: Callable[[str], object], folder: RunFolder | None
) -> tuple[PreTrainedTokenizerBase, Prepared]:
    source = load_source(**recipe.data.model_dump(include=_SOURCE), task=recipe.task, say=say)
    stored = folder is not None and folder.tokenizer.is_dir()
    if stored:
        tokenizer = load_tokenizer(str(folder.tokenizer), trust_remote_code=recipe.model.trust_remote_code)
    else:
        tokenizer = _build_tokenizer(recipe, source, say)
    data = prepare(
        source,
        tokenizer,
        task=recipe.task,
        seed=seed,
        say=say,
        **recipe.data.model_dump(include={"block_size", "packing", "mask_probability"}),
    )
    if folder is not None:
        folder.require_same_data(data.to_json())
        if not stored:
            replace_folder(folder.tokenizer, tokenizer.save_pretrained)
    return tokenizer, data


def _build_tokenizer(recipe: Recipe, source: Source, say: Callable[[str], object]) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer: trained on the source, a pretrained one, or the pretrained model's own."""
    wanted, model = recipe.tokenizer, recipe.model
    if wanted is not None and wanted.train is not None:
        return train_tokenizer(source, wanted.train.vocab_size, wanted.train.min_frequency, say, recipe.task)
    if wanted is not None and wanted.pretrained is not None:
        return load_tokenizer(wanted.pretrained, trust_remote_code=model.trust_remote_code)
    assert model.pretrained is not None
    return load_tokenizer(model.pretrained, model.revision, model.trust_remote_code, key="model.pretrained")
