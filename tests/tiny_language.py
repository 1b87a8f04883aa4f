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
