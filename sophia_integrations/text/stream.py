"""An endless training stream: rows are read, tokenized and packed on the fly, the same again in every run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError
from .bad_rows import HINT
from .encode import Encoder
from .rows import Row
from .tokens import Counts

if TYPE_CHECKING:
    import datasets

_BUFFER = 10_000  # rows that are shuffled at once
_PATIENCE = 10_000  # rows without loss in succession


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """The encoder's items, pass after pass, each in the order of a shuffling buffer.

    The order depends on the seed alone, so skipping the items that a run has seen resumes it exactly.  Of several
    loader workers each reads files of its own, so there can be `files` of them at most.

    Args:
        rows: what `row_stream` returned.
        encoder: makes items of the rows.
        seed: key of the order.
        bad_rows: "error" refuses the first bad row, "skip" counts them.
    """

    def __init__(self, rows: datasets.IterableDataset, encoder: Encoder, seed: int, bad_rows: str = "error") -> None:
        self.rows, self.encoder, self.seed, self.bad_rows = rows, encoder, seed, bad_rows
        self._bad = torch.zeros(self.files + 1, dtype=torch.int64)  # of this process and of each loader worker
        if bad_rows == "skip":
            self._bad.share_memory_()

    @property
    def files(self) -> int:
        """Parts that can be read side by side."""
        return int(self.rows.num_shards)

    @property
    def bad(self) -> int:
        """Bad rows met so far by all loader workers; again in every pass over the data."""
        return int(self._bad.sum())

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        counts = Counts()
        for item in self.encoder.items(self._rows(counts), counts, self._refuse):
            yield {name: torch.tensor(values) for name, values in item.items()}

    def _rows(self, counts: Counts) -> Iterator[Row]:
        """Good rows without end.  Raises `UserError` when a whole pass has none, or many in succession carry no loss.

        Args:
            counts: of what became of the rows so far.
        """
        rows = self.rows.shuffle(seed=self.seed, buffer_size=_BUFFER)
        idle = learned = 0
        for epoch in itertools.count():
            rows.set_epoch(epoch)
            found, bad = False, ""
            for row in rows:
                if row["problem"] is not None:
                    self._refuse(row["problem"])
                    bad = f"; all of its rows are bad ({row['problem']})"
                elif self.encoder.format != "text" or row["text"]:
                    found = True
                    yield row
                    before, learned = learned, counts.documents - counts.left_out
                    idle = idle + 1 if learned == before else 0
                if idle > _PATIENCE:
                    raise UserError(
                        f"data.streaming: {idle:,} rows one after another carry no loss within "
                        f"{self.encoder.block_size} tokens, or are bad; raise data.block_size or look at the data"
                    )
            if not found:
                raise UserError(f"data.streaming: the stream has no text{bad}")

    def _refuse(self, problem: str) -> None:
        if self.bad_rows == "error":
            raise UserError(f"{problem}; {HINT}")
        worker = torch.utils.data.get_worker_info()
        self._bad[0 if worker is None else worker.id + 1] += 1
