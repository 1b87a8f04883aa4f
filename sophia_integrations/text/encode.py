"""Rows to examples of tokens: what a model reads, and which of its predictions carry loss; never more than a row."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UserError
from .chat import Unfit, chat_tokens
from .layouts import IGNORED
from .rows import Row
from .tokenizer import separator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 64  # rows per call of the tokenizer


@dataclass(frozen=True)
class Example:
    """One example: `labels` are as long as `ids` for a causal model, their own text for seq2seq, a number for a
    classification.  `cut` says that text beyond the block size was left out; `problem`, why there is no example."""

    ids: list[int]
    labels: list[int] | int
    cut: bool = False
    problem: str | None = None

    @property
    def learned(self) -> int:
        """How many labels carry loss."""
        return 1 if isinstance(self.labels, int) else len(self.labels) - self.labels.count(IGNORED)


class Encoder:
    """Makes the examples of one format for one task.

    Args:
        format: text, prompt-completion, chat or classification.
        task: pretrain, finetune, classify, seq2seq or masked-lm.
        tokenizer: the run's.
        block_size: tokens of an example at most; the rest is cut off.
        label_numbers: the number of each label of a classification.
    """

    def __init__(
        self,
        format: str,
        task: str,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        label_numbers: Mapping[str, int] | None = None,
    ) -> None:
        self.format, self.task, self.tokenizer, self.block_size = format, task, tokenizer, block_size
        self.label_numbers = label_numbers or {}
        opening = tokenizer("").input_ids[:1]
        self._opening = opening if opening == [tokenizer.bos_token_id] else []
        if format == "chat":
            _require_template(tokenizer)

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The tokens that open and close each row of a masked language model's text, where its tokenizer has them."""
        pair = (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)
        return ([], []) if self.task != "masked-lm" or None in pair else ([pair[0]], [pair[1]])

    def documents(self, rows: Iterable[Row]) -> Iterator[list[int]]:
        """The tokens of each document, whole, with the one that ends it."""
        for batch in _batches(rows):
            yield from self._ended(batch)

    def examples(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Example]]:
        """Each row and its example; one without tokens for a conversation that the chat template does not take."""
        encode = {
            "text": self._texts,
            "chat": self._chats,
            "prompt-completion": self._seq2seq if self.task == "seq2seq" else self._prompt_completion,
            "classification": self._classification,
        }[self.format]
        for batch in _batches(rows):
            yield from zip(batch, encode(batch), strict=True)

    def _chats(self, rows: Sequence[Row]) -> list[Example]:
        examples = []
        for row in rows:
            try:
                examples.append(self._causal(*chat_tokens(row, self.tokenizer)))
            except Unfit as error:
                examples.append(Example([], [], problem=str(error)))
        return examples

    def _ended(self, rows: Sequence[Row]) -> list[list[int]]:
        return [[*ids, separator(self.tokenizer)] for ids in self._plain(rows, "text")]

    def _plain(self, rows: Sequence[Row], part: str) -> list[list[int]]:
        texts = [row[part] for row in rows]
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _causal(self, ids: list[int], learned: Sequence[bool]) -> Example:
        labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
        labels[0] = IGNORED  # nothing predicts the first token
        size = self.block_size
        return Example(ids[:size], labels[:size], len(ids) > size)

    def _texts(self, rows: Sequence[Row]) -> list[Example]:
        if self.task != "masked-lm":
            whole = [[*self._opening, *ids] for ids in self._ended(rows)]
            return [self._causal(ids, [True] * len(ids)) for ids in whole]
        first = [] if self.tokenizer.cls_token_id is None else [self.tokenizer.cls_token_id]
        cut = [self._closed([*first, *ids]) for ids in self._ended(rows)]
        return [Example(ids, ids, was_cut) for ids, was_cut in cut]

    def _prompt_completion(self, rows: Sequence[Row]) -> list[Example]:
        examples = []
        for prompt, completion in zip(self._plain(rows, "prompt"), self._plain(rows, "completion"), strict=True):
            before, after = [*self._opening, *prompt], [*completion, separator(self.tokenizer)]
            examples.append(self._causal(before + after, [False] * len(before) + [True] * len(after)))
        return examples

    def _seq2seq(self, rows: Sequence[Row]) -> list[Example]:
        options = {"return_attention_mask": False, "verbose": False}
        inputs = self.tokenizer([row["prompt"] for row in rows], **options)["input_ids"]
        targets = self.tokenizer(text_target=[row["completion"] for row in rows], **options)["input_ids"]
        examples = []
        for ids, labels in zip(inputs, targets, strict=True):
            (ids, cut), (labels, cut_too) = self._closed(ids), self._closed(labels)
            examples.append(Example(ids, labels, cut or cut_too))
        return examples

    def _closed(self, ids: list[int]) -> tuple[list[int], bool]:
        """At most `block_size` tokens of which the last one ends the text, and whether some were cut off."""
        end, size = separator(self.tokenizer), self.block_size
        ids = ids if ids and ids[-1] == end else [*ids, end]
        return (ids, False) if len(ids) <= size else ([*ids[: size - 1], end], True)

    def _classification(self, rows: Sequence[Row]) -> list[Example]:
        texts, options = [row["text"] for row in rows], {"return_attention_mask": False, "verbose": False}
        whole = self.tokenizer(texts, **options)["input_ids"]
        cut = self.tokenizer(texts, truncation=True, max_length=self.block_size, **options)["input_ids"]
        labels = [self.label_numbers[row["label"]] for row in rows]
        return [Example(c, y, len(w) > len(c)) for c, w, y in zip(cut, whole, labels, strict=True)]


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        name = getattr(tokenizer, "name_or_path", "") or "trained here"
        raise UserError(
            f"data.format: chat needs a tokenizer with a chat template, and this one ({name}) has none; use that of an "
            "instruction-tuned model, or format prompt-completion"
        )


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    left = iter(rows)
    while batch := list(itertools.islice(left, _BATCH)):
        yield batch
