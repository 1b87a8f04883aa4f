"""The data of a run: its source read and split, its tokenizer, and both splits as tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...text.prepare import Prepared, prepare
from ...text.source import Source, load_source
from ...text.tokenizer import load_tokenizer, train_tokenizer
from ..reading.schema import Recipe
from .folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SOURCE = {
    "source", "files", "hub", "validation_files", "validation_fraction", "format", "columns", "streaming",
    "bad_rows",
}  # fmt: skip


def load_data(
    recipe: Recipe, folder: RunFolder, seed: int, say: Callable[[str], object]
) -> tuple[PreTrainedTokenizerBase, Prepared]:
    """The tokenizer, taken from `folder` if it is there and stored in it otherwise, and the data as tokens.

    Raises:
        UserError: the data cannot be read, or is not what the run in `folder` began with.
    """
    source = load_source(**recipe.data.model_dump(include=_SOURCE), task=recipe.task, say=say)
    if source.skipped:
        say(f"Skipping {len(source.skipped)} files that are not text in their declared encoding.")
    stored = folder.tokenizer.is_dir()
    tokenizer = _stored(recipe, folder) if stored else build_tokenizer(recipe, source, say)
    data = prepare(
        source,
        tokenizer,
        task=recipe.task,
        seed=seed,
        say=say,
        **recipe.data.model_dump(include={"block_size", "packing", "mask_probability"}),
    )
    folder.require_same_data(data.to_json())
    if not stored:
        _save(tokenizer, folder)
    return tokenizer, data


def build_tokenizer(recipe: Recipe, source: Source, say: Callable[[str], object]) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer: trained on the source, a pretrained one, or the pretrained model's own."""
    wanted, model = recipe.tokenizer, recipe.model
    if wanted is not None and wanted.train is not None:
        return train_tokenizer(source, wanted.train.vocab_size, wanted.train.min_frequency, say, recipe.task)
    if wanted is not None and wanted.pretrained is not None:
        return load_tokenizer(wanted.pretrained, trust_remote_code=model.trust_remote_code)
    assert model.pretrained is not None
    return load_tokenizer(model.pretrained, model.revision, model.trust_remote_code, key="model.pretrained")


def _stored(recipe: Recipe, folder: RunFolder) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(folder.tokenizer), trust_remote_code=recipe.model.trust_remote_code)


def _save(tokenizer: Any, folder: RunFolder) -> None:
    aside = folder.path / ".tokenizer"
    shutil.rmtree(aside, ignore_errors=True)
    tokenizer.save_pretrained(aside)
    aside.rename(folder.tokenizer)
