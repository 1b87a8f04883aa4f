"""Types of Parquet and Arrow files: a column that is text in one of them and a time in another would be rewritten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def mixed_columns(files: Sequence[str]) -> dict[str, str]:
    """Columns that are text in some files only, each with a sentence about it; `datasets` would write the others as
    text of its own, such as ``2024-01-01 00:00:00``.

    A column without any value has no type, and may join any other.
    """
    first: dict[tuple[str, ...], bool] = {}
    mixed: dict[str, str] = {}
    for file in files:
        for place, text in _leaves(_schema(file)):
            if first.setdefault(place, text) != text:
                words = "is text here and something else" if text else "is something else here and text"
                mixed.setdefault(
                    place[0], f"{file}: the column {'.'.join(place)} {words} in {files[0]}; write it alike"
                )
    return mixed


def _schema(file: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    suffix = Path(file).suffix.lower()
    if suffix not in (".parquet", ".arrow"):
        return ()
    if suffix == ".parquet":
        return pq.read_schema(file)
    with pa.memory_map(file) as source:
        try:
            return pa.ipc.open_stream(source).schema
        except pa.ArrowInvalid:
            return pa.ipc.open_file(source).schema


def _leaves(fields: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Each value that a row may hold, by the names that lead to it, and whether it is text."""
    import pyarrow.types as types

    for field in fields:
        kind, here = field.type, (*place, field.name)
        while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            kind = kind.value_type
        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_struct(kind):
            yield from _leaves((kind.field(number) for number in range(kind.num_fields)), here)
        elif not types.is_null(kind):
            yield here, str(kind) in ("string", "large_string", "string_view")
