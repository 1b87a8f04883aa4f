"""The rows of a split as tables of tokens: made once for the same text and tokenizer, and mapped from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from .bad_rows import Tally
from .cache import cached_table
from .encode import Encoder
from .layouts import joined, packed
from .split import Split
from .tokenizer import padding

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Counts:
    """What one split holds.

    Attributes:
        documents: files or rows, without empty ones.
        bytes: of their text.
        tokens: of all that is trained on; for seq2seq inputs and targets.
        rows: blocks, packed rows or examples.
        dropped_tokens: at the end of the text, where they fill no block.
        empty: rows without text.
        cut: examples cut to the block size.
        left_out: examples without loss within the block size.
        padding: tokens that only fill packed rows.
        learned: labels that carry loss; None when all do.
    """

    documents: int
    bytes: int
    tokens: int
    rows: int
    dropped_tokens: int = 0
    empty: int = 0
    cut: int = 0
    left_out: int = 0
    padding: int = 0
    learned: int | None = None


@dataclass(frozen=True)
class TokenTables:
    """Makes the tables of both splits.

    Args:
        encoder: makes tokens of rows.
        key: identifies text and tokens, for the names in the cache.
        bad_rows: "error" or "skip", for rows that the chat template does not take.
        say: receives the lines for the reader.
    """

    encoder: Encoder
    key: str
    bad_rows: str
    say: Callable[[str], object]

    def blocks(self, name: str, split: Split) -> tuple[datasets.Dataset, Counts]:
        """Text joined and cut: items ``{"input_ids": [block_size]}``.  Raises `UserError` when it fills no block."""
        from datasets import Features, Sequence, Value

        encoder, size = self.encoder, self.encoder.block_size
        opening, closing = encoder.frame
        around = len(opening) + len(closing)
        kind = Sequence(Value("uint16" if len(encoder.tokenizer) <= 2**16 else "uint32"))

        def records() -> Iterator[dict[str, Any]]:
            self.say(f"Tokens: reading {len(split.rows):,} documents …")
            blocks = joined(encoder.documents(split.rows), size, opening, closing)
            return ({"input_ids": block} for block in blocks)

        table = cached_table(self._entry(name), Features({"input_ids": kind}), records, self.say)
        last = len(table[-1]["input_ids"]) if len(table) else size
        whole, dropped = (len(table), 0) if last == size else (len(table) - 1, last - around)
        tokens = whole * (size - around) + dropped
        if not whole:
            raise UserError(
                f"data: the {name} documents hold {tokens} tokens, less than one block of {size}; "
                "give more text or a smaller data.block_size"
            )
        counts = Counts(len(split.rows), split.bytes, tokens, whole, dropped, split.empty)
        return table.select(range(whole)).with_format("torch"), counts

    def examples(self, name: str, split: Split, packing: bool) -> tuple[datasets.Dataset, Counts, Tally]:
        """Examples, and the bad ones: items ``{"input_ids": [tokens], "labels": [labels]}`` or the rows of `packed`.

        Of a classification, `labels` is one number.  Raises `UserError` for bad rows, or when no example carries loss.
        """
        import pyarrow.compute as pc
        from datasets import Features, Sequence, Value

        def records() -> Iterator[dict[str, Any]]:
            self.say(f"Tokens: reading {len(split.rows):,} examples …")
            for row, example in self.encoder.examples(split.rows):
                problem = example.problem and f"{row['place']}: {example.problem}"
                found = {"input_ids": example.ids, "labels": example.labels, "cut": example.cut}
                yield {**found, "learned": example.learned, "problem": problem}

        ids, one_label = Sequence(Value("int32")), self.encoder.format == "classification"
        items = {"input_ids": ids, "labels": Value("int64") if one_label else ids}
        notes = {"cut": Value("bool"), "learned": Value("int32"), "problem": Value("string")}
        table = cached_table(self._entry(name), Features({**items, **notes}), records, self.say)

        columns = table.with_format("arrow")[:]
        bad = Tally(len(table))
        for problem in columns["problem"].drop_null().to_pylist():
            bad.add(problem)
        bad.judge(self.bad_rows)
        learned, size = columns["learned"].to_numpy(), self.encoder.block_size
        kept = np.flatnonzero(learned)
        if not len(kept):
            raise UserError(
                f"data: no {name} example carries loss within {size} tokens; raise data.block_size or look at the data"
            )
        tokens = pc.list_value_length(columns["input_ids"]).to_numpy()[kept].sum()
        if self.encoder.task == "seq2seq":
            tokens += pc.list_value_length(columns["labels"]).to_numpy()[kept].sum()
        rows = table.select(kept).select_columns(list(items))
        if packing:
            rows = self._packed(name, rows)
        all_learn = one_label or self.encoder.task in ("seq2seq", "masked-lm")
        counts = Counts(
            len(split.rows) - bad.count,
            split.bytes,
            int(tokens),
            len(rows),
            empty=split.empty,
            cut=int(columns["cut"].to_numpy()[kept].sum()),
            left_out=len(table) - len(kept) - bad.count,
            padding=len(rows) * size - int(tokens) if packing else 0,
            learned=None if all_learn else int(learned.sum()),
        )
        return rows.with_format("torch"), counts, bad

    def _packed(self, name: str, examples: datasets.Dataset) -> datasets.Dataset:
        from datasets import Features, Sequence, Value

        names = ("input_ids", "labels", "position_ids")
        features = Features({name: Sequence(Value("int32")) for name in names})

        def records() -> Iterator[dict[str, Any]]:
            pairs = ((example["input_ids"], example["labels"]) for example in examples)
            return packed(pairs, self.encoder.block_size, padding(self.encoder.tokenizer))

        return cached_table(f"{self._entry(name)}-packed", features, records, self.say)

    def _entry(self, name: str) -> str:
        return f"tokens-{self.key[:32]}-{name}"
