"""Rows of one format: each is one document or example, read as it stands, checked once, and sorted into two splits.

A row is a dictionary, the same in a table and in a stream: its parts (text, prompt, completion, messages, label; the
last two as JSON), its ``place``, such as ``train.jsonl, row 18``, its ``problem`` with the place, or None, the SHA-256
``digest`` of its parts and the ``bytes`` of its text.  A document that is a file is held out by a hash of its name, a
row by a hash of its content: adding others moves none, and a row that occurs twice is on one side only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache import digest
from . import formats
from .bad_rows import Tally
from .cache import cached_table
from .raw import RawTable

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]

_VERSION = "4"  # part of the key of every table: raise it when the same files become other rows


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


def row_table(
    raws: Sequence[RawTable], format: str, columns: Mapping[str, str] | None, say: Callable[[str], object]
) -> datasets.Dataset:
    """All rows of some tables with the same columns, from the cache or read now.

    Args:
        raws: the rows as they stand.
        format: which parts a row has.
        columns: part of a row to column, where they differ.
        say: receives a line when they are read.
    """
    import datasets

    def table(raw: RawTable) -> datasets.Dataset:
        key = digest([_VERSION, format, json.dumps(sorted(chosen.items())), *raw.key])
        rows, what = functools.partial(_rows, raw.files, raw, format, chosen), f"Rows: reading {raw.origin} …"
        whole, _ = cached_table(f"rows-{key[:32]}", row_features(format), lambda notes: rows(), what, say)
        return whole if raw.cut is None else whole.select(_numbers(raw.cut, len(whole)))

    chosen = _columns(raws, format, columns)
    tables = [table(raw) for raw in raws]
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)


def row_stream(raws: Sequence[RawTable], format: str, columns: Mapping[str, str] | None) -> datasets.IterableDataset:
    """The rows of one table, perhaps cut as ``train[:1000]``, read as they are needed; each file is a shard."""
    import datasets

    (raw,) = raws
    options = {"raw": raw, "format": format, "columns": _columns(raws, format, columns)}
    data = datasets.IterableDataset.from_generator(_rows, gen_kwargs={"files": raw.files, **options})
    return data if raw.cut is None or "[" not in raw.cut else data.take(_numbers(raw.cut, 2**63 - 1).stop)


def row_features(format: str) -> datasets.Features:
    """The columns of a table of rows."""
    from datasets import Features, Value

    types = {part: "large_string" for part in formats.PARTS[format]}
    types |= {"place": "string", "problem": "string", "digest": "binary", "bytes": "int64"}
    return Features({name: Value(kind) for name, kind in types.items()})


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


def _columns(raws: Sequence[RawTable], format: str, columns: Mapping[str, str] | None) -> dict[str, str]:
    return formats.choose_columns(format, raws[0].names, columns, raws[0].origin)


def _numbers(cut: str, size: int) -> range:
    import datasets

    (found,) = datasets.ReadInstruction.from_spec(cut).to_absolute({cut.partition("[")[0]: size})
    return range(found.from_, found.to)


def _rows(files: Iterable[str], raw: RawTable, format: str, columns: Mapping[str, str]) -> Iterator[Row]:
    for place, found in raw.read(files):
        values: dict[str, Any] = {}
        problem = found if isinstance(found, str) else None
        if not isinstance(found, str):
            try:
                values = {part: raw.declared(name, found.get(name)) for part, name in columns.items()}
                problem = formats.problem(format, values)
            except ValueError as error:
                problem = str(error)
        yield _row(format, _printable(place), values, problem)


def _row(format: str, place: str, values: Mapping[str, Any], problem: str | None) -> Row:
    if problem is not None:
        nothing = dict.fromkeys([*formats.PARTS[format], "digest"])
        return {**nothing, "place": place, "problem": f"{place}: {_printable(problem)}", "bytes": 0}
    content = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    row = {part: _kept(part, value) for part, value in values.items()}
    size = sum(len(text.encode()) for text in formats.texts(format, row))
    return {**row, "place": place, "problem": None, "digest": hashlib.sha256(content).digest(), "bytes": size}


def _kept(part: str, value: Any) -> str:
    if part == "label" and isinstance(value, float):
        value = int(value)
    return json.dumps(value) if part in formats.JSON else value


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _sha256(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _fall_below(keys: bytes, fraction: float) -> np.ndarray:
    """Of SHA-256 digests behind one another: is each, as a number in [0, 1), less than `fraction`?"""
    return np.frombuffer(keys, ">u8")[::4] < np.uint64(math.ceil(fraction * 2**64))
