"""Which rows of a table train and which validate; bad ones are counted and empty ones left out.

A document that is a file is held out by a hash of its name, a row by a hash of its content: adding others moves none,
and a row that occurs twice is on one side only.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .bad_rows import Tally
from .cache import digest

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Split:
    """The rows of one split, without empty ones: how many bytes of text they hold and how many were empty."""

    rows: datasets.Dataset | datasets.IterableDataset
    bytes: int = 0
    empty: int = 0


@dataclass(frozen=True)
class Scan:
    """What a pass over a table found: both splits, a digest of them, and the bad rows, which are in neither."""

    train: Split
    validation: Split
    digest: str
    bad: Tally


def scan_rows(table: datasets.Dataset, fraction: float | None, named: bool = False) -> Scan:
    """Sorts the rows of a table.

    Args:
        table: what `row_table` returned.
        fraction: share that is held out; None holds out nothing.
        named: the rows are documents that are known by their names; they may be empty.
    """
    notes = table.select_columns(["place", "problem", "digest", "bytes"]).with_format("arrow")[:]
    is_good = notes["problem"].is_null().to_numpy()
    good, bad = notes.filter(is_good), notes.filter(~is_good)
    contents = b"".join(good["digest"].to_pylist())
    keys = b"".join(map(_sha256, good["place"].to_pylist())) if named else contents
    held = _fall_below(keys, fraction or 0.0)
    sizes, numbers = good["bytes"].to_numpy(), np.flatnonzero(is_good)
    full = (sizes > 0) | named

    def split(side: np.ndarray) -> Split:
        return Split(table.select(numbers[full & side]), int(sizes[side].sum()), int((side & ~full).sum()))

    tally = Tally(len(table))
    for problem in bad["problem"].to_pylist():
        tally.add(problem)
    return Scan(split(~held), split(held), digest([keys, contents, held.tobytes()]), tally)


def _sha256(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _fall_below(keys: bytes, fraction: float) -> np.ndarray:
    """Of SHA-256 digests behind one another: is each, as a number in [0, 1), less than `fraction`?"""
    return np.frombuffer(keys, ">u8")[::4] < np.uint64(math.ceil(fraction * 2**64))
