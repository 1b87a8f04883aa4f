"""A folder with a tiny Llama and its tokenizer, as `from_pretrained` reads it: nothing comes from a hub."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = "the a cat dog bird sees hears likes small big red old house tree and or then now here there".split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def sentence(number, words=8):
    return " ".join(WORDS[(number * 3 + i * (1 + number % 4)) % len(WORDS)] for i in range(words))


def save_tiny_language_model(folder):
    import torch
    from support import tiny_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    tiny_model("llama", vocab_size=len(vocabulary), pad_token_id=0).save_pretrained(folder)
    return tokenizer


def write_jsonl(path, rows=24):
    lines = (json.dumps({"text": sentence(number)}) for number in range(rows))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


CHAT_TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def save_tiny_chat_model(folder):
    """`save_tiny_language_model` with a chat template."""
    tokenizer = save_tiny_language_model(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_chats(path, rows=40):
    """A question of 3 to 6 words and an answer of 4, in each row."""
    lines = []
    for number in range(rows):
        turns = {"user": sentence(number, 3 + number % 4), "assistant": sentence(number + 5, 4)}
        lines.append(json.dumps({"messages": [{"role": role, "content": words} for role, words in turns.items()]}))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
