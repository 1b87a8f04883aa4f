"""Rows of tables: one row is one document or example, read as it stands; from where is a matter of ``readers.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .json_lines import JSON, parse

if TYPE_CHECKING:
    import datasets
    import numpy as np

_BATCH = 1000  # rows read from Arrow at once
INDEX, FILE = "__row__", "__file__"  # columns of a stream: which row this is, of which file


@dataclass(frozen=True)
class Place:
    """Where a row of a table stands, in words such as ``train.jsonl, row 18`` once they are asked for."""

    where: Callable[[int, str | None], str]
    number: int
    file: str | None = None

    def __str__(self) -> str:
        return self.where(self.number, self.file)


@dataclass(frozen=True)
class Row:
    """One document or example: `values` by their part (text, prompt, completion, messages, label); `place` says where
    it stands.  What cannot be read at all has no values, and says in `broken` why."""

    place: str | Place
    values: dict[str, Any]
    broken: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows as `datasets` holds them, on disk or as a stream.

    Attributes:
        data: a ``Dataset`` or an ``IterableDataset``; the latter with the columns `INDEX` and, if known, `FILE`.
        names: of the columns.
        where: names the place of a row, by its number and file.
        features: what the author of a data set declares its columns to be.
        mixed: columns that are text in some files only, and what to say of them.
    """

    data: Any
    names: list[str]
    where: Callable[[int, str | None], str]
    features: Mapping[str, Any] = field(default_factory=dict)
    mixed: Mapping[str, str] = field(default_factory=dict)

    def row(self, held: Mapping[str, Any], columns: Mapping[str, str], number: int, file: str | None = None) -> Row:
        """The row that `data` holds as `held`."""
        place = Place(self.where, number, file)
        found = parse(held[JSON]) if JSON in held else held
        if isinstance(found, str):
            return Row(place, {}, found)
        try:
            return Row(place, {part: self._declared(name, found.get(name)) for part, name in columns.items()})
        except ValueError as error:
            return Row(place, {}, str(error))

    def _declared(self, name: str, value: Any) -> Any:
        encode = getattr(self.features.get(name), "encode_example", None)
        return value if value is None or encode is None else encode(value)


class TableRows:
    """Rows of a table on disk: sized, iterated in order and never held in memory together.

    Args:
        table: what `read_files` or `read_hub` returned.
        columns: the column of each part.
        index: the rows that belong here; all when None.
    """

    def __init__(self, table: Table, columns: Mapping[str, str], index: np.ndarray | None = None) -> None:
        self.table, self.columns, self.index = table, columns, index

    @property
    def fingerprint(self) -> str:
        """What `datasets` knows the table by: another one for another content."""
        return str(self.table.data._fingerprint)

    def __len__(self) -> int:
        return len(self.table.data) if self.index is None else len(self.index)

    def __iter__(self) -> Iterator[Row]:
        numbers = range(len(self)) if self.index is None else self.index
        data = self.table.data if self.index is None else self.table.data.select(self.index)
        used = [JSON] if JSON in data.column_names else sorted(set(self.columns.values()))
        start = 0
        for batch in data.select_columns(used).iter(_BATCH):
            size = len(next(iter(batch.values())))
            for row in range(size):
                held = {name: values[row] for name, values in batch.items()}
                yield self.table.row(held, self.columns, int(numbers[start + row]))
            start += size

    def only(self, index: Sequence[int]) -> TableRows:
        """The rows of these numbers, of a table that has all of its own."""
        import numpy as np

        return TableRows(self.table, self.columns, np.asarray(index, dtype=np.int64))


class StreamRows:
    """Rows that come from a stream and have no known number.

    Args:
        table: one whose data is iterable.
        columns: as for `TableRows`.
    """

    def __init__(self, table: Table, columns: Mapping[str, str]) -> None:
        self.table, self.columns = table, columns

    @property
    def stream(self) -> datasets.IterableDataset:
        """The iterable data set."""
        return self.table.data

    def __iter__(self) -> Iterator[Row]:
        return self.epoch(None, 0)

    def epoch(self, seed: int | None, number: int, buffer: int = 10_000) -> Iterator[Row]:
        """All rows once; with a `seed` in the order of a shuffling buffer, another one in each epoch `number`."""
        stream = self.stream
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=buffer)
            stream.set_epoch(number)
        for held in stream:
            yield self.table.row(held, self.columns, held[INDEX], held.get(FILE))
