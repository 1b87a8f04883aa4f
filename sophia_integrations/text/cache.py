"""A folder of results that can be made again: found by content, written aside and then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

_BATCH = 1000  # rows of a table written at once


def cache_dir() -> Path:
    """``$SOPHIA_CACHE``, or ``sophia-integrations`` in the user's cache folder (``~/.cache`` by default)."""
    if os.environ.get("SOPHIA_CACHE"):
        return Path(os.environ["SOPHIA_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sophia-integrations"


def digest(parts: Iterable[str | bytes]) -> str:
    """SHA-256, in hexadecimal, of a sequence of texts; different splits of the same text differ."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big"))
        total.update(data)
    return total.hexdigest()


def write_aside(target: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `target`, then renames it: a reader sees all of it or nothing.

    Raises `OSError` when the folder cannot be written; nothing is left behind then.
    """
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    aside = Path(name)
    try:
        write(aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def cached_table(
    name: str,
    features: datasets.Features,
    rows: Callable[[], Iterable[dict[str, Any]]],
    say: Callable[[str], object],
) -> datasets.Dataset:
    """The table of the cache entry `name`, mapped from its file; where there is none, made row by row.

    One process makes an entry, others that want it wait.  Where the cache cannot be written, the table is in memory.

    Args:
        name: of the entry, without the ending ``.arrow``.
        features: the columns.
        rows: makes the rows; called again when writing fails.
        say: receives the lines for the reader.
    """
    path = cache_dir() / f"{name}.arrow"
    found = _opened(path, say)
    if found is not None:
        return found
    try:
        with _locked(path):
            if not path.is_file():
                write_aside(path, lambda aside: _write(aside, features, rows()))
            return _opened(path, say) or table_in_memory(features, rows())
    except OSError as error:
        say(f"Cache: {cache_dir()} cannot be written ({error.strerror or error}); going on without it.")
        return table_in_memory(features, rows())


def table_in_memory(features: datasets.Features, rows: Iterable[dict[str, Any]]) -> datasets.Dataset:
    """A table that no file keeps."""
    import datasets
    import pyarrow as pa

    return datasets.Dataset(pa.Table.from_pylist(list(rows), features.arrow_schema))


def store(name: str, write: Callable[[Path], object], say: Callable[[str], object]) -> None:
    """Stores one cache entry; a cache that cannot be written costs time, never the run."""
    target = cache_dir() / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_aside(target, write)
    except OSError as error:
        say(f"Cache: {cache_dir()} cannot be written ({error.strerror}); going on without it.")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import filelock

    folder = path.parent / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / f"{path.stem}.lock"):
        yield


def _opened(path: Path, say: Callable[[str], object]) -> datasets.Dataset | None:
    import datasets
    import pyarrow as pa

    if not path.is_file():
        return None
    try:
        return datasets.Dataset.from_file(str(path))
    except (OSError, pa.ArrowException):
        say(f"Cache: {path} is damaged; making it again.")
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def _write(path: Path, features: datasets.Features, rows: Iterable[dict[str, Any]]) -> None:
    import pyarrow as pa

    schema, left = features.arrow_schema, iter(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as target:
        while batch := list(itertools.islice(left, _BATCH)):
            target.write_batch(pa.RecordBatch.from_pylist(batch, schema))
