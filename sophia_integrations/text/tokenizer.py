"""The tokenizer of a run: a byte-level BPE trained on the training text, or a pretrained one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..cache import digest
from ..errors import UserError, first_line
from ..tasks import TASKS
from .cache import cached_file

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

    from .source import Source


def why_not_loaded(error: Exception) -> str:
    """The first line of a loading error of transformers, and what to do about code that comes with a model."""
    reason = first_line(error)
    hint = "if you trust it, set model.trust_remote_code: true"
    return f"{reason.rstrip(' .')}; {hint}" if "custom code" in reason else reason


def load_tokenizer(
    place: str, revision: str | None = None, trust_remote_code: bool = False, key: str = "tokenizer.pretrained"
) -> PreTrainedTokenizerBase:
    """A pretrained tokenizer from a folder or hub id; raises `UserError` about `key` when it cannot be loaded or has
    no token that ends a document."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {place!r} cannot be loaded: {why_not_loaded(error)}") from None
    if separator(tokenizer) is None:
        raise UserError(f"{key}: {place!r} has no end-of-text token, which documents are joined by")
    return tokenizer


def separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a document: end of text, or what an encoder separates by."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills a row; where there is none, the one that ends a document."""
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else separator(tokenizer)
    assert token is not None
    return token


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return digest([words, json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str), template])


def train_tokenizer(
    source: Source, vocab_size: int, min_frequency: int, say: Callable[[str], object], task: str = "pretrain"
) -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on the training text of `source`, or taken from the cache.

    It has the special tokens of `task`; those of encoders for start and end it puts around a text by itself.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    special = TASKS[task].special_tokens
    parts = [tokenizers.__version__, str(vocab_size), str(min_frequency), *dict.fromkeys(special.values())]
    name = f"tokenizer-{digest([*parts, source.digest])[:32]}.json"

    def trained() -> tokenizers.Tokenizer:
        say(f"Tokenizer: training a byte-level BPE of {vocab_size:,} tokens …")
        return _trained(source, vocab_size, min_frequency, special)

    path = cached_file(name, lambda aside: trained().save(str(aside)), say)
    backend = trained() if path is None else tokenizers.Tokenizer.from_file(str(path))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def _trained(source: Source, vocab_size: int, min_frequency: int, special: Mapping[str, str]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(source.training_texts(), trainer)
    if "cls_token" in special:
        first, last = special["cls_token"], special["sep_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B {last}",
            special_tokens=[(word, bpe.token_to_id(word)) for word in (first, last)],
        )
    return bpe
