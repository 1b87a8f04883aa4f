"""Rows that cannot be used: counted, the first of them named, refused or left out as the user chose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from ..errors import UserError

BadRows = Literal["error", "skip"]
"""What to do about them: refuse the data, saying how many there are and where; or leave them out and count them."""

HINT = "data.bad_rows: skip leaves such rows out"
_SHOWN = 3


def require_action(action: str) -> None:
    """Raises `ValueError` unless `action` is "error" or "skip"."""
    if action not in get_args(BadRows):
        raise ValueError(f'bad_rows must be "error" or "skip", got {action!r}')


@dataclass
class Tally:
    """Bad ones of `total` rows: their number, and the first of them in words."""

    total: int = 0
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        """Counts one; `problem` says where it is and what is wrong."""
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(problem)

    def __add__(self, other: Tally) -> Tally:
        first = [*self.first, *other.first][:_SHOWN]
        return Tally(self.total + other.total, self.count + other.count, first)

    def __str__(self) -> str:
        return "; ".join([*self.first, *(["…"] if self.count > len(self.first) else [])])

    def judge(self, action: str) -> None:
        """Raises `UserError` when there is a bad row under "error", or no other under "skip"."""
        if not self.count or (action == "skip" and self.count < self.total):
            return
        share = f"{self.count:,} of {self.total:,} rows {'is' if self.count == 1 else 'are'} bad"
        raise UserError(f"{share}: {self}" + (f"; {HINT}" if self.count < self.total else ""))


class StreamTally:
    """As `Tally`, for rows without a known number: refuses the first one, or counts them while they are read.

    Args:
        action: "error" or "skip".
        readers: loader workers at most; they count in memory that they share with the process that started them.
    """

    def __init__(self, action: str, readers: int) -> None:
        self.action = action
        self.counts = torch.zeros(readers + 1, dtype=torch.int64)
        if action == "skip":
            self.counts.share_memory_()

    @property
    def count(self) -> int:
        """Bad rows met so far; again in every pass over the data."""
        return int(self.counts.sum())

    def add(self, problem: str) -> None:
        """Counts one, or raises `UserError` with its problem."""
        if self.action == "error":
            raise UserError(f"{problem}; {HINT}")
        worker = torch.utils.data.get_worker_info()
        self.counts[0 if worker is None else worker.id + 1] += 1
