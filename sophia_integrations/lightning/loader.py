"""Batches of token blocks whose position is part of Lightning's checkpoint, so that a resumed epoch is exact."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


class BlockLoader:
    """Yields `{"input_ids", "labels"}`, both [batch_size, block_size], and remembers how far it came.

    Each rank gets its own rows. A shuffled epoch is a permutation that depends on the seed and the epoch alone, and
    leaves out the rows that do not fill a batch on every rank. Iterating again goes on where the last iteration
    stopped; after the last batch, with the next epoch.

    Args:
        blocks: tokens, [blocks, block_size].
        batch_size: rows of a batch on one rank.
        shuffle: for training; otherwise the rows come in order, and the last batch may be smaller.
        seed: key of the permutations.
        rank, world_size: which rows are this process's.
    """

    def __init__(
        self, blocks: np.ndarray, batch_size: int, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.blocks, self.batch_size, self.shuffle, self.seed = blocks, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self._epoch = self._batch = 0

    def __len__(self) -> int:
        rows = len(self.blocks) // self.world_size
        return rows // self.batch_size if self.shuffle else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self._batch >= len(self) or not self.shuffle:
            self._epoch, self._batch = self._epoch + (self._batch > 0), 0
        own = self._order()[self.rank :: self.world_size][: len(self.blocks) // self.world_size]
        while self._batch < len(self):
            rows = own[self._batch * self.batch_size : (self._batch + 1) * self.batch_size]
            self._batch += 1
            ids = torch.from_numpy(self.blocks[rows].astype(np.int64))
            yield {"input_ids": ids, "labels": ids.clone()}

    def state_dict(self) -> dict[str, int]:
        """The epoch and the batches of it that were handed out."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self._epoch, self._batch = state["epoch"], state["batch"]

    def _order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.blocks))
        return np.random.default_rng([self.seed, self._epoch]).permutation(len(self.blocks))
