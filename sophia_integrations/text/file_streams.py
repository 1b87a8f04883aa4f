"""Files as streams of rows that know their file and their number in it, whoever reads which file in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import UserError
from .json_lines import JSON, lines_of
from .rows import FILE, INDEX

_BATCH = 1000  # rows read from tables at once


def stream_files(
    files: Sequence[str], kind: str, trouble: Callable[..., str], encoding: str = "utf-8", field: str | None = None
) -> Any:
    """An iterable data set with a shard for each file.

    Args:
        files: paths, or addresses such as ``hf://…``.
        kind: jsonl, json, csv, parquet or arrow.
        trouble: says what is wrong, from the files, the kind and the error, where one cannot be read.
        encoding, field: of JSON; see `lines_of`.
    """
    import datasets

    given = {"kind": kind, "trouble": trouble, "encoding": encoding, "field": field}
    return datasets.IterableDataset.from_generator(_numbered, gen_kwargs={"files": list(files), **given})


def _numbered(
    files: Sequence[str], kind: str, trouble: Callable[..., str], encoding: str, field: str | None
) -> Iterator[dict[str, Any]]:
    for file in files:
        try:
            rows = _json(file, kind, encoding, field) if kind in ("json", "jsonl") else _READERS[kind](file)
            for number, row in enumerate(rows):
                yield {**row, FILE: file, INDEX: number}
        except Exception as error:
            raise UserError(trouble([file], kind, error)) from None


def _json(file: str, kind: str, encoding: str, field: str | None) -> Iterator[dict[str, Any]]:
    import fsspec

    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    with fsspec.open(file, "rt", encoding=encoding, compression="infer") as lines:
        for line in lines_of(lines.read(), field) if kind == "json" else lines:
            if line.strip():
                yield {JSON: line}


def _csv(file: str) -> Iterator[dict[str, Any]]:
    import pandas

    for rows in pandas.read_csv(file, dtype=str, keep_default_na=False, chunksize=_BATCH):
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


_READERS = {"csv": _csv, "parquet": _parquet, "arrow": _arrow}
