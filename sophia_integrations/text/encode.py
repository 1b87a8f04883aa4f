"""Rows to examples of tokens: what a model reads, and which of its predictions carry loss; never more than a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .bad_rows import StreamTally, Tally
from .blocks import document_tokens
from .chat import Unfit, chat_tokens
from .rows import Row
from .tokenizer import separator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that carries no loss."""


@dataclass(frozen=True)
class Example:
    """One example: `labels` are as long as `ids` for a causal model, their own text for seq2seq, one number for a
    classification.  `cut` says that text beyond the block size was left out."""

    ids: list[int]
    labels: list[int]
    cut: bool = False

    @property
    def learns(self) -> bool:
        """Whether any label carries loss."""
        return any(label != IGNORED for label in self.labels)


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
        label_numbers: Mapping[Any, int] | None = None,
    ) -> None:
        self.format, self.task, self.tokenizer, self.block_size = format, task, tokenizer, block_size
        self.label_numbers = label_numbers or {}
        opening = tokenizer("").input_ids[:1]
        self._opening = opening if opening == [tokenizer.bos_token_id] else []
        if format == "chat":
            _require_template(tokenizer)

    def __call__(self, rows: Sequence[Row], bad: Tally | StreamTally) -> list[Example]:
        """One example of each row, but for conversations that the chat template does not take: `bad` counts them."""
        if self.format == "classification":
            return self._classification(rows)
        if self.format == "chat":
            return list(self._chat(rows, bad))
        if self.format == "text":
            return [self._text(ids) for ids in document_tokens(rows, self.tokenizer)]
        return self._seq2seq(rows) if self.task == "seq2seq" else self._prompt_completion(rows)

    def _chat(self, rows: Sequence[Row], bad: Tally | StreamTally) -> Iterator[Example]:
        for row in rows:
            try:
                tokens = chat_tokens(row, self.tokenizer)
            except Unfit as error:
                bad.add(row, str(error))
            else:
                yield self._causal(*tokens)

    def _causal(self, ids: list[int], learned: Sequence[bool]) -> Example:
        labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
        labels[0] = IGNORED  # nothing predicts the first token
        size = self.block_size
        return Example(ids[:size], labels[:size], len(ids) > size)

    def _text(self, ids: list[int]) -> Example:
        if self.task != "masked-lm":
            return self._causal([*self._opening, *ids], [True] * (len(self._opening) + len(ids)))
        cls, size = self.tokenizer.cls_token_id, self.block_size
        ids = ids if cls is None else [cls, *ids]
        cut = ids if len(ids) <= size else [*ids[: size - 1], ids[-1]]
        return Example(cut, list(cut), len(ids) > size)

    def _prompt_completion(self, rows: Sequence[Row]) -> list[Example]:
        prompts, completions = (self._plain([row.values[part] for row in rows]) for part in ("prompt", "completion"))
        examples = []
        for prompt, completion in zip(prompts, completions, strict=True):
            before, after = [*self._opening, *prompt], [*completion, separator(self.tokenizer)]
            examples.append(self._causal(before + after, [False] * len(before) + [True] * len(after)))
        return examples

    def _plain(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _seq2seq(self, rows: Sequence[Row]) -> list[Example]:
        options = {"return_attention_mask": False, "verbose": False}
        inputs = self.tokenizer([row.values["prompt"] for row in rows], **options)["input_ids"]
        targets = self.tokenizer(text_target=[row.values["completion"] for row in rows], **options)["input_ids"]
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
        texts, options = [row.values["text"] for row in rows], {"return_attention_mask": False, "verbose": False}
        whole = self.tokenizer(texts, **options)["input_ids"]
        cut = self.tokenizer(texts, truncation=True, max_length=self.block_size, **options)["input_ids"]
        labels = [[self.label_numbers[row.values["label"]]] for row in rows]
        return [Example(c, y, len(w) > len(c)) for c, w, y in zip(cut, whole, labels, strict=True)]


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        name = getattr(tokenizer, "name_or_path", "") or "trained here"
        raise UserError(
            f"data.format: chat needs a tokenizer with a chat template, and this one ({name}) has none; use that of an "
            "instruction-tuned model, or format prompt-completion"
        )
