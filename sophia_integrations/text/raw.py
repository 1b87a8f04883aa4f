"""Rows as they stand in files: no reader here guesses a type, so no text becomes a date, a number or nothing.

Columns of Parquet and Arrow files have the types that they were written with.  JSON and CSV files have none, and a
reader that infers them changes text: JSON is parsed row by row, every cell of CSV is text.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from ..errors import UserError, first_line

ROW_KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Suffixes of files whose rows are documents or examples; any other file is one document of text."""

RawRow = dict[str, Any] | str
"""The columns of a row, or why there are none."""

_BATCH = 1000  # rows of a table decoded at once
_SEEN = 1000  # rows whose names are the columns
_OBJECT = 'a row is an object, such as {"text": "…"}'


@dataclass(frozen=True)
class RawTable:
    """Rows of files, or of another place, before anything is known of their format.

    Attributes:
        origin: where they come from, in words.
        files: what `read` takes, in order; streams read them side by side.
        read: the rows of some files, each with the words for where it stands.
        key: identifies the content.
        features: what the author of a data set declares its columns to be.
        named: each row is a document of plain text that is known by its name.
        cut: which rows of it are meant, as `datasets` writes it: ``train[:10%]``; all where it is None.
    """

    origin: str
    files: list[str]
    read: Callable[[Iterable[str]], Iterator[tuple[str, RawRow]]]
    key: list[str]
    features: Mapping[str, Any] = field(default_factory=dict)
    named: bool = False
    cut: str | None = None

    @functools.cached_property
    def names(self) -> list[str]:
        """The columns, in the order in which they turn up in the first rows; raises `UserError` if there are none."""
        if self.named:
            return ["text"]
        first = list(itertools.islice(self.read(self.files), _SEEN))
        names = list(dict.fromkeys(name for _, row in first if isinstance(row, Mapping) for name in row))
        if not names:
            raise UserError(": ".join(map(str, first[0])) if first else f"{self.origin}: there are no rows")
        return names

    def declared(self, name: str, value: Any) -> Any:
        """A value as the author declares its column; raises `ValueError` for one that is no such thing."""
        encode = getattr(self.features.get(name), "encode_example", None)
        return value if value is None or encode is None else encode(value)


def file_keys(files: Iterable[str]) -> list[str]:
    """Identify the content of local files without reading them."""
    stats = ((file, os.stat(file)) for file in files)
    return [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats]


def rows_of_files(files: Iterable[str], kind: str, **options: Any) -> Iterator[tuple[str, RawRow]]:
    """The rows of files, or of addresses such as ``hf://…``; raises `UserError` where one cannot be read.

    Args:
        files: of one kind.
        kind: json, csv, parquet or arrow.
        options: of the kind's reader.
    """
    import fsspec

    for file in files:
        try:
            with fsspec.open(file, "rb", compression="infer") as content:
                for number, row in enumerate(_READERS[kind](content, **options), 1):
                    yield f"{file}, row {number}", row
        except Exception as error:
            raise UserError(f"{file}: cannot be read as {kind}: {first_line(error)}") from None


def _json(content: IO[bytes], encoding: str = "utf-8", field: str | None = None) -> Iterator[RawRow]:
    """A row a line; or a list of rows in one document, in which `field` is its key."""
    with _text(content, encoding) as text:
        first = next((line for line in text if line.strip()), "")
        if field is None and not first.lstrip().startswith("["):
            yield from (_row(line) for line in itertools.chain([first], text) if line.strip())
            return
        found = json.loads(first + text.read())
    rows = found.get(field) if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise ValueError(f"there is no list of rows under {field!r}")
    yield from (row if isinstance(row, dict) else _OBJECT for row in rows)


def _text(content: IO[bytes], encoding: str) -> io.TextIOWrapper:
    """Bytes of another encoding become half characters, which make the text that holds them bad, and no other."""
    return io.TextIOWrapper(content, "utf-8-sig" if encoding == "utf-8" else encoding, "surrogateescape")


def _row(line: str) -> RawRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"the line is not JSON: {error}"
    return row if isinstance(row, dict) else _OBJECT


def _csv(content: IO[bytes], **options: Any) -> Iterator[RawRow]:
    """Every cell as text; one that its line does not reach is None."""
    import pandas

    fixed = {"dtype": object, "keep_default_na": False, "chunksize": _BATCH, "encoding_errors": "surrogateescape"}
    with pandas.read_csv(content, **{**options, **fixed}) as chunks:
        for rows in chunks:
            yield from rows.where(rows.notna(), None).to_dict("records")


def _parquet(content: IO[bytes]) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(content).iter_batches(_BATCH):
        yield from batch.to_pylist()


def _arrow(content: IO[bytes]) -> Iterator[RawRow]:
    import pyarrow as pa

    try:
        batches = iter(pa.ipc.open_stream(content))
    except pa.ArrowInvalid:
        content.seek(0)
        found = pa.ipc.open_file(content)
        batches = (found.get_batch(number) for number in range(found.num_record_batches))
    for batch in batches:
        yield from batch.to_pylist()


_READERS: dict[str, Callable[..., Iterator[RawRow]]] = {
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}
