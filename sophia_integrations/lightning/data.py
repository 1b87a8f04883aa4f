"""Text as batches for a LightningModule: the sources, formats, tokenizers and cache of `text/`, position kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..text.prepare import Prepared, prepare
from ..text.source import load_source
from ..text.tokenizer import load_tokenizer, train_tokenizer
from .causal_lm import CausalLM
from .loader import RowLoader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Hub(TypedDict, total=False):
    """A data set by its hub id, or a folder with a copy of its repository: `path` alone is needed."""

    path: str
    name: str
    split: str
    validation_split: str
    revision: str


class TextDataModule(LightningDataModule):
    """Text files or a data set as batches of tokens for a causal language model, to pre-train or fine-tune it.

    Without `files` and `hub`, the text is the running Python's standard library: about 10 MB on every machine, nothing
    is downloaded, but losses compare only within one Python version. Text is joined by an end-of-text token and cut
    into rows of `block_size`; of prompt-completion and chat examples each is a row, padded in its batch, and only the
    completion and the assistant's words carry loss. A file is held out for validation by a hash of its name, a row by
    a hash of its content. The training loader's position is part of Lightning's checkpoints, so mid-epoch resume is
    exact. The same settings give the same rows as in a recipe for the Hugging Face Trainer.

    Args:
        files: glob patterns of text files (one document each), jsonl, json, csv, parquet or arrow (one row each); `**`
            crosses folders.
        tokenizer: path or hub id of a transformers tokenizer; by default a byte-level BPE is trained on the text.
        vocab_size: of the tokenizer that is trained.
        block_size: tokens in a row; a longer example is cut.
        batch_size: rows of a batch on one device.
        validation_fraction: share of the documents or rows held out, in (0, 1).
        seed: key of the order of the rows.
        cache_dir: where tokens are kept; `$SOPHIA_CACHE`, else `sophia-integrations` in the user's cache folder.
        hub: a data set by its hub id or folder, instead of `files`.
        validation_files: glob patterns of the files held out, instead of a fraction.
        task: what `format` follows from when it is not given: text for pretrain; for finetune what the columns say.
        format: what a row holds: text, a prompt and its completion, or the messages of a chat.
        columns: the column of each part (text, prompt, completion, messages) that has another name.
        packing: put several prompt-completion or chat examples into one row, without a view of each other.
        min_frequency: how often a pair of tokens must occur for the trained tokenizer to join it.
        bad_rows: refuse data with bad rows, or leave them out and count them.

    Attributes:
        prepared: both splits as rows, their counts and their digest, once they are prepared.
        tokenizer_object: the tokenizer, once it is prepared.

    Raises:
        ValueError: an option out of range, or, when training begins, a model that does not fit the text.
        UserError: on preparing, a source that cannot be read, or too little text for a row.
    """

    def __init__(
        self,
        files: list[str] | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        block_size: int = 128,
        batch_size: int = 8,
        validation_fraction: float = 0.05,
        seed: int = 0,
        cache_dir: str | None = None,
        hub: Hub | None = None,
        validation_files: list[str] | None = None,
        task: Literal["pretrain", "finetune"] = "pretrain",
        format: Literal["text", "prompt-completion", "chat"] | None = None,
        columns: dict[str, str] | None = None,
        packing: bool | None = None,
        min_frequency: int = 2,
        bad_rows: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__()
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction!r}.")
        if min(block_size, batch_size) < 1:
            raise ValueError("block_size and batch_size must be at least 1.")
        if bad_rows not in ("error", "skip"):
            raise ValueError(f'bad_rows must be "error" or "skip", got {bad_rows!r}.')
        if files is not None and hub is not None:
            raise ValueError("TextDataModule reads files or hub: give one of them.")
        if hub is not None and "path" not in hub:
            raise ValueError("TextDataModule's hub needs a path: the id of a data set, or a folder.")
        self.source = {
            "source": "python-stdlib" if files is None and hub is None else None,
            "files": files,
            "hub": hub,
            "validation_files": validation_files,
            "validation_fraction": validation_fraction,
            "format": format,
            "columns": columns,
            "bad_rows": bad_rows,
        }
        self.tokenizer, self.vocab_size, self.min_frequency = tokenizer, vocab_size, min_frequency
        self.task, self.block_size, self.packing = task, block_size, packing
        self.batch_size, self.seed, self.cache_dir = batch_size, seed, cache_dir
        self.say: Any = rank_zero_info
        self.prepared: Prepared | None = None
        self.tokenizer_object: PreTrainedTokenizerBase | None = None

    def prepare_data(self) -> None:
        """Fill the cache; Lightning calls this on one process of a machine."""
        self._prepare()

    def setup(self, stage: str) -> None:
        self._prepare()
        self._require_fit(getattr(self.trainer, "lightning_module", None))

    def train_dataloader(self) -> RowLoader:
        loader = self._loader(self.prepared.train, shuffle=True)
        if not len(loader):
            raise ValueError(f"{len(self.prepared.train)} training rows do not fill one batch: give more text.")
        return loader

    def val_dataloader(self) -> RowLoader:
        return self._loader(self.prepared.validation, shuffle=False)

    def _loader(self, rows: Any, shuffle: bool) -> RowLoader:
        ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return RowLoader(rows, self.batch_size, self.prepared.collate, shuffle, self.seed, *ranks)

    def _prepare(self) -> None:
        if self.prepared is not None:
            return
        with _cache(self.cache_dir):
            source = load_source(task=self.task, **self.source, say=self.say)
            if self.tokenizer is None:
                tokenizer = train_tokenizer(source, self.vocab_size, self.min_frequency, self.say)
            else:
                tokenizer = load_tokenizer(self.tokenizer, key="data.tokenizer")
            options = dict(block_size=self.block_size, task=self.task, packing=self.packing, say=self.say)
            self.prepared, self.tokenizer_object = prepare(source, tokenizer, **options), tokenizer
        self.say(self.prepared.describe())

    def _require_fit(self, module: Any) -> None:
        config = getattr(getattr(module, "model", None), "config", None)
        known, tokens = getattr(config, "vocab_size", None), len(self.tokenizer_object)
        context = getattr(config, "max_position_embeddings", None)
        if known is not None and tokens > known:
            raise ValueError(f"the tokenizer has {tokens} tokens, and the model's vocab_size is only {known}.")
        if context is not None and self.block_size > context:
            raise ValueError(f"block_size {self.block_size} is longer than the model's context of {context} tokens.")
        if self.tokenizer is None and isinstance(module, CausalLM) and module.hparams.pretrained:
            raise ValueError(
                "a pretrained model knows its own tokens only: give TextDataModule its tokenizer, "
                f"tokenizer={module.hparams.pretrained!r}."
            )


@contextlib.contextmanager
def _cache(folder: str | None) -> Iterator[None]:
    """Makes `folder` the cache of `text/` meanwhile."""
    before = os.environ.get("SOPHIA_CACHE")
    if folder is not None:
        os.environ["SOPHIA_CACHE"] = str(folder)
    try:
        yield
    finally:
        if folder is not None:
            del os.environ["SOPHIA_CACHE"]
            if before is not None:
                os.environ["SOPHIA_CACHE"] = before
