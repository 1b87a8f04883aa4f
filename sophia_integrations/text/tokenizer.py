"""The tokenizer of a run: a byte-level BPE trained on the training documents, or a pretrained one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .cache import cache_dir, digest, store
from .documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """A pretrained tokenizer from a folder or hub id; raises `UserError` when it cannot be loaded
    or has no end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"tokenizer.pretrained: {place!r} cannot be loaded: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer.pretrained: {place!r} has no end-of-text token, which documents are joined by")
    return tokenizer


def train_tokenizer(
    documents: list[Document], vocab_size: int, min_frequency: int, say: Callable[[str], object]
) -> PreTrainedTokenizerBase:
    """A byte-level BPE with an end-of-text token, trained on `documents` or taken from the cache."""
    return _wrap(_trained(documents, vocab_size, min_frequency, say))


def _trained(
    documents: list[Document], vocab_size: int, min_frequency: int, say: Callable[[str], object]
) -> Path | str:
    import tokenizers

    parts = [tokenizers.__version__, str(vocab_size), str(min_frequency)]
    name = f"tokenizer-{digest(parts + [document.text for document in documents])[:32]}.json"
    cached = cache_dir() / name
    if cached.is_file():
        return cached
    say(f"Tokenizer: training a byte-level BPE of {vocab_size:,} tokens …")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((document.text for document in documents), trainer)
    store(name, lambda aside: bpe.save(str(aside)), say)
    return bpe.to_str()


def _wrap(trained: Path | str) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    text = trained.read_text(encoding="utf-8") if isinstance(trained, Path) else trained
    return PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(text),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
