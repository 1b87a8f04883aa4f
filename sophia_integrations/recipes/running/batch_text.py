"""A batch as a person reads it: text again, with brackets around what carries no loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...text.encode import IGNORED
from ...text.prepare import Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
NEW_LINE = "⏎"
_SHOWN = 600  # characters of a row


def first_batch(data: Prepared, rows: int, seed: int) -> dict[str, Tensor]:
    """A batch of `rows` training rows, drawn as `seed` says; of a stream its first ones."""
    import torch

    if isinstance(data.train, torch.utils.data.IterableDataset):
        return data.collate(list(itertools.islice(iter(data.train), rows)))
    total: int = len(data.train)  # type: ignore[arg-type]
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:rows]
    return data.collate([data.train[int(index)] for index in chosen])


def describe_batch(
    batch: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None = None,
    answers: bool = False,
    shown: int = 4,
) -> Iterator[str]:
    """The first rows of a batch, a line each.

    Args:
        batch: what the collator made.
        tokenizer: decodes it.
        labels: names of a classification's labels.
        answers: the labels are texts of their own, as for seq2seq, and do not stand at the tokens they belong to.
        shown: rows at most.
    """
    rows, length = batch["input_ids"].shape
    yield f"one batch, {rows} rows of up to {length} tokens; {OPEN}…{CLOSE} carries no loss, {NEW_LINE} breaks a line:"
    for number in range(min(rows, shown)):
        yield f"  row {number + 1}: {_row(batch, number, tokenizer, labels, answers)}"
    if rows > shown:
        yield f"  … and {rows - shown} more"


def _row(batch: dict[str, Tensor], number: int, tokenizer: Any, labels: list[str] | None, answers: bool) -> str:
    ids, target = batch["input_ids"][number], batch["labels"][number]
    kept = batch["attention_mask"][number].bool() if "attention_mask" in batch else ids == ids
    ids, padding = ids[kept], int((~kept).sum())
    if target.ndim == 0:
        text = f"{_text(tokenizer, ids)} → {labels[int(target)] if labels else int(target)}"
    elif answers:
        text = f"{OPEN}{_text(tokenizer, ids)}{CLOSE} → {_text(tokenizer, target[target != IGNORED])}"
    else:
        text = _marked(tokenizer, ids, target[kept] == IGNORED)
    if len(text) > _SHOWN:
        text = f"{text[:_SHOWN]} … ({len(text) - _SHOWN:,} characters more)"
    return text + (f"  (+ {padding} of padding)" if padding else "")


def _marked(tokenizer: Any, ids: Tensor, silent: Tensor) -> str:
    text = ""
    pairs = zip(ids.tolist(), silent.tolist(), strict=True)
    for is_silent, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        part = _text(tokenizer, [token for token, _ in group])
        text += f"{OPEN}{part}{CLOSE}" if is_silent else part
    return text


def _text(tokenizer: Any, ids: Any) -> str:
    """The text of tokens, on one line."""
    return tokenizer.decode(ids, skip_special_tokens=False).replace("\n", NEW_LINE)
