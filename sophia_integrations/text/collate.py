"""Items to batches: labels for blocks, padding for rows of different lengths, masks for masked language models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from .layouts import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]


def with_labels(items: Sequence[Batch]) -> Batch:
    """Rows of one length, [rows, length], in which every token is a label; the model shifts them itself."""
    batch = default_collate(items)
    return {**batch, "labels": batch["input_ids"].clone()}


class Pad:
    """Rows of different lengths: ``input_ids`` and ``attention_mask`` [rows, longest], ``labels`` padded without loss.

    Args:
        pad: the token that fills `input_ids`, on the right.
        length: pad to this and not to the longest row.
    """

    def __init__(self, pad: int, length: int | None = None) -> None:
        self.pad, self.length = pad, length

    def __call__(self, items: Sequence[Batch]) -> Batch:
        ids, labels = ([item[name] for item in items] for name in ("input_ids", "labels"))
        return {
            "input_ids": self._filled(ids, self.pad),
            "attention_mask": self._filled([torch.ones_like(row) for row in ids], 0),
            "labels": self._filled(labels, IGNORED) if labels[0].ndim else torch.stack(labels),
        }

    def _filled(self, rows: Sequence[Tensor], value: int) -> Tensor:
        filled = pad_sequence(rows, batch_first=True, padding_value=value)
        rest = 0 if self.length is None else self.length - filled.shape[1]
        return torch.nn.functional.pad(filled, (0, rest), value=value)


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

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        probability: float,
        seed: int,
        inner: Callable[[Sequence[Batch]], Batch],
    ) -> None:
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
