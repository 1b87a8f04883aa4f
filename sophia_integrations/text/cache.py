"""Files and tables that can be made again, kept in the cache: one process makes an entry, others wait for it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache import cache_dir, write_aside

if TYPE_CHECKING:
    import datasets

_BATCH = 1000  # rows of a table written at once

Notes = dict[str, Any]
"""What is known of a table besides its rows, as JSON."""


def cached_file(name: str, write: Callable[[Path], object], say: Callable[[str], object]) -> Path | None:
    """The cache entry `name`, filled by `write` where there is none; None where the cache cannot be written.

    One process makes an entry, and others that want it wait for it.
    """
    import filelock

    path = cache_dir() / name
    if path.is_file():
        return path
    locks = path.parent / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(locks / f"{name}.lock"):
            if not path.is_file():
                write_aside(path, write)
    except OSError as error:
        say(f"Cache: {cache_dir()} cannot be written ({error.strerror or error}); going on without it.")
        return None
    return path


def cached_table(
    name: str,
    features: datasets.Features,
    rows: Callable[[Notes], Iterable[dict[str, Any]]],
    what: str,
    say: Callable[[str], object],
) -> tuple[datasets.Dataset, Notes]:
    """The table of the cache entry `name`, mapped from its file, and its notes; in memory where it cannot be written.

    Args:
        name: of the entry, without its endings ``.arrow`` and ``.json``.
        features: the columns.
        rows: makes the rows, and notes meanwhile what is to be known of them; called again when writing fails.
        what: is done when they are made, for the reader.
        say: receives the lines for the reader.
    """
    import datasets
    import pyarrow as pa

    def write(aside: Path) -> None:
        say(what)
        notes: Notes = {}
        _write(aside, features, rows(notes))
        write_aside(cache_dir() / f"{name}.json", lambda file: file.write_text(json.dumps(notes), encoding="utf-8"))

    path = cached_file(f"{name}.arrow", write, say)
    if path is None:
        notes: Notes = {}
        return table_in_memory(features, rows(notes)), notes
    try:
        return datasets.Dataset.from_file(str(path)), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, pa.ArrowException):
        say(f"Cache: {path} is damaged; making it again.")
        path.unlink(missing_ok=True)
    return cached_table(name, features, rows, what, say)


def table_in_memory(features: datasets.Features, rows: Iterable[dict[str, Any]]) -> datasets.Dataset:
    """A table that no file keeps."""
    import datasets
    import pyarrow as pa

    return datasets.Dataset(pa.Table.from_pylist(list(rows), features.arrow_schema))


def _write(path: Path, features: datasets.Features, rows: Iterable[dict[str, Any]]) -> None:
    import pyarrow as pa

    schema, left = features.arrow_schema, iter(rows)
    with open(path, "wb") as file, pa.ipc.new_stream(file, schema) as target:
        while batch := list(itertools.islice(left, _BATCH)):
            target.write_batch(pa.RecordBatch.from_pylist(batch, schema))
