"""The model of a run: new from a transformers config, or pretrained; sized to its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import UserError
from ..reading.schema import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_model(wanted: Model, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A causal language model whose vocabulary fits `tokenizer`; new weights depend on `seed` only.

    Raises `UserError` when a pretrained model cannot be loaded or a vocabulary is too small.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    set_seed(seed)
    if wanted.pretrained is not None:
        return load_model(wanted.pretrained, tokenizer)
    assert wanted.config is not None
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {"vocab_size": len(tokenizer), **special, **wanted.config}
    if settings["vocab_size"] < len(tokenizer):
        raise UserError(
            f"model.config.vocab_size: {settings['vocab_size']} is less than the tokenizer's {len(tokenizer)}; "
            "leave it out to follow the tokenizer"
        )
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))


def load_model(place: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A pretrained model from a folder or hub id; raises `UserError` as `build_model` does."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.pretrained: {place!r} cannot be loaded: {reason}") from None
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise UserError(f"model.pretrained: {place!r} knows {rows} tokens, the tokenizer has {len(tokenizer)}")
    return model
