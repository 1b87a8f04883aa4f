"""Batches of rows of tokens whose position is part of Lightning's checkpoint, so that a resumed epoch is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

Row = dict[str, Any]


class RowLoader:
    """Yields batches of `rows` and remembers how far it came.

    Each rank gets its own rows. A shuffled epoch is a permutation that depends on the seed and the epoch alone, and
    leaves out the rows that do not fill a batch on every rank. Iterating again goes on where the last iteration
    stopped; after the last batch, with the next epoch.

    Args:
        rows: the data set; an item is what the model is called with, by name.
        batch_size: rows of a batch on one rank.
        collate: makes the batch from its rows.
        shuffle: for training; otherwise the rows come in order, and the last batch may be smaller.
        seed: key of the permutations.
        rank, world_size: which rows are this process's.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        collate: Callable[[list[Row]], dict[str, Tensor]],
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.rows, self.batch_size, self.shuffle, self.seed = rows, batch_size, shuffle, seed
        self.rank, self.world_size, self.collate = rank, world_size, collate
        self._epoch = self._batch = 0

    def __len__(self) -> int:
        rows = len(self.rows) // self.world_size
        return rows // self.batch_size if self.shuffle else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self._batch >= len(self) or not self.shuffle:
            self._epoch, self._batch = self._epoch + (self._batch > 0), 0
        own = self._order()[self.rank :: self.world_size][: len(self.rows) // self.world_size]
        while self._batch < len(self):
            batch = own[self._batch * self.batch_size : (self._batch + 1) * self.batch_size]
            self._batch += 1
            yield self.collate(self._fetch(batch.tolist()))

    def state_dict(self) -> dict[str, int]:
        """The epoch and the batches of it that were handed out."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self._epoch, self._batch = state["epoch"], state["batch"]

    def _fetch(self, numbers: list[int]) -> list[Row]:
        """Rows, all at once where the data set can, as torch's own loader asks for them."""
        if hasattr(self.rows, "__getitems__"):
            return self.rows.__getitems__(numbers)
        return [self.rows[number] for number in numbers]

    def _order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.rows))
        return np.random.default_rng([self.seed, self._epoch]).permutation(len(self.rows))
