"""Items to batches: stacked where they are equally long, padded where not, masked for masked language models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .encode import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]


class Stack:
    """Rows of one length, as they are: ``{name: [rows, length]}``."""

    def __call__(self, items: Sequence[Batch]) -> Batch:
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}


class Pad:
    """Rows of different lengths: ``input_ids`` and ``attention_mask`` [rows, longest], ``labels`` padded without loss.

    Args:
        pad: the token that fills `input_ids`, on the right.
        length: pad to this and not to the longest row.
    """

    def __init__(self, pad: int, length: int | None = None) -> None:
        self.pad, self.length = pad, length

    def __call__(self, items: Sequence[Batch]) -> Batch:
        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": self._filled(ids, self.pad),
            "attention_mask": self._filled([torch.ones_like(row) for row in ids], 0),
        }
        labels = [item["labels"] for item in items]
        batch["labels"] = self._filled(labels, IGNORED) if labels[0].ndim else torch.stack(labels)
        return batch

    def _filled(self, rows: Sequence[Tensor], value: int) -> Tensor:
        length = self.length or max(len(row) for row in rows)
        filled = rows[0].new_full((len(rows), length), value)
        for target, row in zip(filled, rows, strict=True):
            target[: len(row)] = row
        return filled


class Mask:
    """Batches for masked language modelling: some tokens are hidden, and only those carry loss (BERT's 80/10/10).

    What is hidden depends on the seed and the batch alone: a resumed run goes on exactly, an evaluation is the same
    each time, and a row that comes again in another batch is masked anew.  A batch always hides at least one token.

    Args:
        tokenizer: has a mask token.
        probability: share of the tokens that are chosen, special ones excepted.
        seed: key of the choice.
        inner: makes the batch whose `labels` are replaced.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int, inner: Stack | Pad) -> None:
        from transformers import DataCollatorForLanguageModeling

        self._masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
        self._special = torch.tensor(tokenizer.all_special_ids)
        self.seed, self.inner = seed, inner

    def __call__(self, items: Sequence[Batch]) -> Batch:
        batch = self.inner(items)
        ids = batch["input_ids"]
        special = torch.isin(ids, self._special)
        if special.all():
            return {**batch, "labels": torch.full_like(ids, IGNORED)}
        content = hashlib.sha256(ids.numpy().tobytes()).digest()[:7]
        key = int.from_bytes(content, "big") ^ self.seed
        while True:
            self._masking.generator = torch.Generator().manual_seed(key)
            masked, labels = self._masking.torch_mask_tokens(ids.clone(), special_tokens_mask=special)
            if (labels != IGNORED).any():
                return {**batch, "input_ids": masked, "labels": labels}
            key += 1
