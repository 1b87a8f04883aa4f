"""The tokenizer of a run: a byte-level BPE trained on the training documents, or a pretrained one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import cache_dir, digest, store
from .data import Document
from .errors import UserError
from .schema import Tokenizer, TokenizerTraining

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"


def build_tokenizer(
    wanted: Tokenizer, documents: list[Document], say: Callable[[str], object]
) -> PreTrainedTokenizerBase:
    """Trains or loads a tokenizer that has an end-of-text token.

    Raises `UserError` when a pretrained one cannot be loaded or has no end-of-text token.
    """
    if wanted.train is not None:
        return _wrap(_trained(wanted.train, documents, say))
    assert wanted.pretrained is not None
    return load_tokenizer(wanted.pretrained)


def load_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """A pretrained tokenizer from a folder or hub id; raises `UserError` as `build_tokenizer` does."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"tokenizer.pretrained: {place!r} cannot be loaded: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer.pretrained: {place!r} has no end-of-text token, which documents are joined by")
    return tokenizer


def _trained(wanted: TokenizerTraining, documents: list[Document], say: Callable[[str], object]) -> Path | str:
    import tokenizers

    parts = [tokenizers.__version__, str(wanted.vocab_size), str(wanted.min_frequency)]
    name = f"tokenizer-{digest(parts + [document.text for document in documents])[:32]}.json"
    cached = cache_dir() / name
    if cached.is_file():
        return cached
    say(f"Tokenizer: training a byte-level BPE of {wanted.vocab_size:,} tokens …")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=wanted.vocab_size,
        min_frequency=wanted.min_frequency,
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
