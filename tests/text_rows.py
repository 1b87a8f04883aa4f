"""Rows as a user wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LOOK_ALIKES = [
    "2024-01-01T00:00:00", "2024-01-01", "2024-01-01T00:00:00Z", "2024-01-01 00:00:00.123456", "12:30:00", "P1DT2H",
    "007", "1.50", "-0", "+1", "1e400", "0x10", "1_000", "12345678901234567890", "3/4",
    "true", "False", "null", "None", "NA", "N/A", "NaN", "nan", "", " ", "  both ends  ", "\ta", "#", "'", "\\n",
    "a\nb", "Zürich 👍", "\u2028", "\u0085", "\x0b", "\x00", "[1, 2]", '{"a": 1}', '"',
]  # fmt: skip
KINDS = ["jsonl", "json", "csv", "parquet", "arrow"]
UNIFORM = [text for text in LOOK_ALIKES if text.strip()]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = path.suffix[1:]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as target:
            target.write_table(table)
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            target = csv.DictWriter(file, rows[0], quoting=csv.QUOTE_ALL)
            target.writeheader()
            target.writerows(rows)
    elif kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def values(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of rows that were checked."""
    parts = ("text", "prompt", "completion", "messages", "label")
    found = [{part: row[part] for part in parts if part in row} for row in rows]
    return [{part: json.loads(v) if part in ("messages", "label") else v for part, v in row.items()} for row in found]


def train_values(source: Any) -> list[dict[str, Any]]:
    """The same of the training rows of a source."""
    return values(source.train.rows)
