"""One pass over all rows: counts bad ones, leaves out empty ones, and sorts the others into training and validation.

A document that is a file is held out by a hash of its name, a row by a hash of its content: adding others moves none,
and a row that occurs twice is on one side only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from . import formats
from .arrays import cached_arrays
from .bad_rows import Tally
from .cache import digest
from .rows import Row, TableRows

LARGE = 100_000
"""From so many rows on, what the pass found is kept in the cache, under what `datasets` calls the table."""

_VERSION = "2"


@dataclass
class Found:
    """What the pass found for one side: numbers of its rows, bytes of text, empty rows, and how often each label is."""

    numbers: list[int] | np.ndarray = field(default_factory=list)
    bytes: int = 0
    empty: int = 0
    labels: dict[Any, int] = field(default_factory=dict)


def inspect(
    format: str, rows: Collection[Row], fraction: float | None, say: Callable[[str], object], named: bool = False
) -> tuple[Found, Found, str, Tally]:
    """What belongs to training and to validation, a digest of both, and the bad rows, which are in neither.

    Args:
        format: of the rows.
        rows: documents, or a table.
        fraction: share that is held out; None holds out nothing.
        say: receives a line when this takes long.
        named: the rows are documents that are known by their names; they may be empty.
    """
    if not isinstance(rows, TableRows) or len(rows) < LARGE:
        return _inspect(format, rows, fraction, named)
    parts = [_VERSION, format, json.dumps(sorted(rows.columns.items())), repr(fraction), rows.fingerprint]
    entry = f"rows-{digest(parts)[:32]}.npz"
    made = cached_arrays(
        entry, lambda: _as_arrays(*_inspect(format, rows, fraction, named)), f"Rows: checking {len(rows):,}", say
    )
    return _from_arrays(made)


def held_out(key: str, fraction: float) -> bool:
    """Whether the document or row of this key belongs to validation: a fixed hash of it falls below `fraction`."""
    number = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return number < fraction * 2**64


def problem_of(format: str, row: Row) -> str | None:
    """What is wrong with a row, or None."""
    return row.broken or formats.problem(format, row.values)


def _inspect(
    format: str, rows: Collection[Row], fraction: float | None, named: bool
) -> tuple[Found, Found, str, Tally]:
    train, held, total, bad = Found(), Found(), hashlib.sha256(), Tally(len(rows))
    for number, row in enumerate(rows):
        problem = problem_of(format, row)
        if problem is not None:
            bad.add(row, problem)
            continue
        content = json.dumps(row.values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        is_held = fraction is not None and held_out(row.place if named else content, fraction)
        total.update(digest([str(is_held), row.place if named else "", content]).encode())
        side = held if is_held else train
        if not named and format == "text" and not row.values["text"]:
            side.empty += 1
            continue
        side.numbers.append(number)  # type: ignore[union-attr]
        side.bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in formats.texts(format, row.values))
        if format == "classification":
            label = row.values["label"]
            side.labels[label] = side.labels.get(label, 0) + 1
    return train, held, total.hexdigest(), bad


def _as_arrays(train: Found, held: Found, total: str, bad: Tally) -> dict[str, np.ndarray]:
    sides = (train, held)
    notes = [total, asdict(bad), *([side.bytes, side.empty, list(side.labels.items())] for side in sides)]
    text = np.frombuffer(json.dumps(notes).encode(), np.uint8)
    numbers = {f"numbers{index}": np.array(side.numbers, np.int64) for index, side in enumerate(sides)}
    return {"notes": text, **numbers}


def _from_arrays(arrays: dict[str, np.ndarray]) -> tuple[Found, Found, str, Tally]:
    total, bad, *sides = json.loads(arrays["notes"].tobytes())
    train, held = (
        Found(arrays[f"numbers{index}"], size, empty, {label: count for label, count in labels})
        for index, (size, empty, labels) in enumerate(sides)
    )
    return train, held, total, Tally(**bad)
