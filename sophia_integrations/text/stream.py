"""An endless training stream: rows are read, tokenized and packed on the fly, the same again in every run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import UserError
from .bad_rows import StreamTally
from .blocks import batches, block, document_tokens, frame_of
from .encode import Encoder, Example
from .examples import Item, pack
from .rows import Row, StreamRows
from .split import problem_of

_BATCH = 64  # rows per call of the tokenizer
_PATIENCE = 10_000  # rows without loss in succession


class Stream(torch.utils.data.IterableDataset[Item]):
    """Items as `Blocks`, `Packed` or `Examples` have them, pass after pass, each in the order of a shuffling buffer.

    The order depends on the seed alone, so skipping the items that a run has seen resumes it exactly.  Of several
    loader workers each reads files of its own, so there can be `files` of them at most.

    Args:
        rows: the stream.
        encoder: makes examples of the rows.
        layout: "blocks" (text joined and cut), "packed" (whole examples) or "rows" (one example each).
        pad: the token that fills packed rows.
        seed: key of the order.
        bad_rows: "error" refuses the first bad row, "skip" counts them in `bad`.
    """

    def __init__(
        self, rows: StreamRows, encoder: Encoder, layout: str, pad: int, seed: int, bad_rows: str = "error"
    ) -> None:
        self.rows, self.encoder, self.layout, self.pad, self.seed = rows, encoder, layout, pad, seed
        self.bad = StreamTally(bad_rows, self.files)

    @property
    def files(self) -> int:
        """Parts that can be read side by side."""
        return int(self.rows.stream.num_shards)

    def __iter__(self) -> Iterator[Item]:
        if self.layout == "blocks":
            return self._blocks()
        return self._packed() if self.layout == "packed" else (_item(example) for example in self._examples())

    def _rows(self) -> Iterator[Row]:
        """Good rows without end.  Raises `UserError` when a whole pass has none."""
        for epoch in itertools.count():
            found, problem = False, None
            for row in self.rows.epoch(self.seed, epoch):
                problem = problem_of(self.encoder.format, row)
                if problem is not None:
                    self.bad.add(row, problem)
                elif self.encoder.format != "text" or row.values["text"]:
                    found = True
                    yield row
            if not found:
                skipped = f"; all of its rows are bad ({row.place}: {problem})" if problem else ""
                raise UserError(f"data.streaming: the stream has no text{skipped}")

    def _examples(self) -> Iterator[Example]:
        idle = 0
        for batch in batches(self._rows(), _BATCH):
            examples = [example for example in self.encoder(batch, self.bad) if example.learns]
            idle = 0 if examples else idle + len(batch)
            if idle > _PATIENCE:
                raise UserError(
                    f"data.streaming: {idle:,} rows one after another carry no loss within {self.encoder.block_size} "
                    "tokens, or are bad; raise data.block_size or look at the data"
                )
            yield from examples

    def _blocks(self) -> Iterator[Item]:
        tokenizer, held = self.encoder.tokenizer, list[int]()
        frame = frame_of(tokenizer) if self.encoder.task == "masked-lm" else None
        size = self.encoder.block_size - (2 if frame else 0)
        for batch in batches(self._rows(), _BATCH):
            held.extend(itertools.chain.from_iterable(document_tokens(batch, tokenizer)))
            for start in range(0, len(held) - size + 1, size):
                yield block(held[start : start + size], frame)
            held = held[len(held) // size * size :]

    def _packed(self) -> Iterator[Item]:
        held: list[Item] = []
        for example in self._examples():
            if sum(len(item["input_ids"]) for item in held) + len(example.ids) > self.encoder.block_size:
                yield pack(held, self.encoder.block_size, self.pad)
                held = []
            held.append(_item(example))


def _item(example: Example) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor(example.ids), "labels": torch.tensor(example.labels)}
