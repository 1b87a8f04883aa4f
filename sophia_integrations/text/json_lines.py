"""JSON as rows: every row is kept as the text it was written in and parsed when it is read, so nothing guesses types.

A reader that infers the type of a column turns dates into times, and text into numbers, depending on the other rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

JSON = "__json__"
"""The one column of a table whose rows are lines of JSON."""

_OBJECT = 'a row is an object, such as {"text": "…"}'


def parse(line: str) -> dict[str, Any] | str:
    """The row on a line, or why there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else _OBJECT


def lines_of(document: str, field: str | None = None) -> list[str]:
    """The rows of a ``.json`` file: a list of rows or of texts, a row a line, a list for each column, or one row.

    Args:
        document: all of the file.
        field: the key under which it holds its rows.

    Raises:
        ValueError: it is none of these.
    """
    try:
        found = json.loads(document)
    except ValueError:
        lines = [line for line in document.split("\n") if line.strip()]
        if not lines or isinstance(parse(lines[0]), str):
            raise
        return lines
    if field is not None:
        found = found.get(field) if isinstance(found, dict) else None
    if isinstance(found, dict):
        one_line = field is None and "\n" not in document.strip()
        found = [found] if one_line else _by_row(found)
    if not isinstance(found, list):
        raise ValueError("a .json file is a list of rows, " + _OBJECT.replace("a row is", "each"))
    return [json.dumps({"text": row} if isinstance(row, str) else row) for row in found]


def _by_row(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table that was written column by column; what is no table is one row."""
    columns = [list(column.values()) if isinstance(column, dict) else column for column in found.values()]
    if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [found]
    return [dict(zip(found, row, strict=True)) for row in zip(*columns, strict=True)]


def names_of(lines: Iterable[str]) -> list[str]:
    """The columns of some rows, in the order in which they turn up."""
    found = (parse(line) for line in lines)
    return list(dict.fromkeys(name for row in found if isinstance(row, Mapping) for name in row))
