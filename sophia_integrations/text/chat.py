"""Conversations to tokens by the tokenizer's chat template, and which of them the assistant wrote."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from ..errors import first_line
from .rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]
"""Where the assistant's turns begin and end, in characters."""


class Unfit(Exception):
    """A conversation that a chat template does not take, and why."""


def chat_tokens(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and for each whether the assistant wrote it.

    A template with ``{% generation %}`` marks the assistant's turns itself.  With any other they are what the
    template adds to the conversation before them, without the words that call for an answer; white space after the
    token that ends a turn is not the assistant's.

    Raises:
        Unfit: the template refuses the conversation, or writes earlier turns otherwise once later ones follow.
    """
    messages = [
        {key: value for key, value in message.items() if value is not None} for message in json.loads(row["messages"])
    ]
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        encoded = _apply(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    text, spans = _rendered(messages, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learned, turns = [], iter(spans)
    begin, end = next(turns)
    for start, stop in encoded["offset_mapping"]:
        while start >= end:
            begin, end = next(turns, (len(text) + 1, len(text) + 2))
        learned.append(stop > start >= begin)
    return list(encoded["input_ids"]), learned


def _rendered(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, Spans]:
    text, spans = _apply(tokenizer, messages), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _apply(tokenizer, messages[:number], add_generation_prompt=True) if number else ""
        after = _apply(tokenizer, messages[: number + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise Unfit(
                f"the tokenizer's chat template writes turn {number + 1} differently once others follow, "
                "so the assistant's words cannot be told from the rest; give the tokenizer a chat template with "
                "{% generation %} around them"
            )
        spans.append((len(before), _end_of_turn(after, tokenizer)))
    return text, spans


def _end_of_turn(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    bare = text.rstrip()
    return len(bare) if any(bare.endswith(token) for token in tokenizer.all_special_tokens) else len(text)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **{"tokenize": False, **options})
    except (TemplateError, ValueError, TypeError) as error:
        raise Unfit(f"the tokenizer's chat template refuses this conversation: {first_line(error)}") from None
