"""Rows to items of tokens: what a model reads, and which of its predictions carry loss, counted on the way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..tasks import TASKS
from .chat import Unfit, chat_tokens
from .layouts import IGNORED, joined, packed
from .rows import Row
from .tokenizer import padding, separator

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from .tokens import Counts

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
    """Makes the items of one format for one task.

    Args:
        format: text, prompt-completion, chat or classification.
        task: pretrain, finetune, classify, seq2seq or masked-lm.
        tokenizer: the run's.
        block_size: tokens of an item at most; the rest of an example is cut off.
        layout: "blocks" (text joined and cut), "packed" (whole examples) or "rows" (one example each).
        label_numbers: the number of each label of a classification.
    """

    def __init__(
        self,
        format: str,
        task: str,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        layout: str = "rows",
        label_numbers: Mapping[str, int] | None = None,
    ) -> None:
        self.format, self.task, self.tokenizer, self.block_size = format, task, tokenizer, block_size
        self.layout, self.label_numbers = layout, label_numbers or {}
        opening = tokenizer("").input_ids[:1]
        self._opening = opening if opening == [tokenizer.bos_token_id] else []
        if format == "chat":
            _require_template(tokenizer)

    @property
    def features(self) -> datasets.Features:
        """The columns of a table of items."""
        from datasets import Features, Sequence, Value

        if self.layout == "blocks":
            return Features({"input_ids": Sequence(Value("uint16" if len(self.tokenizer) <= 2**16 else "uint32"))})
        ids = Sequence(Value("int32"))
        if self.layout == "packed":
            return Features({"input_ids": ids, "labels": ids, "position_ids": ids})
        return Features({"input_ids": ids, "labels": Value("int64") if self.format == "classification" else ids})

    def items(self, rows: Iterable[Row], counts: Counts, refuse: Callable[[str], object]) -> Iterator[dict[str, Any]]:
        """Rows of tokens in their layout: ``{"input_ids": [block_size]}``, or of examples ``{"input_ids": [tokens],
        "labels": [labels]}``, or those of `packed`; of a classification, `labels` is one number.

        Args:
            rows: without bad and empty ones; they may be endless.
            counts: grows with what is read and made.
            refuse: receives a sentence for each conversation that the chat template does not take.
        """
        size, frame = self.block_size, self._frame
        if self.layout == "blocks":
            items = ({"input_ids": ids} for ids in joined(self._documents(rows, counts), size, *frame))
        elif self.layout == "packed":
            items = packed(self._examples(rows, counts, refuse), size, padding(self.tokenizer))
        else:
            items = ({"input_ids": ids, "labels": y} for ids, y in self._examples(rows, counts, refuse))
        for item in items:
            counts.rows += 1
            yield item
        if self.layout == "blocks":
            counts.dropped_tokens = counts.tokens - counts.rows * (size - sum(map(len, frame)))
        elif self.layout == "packed":
            counts.padding = counts.rows * size - counts.tokens

    @property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The tokens that open and close each row of a masked language model's text, where its tokenizer has them."""
        pair = (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)
        return ([pair[0]], [pair[1]]) if TASKS[self.task].masks and None not in pair else ([], [])

    def _documents(self, rows: Iterable[Row], counts: Counts) -> Iterator[list[int]]:
        """The tokens of each document, whole, with the one that ends it."""
        for batch in _batches(rows):
            for ids in self._ended(batch):
                counts.documents += 1
                counts.tokens += len(ids)
                yield ids

    def _examples(
        self, rows: Iterable[Row], counts: Counts, refuse: Callable[[str], object]
    ) -> Iterator[tuple[list[int], Any]]:
        """The tokens and labels of each example with something to learn."""
        encode = {
            "text": self._texts,
            "chat": self._chats,
            "prompt-completion": self._seq2seq if self.task == "seq2seq" else self._prompt_completion,
            "classification": self._classification,
        }[self.format]
        some_learn = self.format != "classification" and self.task not in ("seq2seq", "masked-lm")
        pairs = (zip(batch, encode(batch), strict=True) for batch in _batches(rows))
        for row, example in itertools.chain.from_iterable(pairs):
            if example.problem is not None:
                refuse(f"{row['place']}: {example.problem}")
                continue
            counts.documents += 1
            if not example.learned:
                counts.left_out += 1
                continue
            counts.cut += example.cut
            counts.tokens += len(example.ids) + (len(example.labels) if self.task == "seq2seq" else 0)
            if some_learn:
                counts.learned = (counts.learned or 0) + example.learned
            yield example.ids, example.labels

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
        if not TASKS[self.task].masks:
            return self._continued([[]] * len(rows), self._plain(rows, "text"))
        first = [] if self.tokenizer.cls_token_id is None else [self.tokenizer.cls_token_id]
        cut = [self._closed([*first, *ids]) for ids in self._ended(rows)]
        return [Example(ids, ids, was_cut) for ids, was_cut in cut]

    def _prompt_completion(self, rows: Sequence[Row]) -> list[Example]:
        return self._continued(self._plain(rows, "prompt"), self._plain(rows, "completion"))

    def _continued(self, prompts: Iterable[list[int]], completions: Iterable[list[int]]) -> list[Example]:
        """Examples in which only the completion and the token that ends it carry loss."""
        examples = []
        for prompt, completion in zip(prompts, completions, strict=True):
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
