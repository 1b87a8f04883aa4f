"""Files as streams of rows that know their file and their number in it, whoever reads which file in which order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import UserError
from .json_lines import JSON, lines_of
from .rows import FILE, INDEX

_BATCH = 1000  # rows read from tables at once


def stream_files(files: Sequence[str], kind: str, trouble: Callable[..., str], **options: Any) -> Any:
    """An iterable data set with a shard for each file.

    Args:
        files: paths, or addresses such as ``hf://…``.
        kind: jsonl, json, csv, parquet or arrow.
        trouble: says what is wrong, from the files, the kind and the error, where one cannot be read.
        options: of `json_rows` or `csv_rows`.
    """
    import datasets

    given = {"kind": kind, "trouble": trouble, "options": options}
    return datasets.IterableDataset.from_generator(_numbered, gen_kwargs={"files": list(files), **given})


def _numbered(
    files: Sequence[str], kind: str, trouble: Callable[..., str], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for file in files:
        try:
            for number, row in enumerate(_READERS[kind](file, **options)):
                yield {**row, FILE: file, INDEX: number}
        except Exception as error:
            raise UserError(trouble([file], kind, error)) from None


def json_rows(
    file: str, encoding: str = "utf-8", field: str | None = None, by_line: bool = False
) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON, each as its text."""
    import fsspec

    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    with fsspec.open(file, "rt", encoding=encoding, compression="infer") as lines:
        for line in lines if by_line else lines_of(lines.read(), field):
            if line.strip():
                yield {JSON: line}


def csv_rows(file: str, **options: Any) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file, every cell as text; a cell that its line does not reach is None."""
    import pandas

    with pandas.read_csv(file, **{**options, "dtype": str, "keep_default_na": False, "chunksize": _BATCH}) as found:
        for rows in found:
            yield from rows.astype(object).where(rows.notna(), None).to_dict("records")


def _parquet(file: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as found:
        for batch in found.iter_batches(_BATCH):
            yield from batch.to_pylist()


def _arrow(file: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    with pa.memory_map(file) as source:
        try:
            batches = iter(pa.ipc.open_stream(source))
        except pa.ArrowInvalid:
            found = pa.ipc.open_file(source)
            batches = (found.get_batch(number) for number in range(found.num_record_batches))
        for batch in batches:
            yield from batch.to_pylist()


_READERS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "jsonl": functools.partial(json_rows, by_line=True),
    "json": json_rows,
    "csv": csv_rows,
    "parquet": _parquet,
    "arrow": _arrow,
}
