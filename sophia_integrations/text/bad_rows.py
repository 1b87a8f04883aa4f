"""Rows that cannot be used: counted, the first of them named, refused or left out as the user chose."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import UserError

HINT = "data.bad_rows: skip leaves such rows out"
_SHOWN = 3


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
