"""Rows of local files and of hub data sets, read with the `datasets` library: one row is one document or example."""

from __future__ import annotations

import atexit
import contextlib
import csv
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .cache import cache_dir

if TYPE_CHECKING:
    import datasets
    import numpy as np

_BATCH = 1000  # rows read from Arrow at once
_INDEX = "__row__"


@dataclass(frozen=True)
class Row:
    """One document or example: `values` by their part (text, prompt, completion, messages, label); `place` says where
    it stands, such as ``train.jsonl, row 18``."""

    place: str
    values: dict[str, Any]


class TableRows:
    """Rows of a data set on disk: sized, iterated in order and never held in memory together.

    Args:
        table: what `read_files` or `read_hub` returned.
        columns: the column of each part.
        where: names the table in messages.
        index: the rows that belong here; all when None.
    """

    def __init__(
        self, table: datasets.Dataset, columns: Mapping[str, str], where: Where, index: np.ndarray | None = None
    ) -> None:
        self.table, self.columns, self.where, self.index = table, columns, where, index

    @property
    def fingerprint(self) -> str:
        """What `datasets` knows the table by: another one for another content."""
        return str(self.table._fingerprint)

    def __len__(self) -> int:
        return len(self.table) if self.index is None else len(self.index)

    def __iter__(self) -> Iterator[Row]:
        numbers = range(len(self)) if self.index is None else self.index
        table = self.table if self.index is None else self.table.select(self.index)
        start = 0
        for batch in table.select_columns(sorted(set(self.columns.values()))).iter(_BATCH):
            size = len(next(iter(batch.values())))
            for row in range(size):
                values = {part: batch[column][row] for part, column in self.columns.items()}
                yield Row(self.where(int(numbers[start + row])), values)
            start += size

    def only(self, index: Sequence[int]) -> TableRows:
        """The rows of these numbers, of a table that has all of its own."""
        import numpy as np

        return TableRows(self.table, self.columns, self.where, np.asarray(index, dtype=np.int64))


class StreamRows:
    """Rows that come from a stream and have no known number.

    Args:
        stream: an iterable data set of `datasets`.
        columns, where: as for `TableRows`.
    """

    def __init__(self, stream: datasets.IterableDataset, columns: Mapping[str, str], where: Where) -> None:
        self.stream, self.columns, self.where = stream, columns, where

    def __iter__(self) -> Iterator[Row]:
        return self.epoch(None, 0)

    def epoch(self, seed: int | None, number: int, buffer: int = 10_000) -> Iterator[Row]:
        """All rows once; with a `seed` in the order of a shuffling buffer, another one in each epoch `number`."""
        stream = self.stream.map(_with_index, with_indices=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=buffer)
            stream.set_epoch(number)
        for values in stream:
            yield Row(self.where(values[_INDEX]), {part: values.get(name) for part, name in self.columns.items()})


def _with_index(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {**row, _INDEX: index}


Where = Callable[[int], str]


def read_files(paths: Sequence[Path], kind: str, *, streaming: bool = False) -> tuple[Any, Where]:
    """The rows of files of one `kind`, as a data set (iterable when `streaming`), and how to name one of them.

    Raises `UserError`, with the place where it can be known, when a file cannot be read.
    """
    datasets = _library()
    options: dict[str, Any] = {"data_files": {"train": [str(path) for path in paths]}, "split": "train"}
    if kind == "csv":  # every cell is text: '007' and 'NA' stay what they are
        names = _csv_header(paths)
        features = datasets.Features({name: datasets.Value("string") for name in names})
        options.update(features=features, keep_default_na=False)
    builder = {"jsonl": "json"}.get(kind, kind)
    empty = next((path for path in paths if path.stat().st_size == 0), None)
    if empty is not None:
        raise UserError(f"{empty}: the file is empty")
    try:
        with _quiet(), _scratch() as folder:
            table = datasets.load_dataset(builder, **options, cache_dir=folder, streaming=streaming)
    except Exception as error:  # whatever the readers of these formats raise
        raise UserError(_unreadable(paths, kind, error)) from None
    return table, lambda number: _file_and_row(paths, kind, number, streaming)


def read_hub(
    path: str, name: str | None, split: str, revision: str | None, *, streaming: bool = False
) -> tuple[Any, Where]:
    """One split of a data set by hub id or folder, and how to name one of its rows; raises `UserError`."""
    datasets = _library()
    taken: int | None = None
    wanted = split
    if streaming and "[" in split:
        wanted, _, rest = split.partition("[")
        if not (rest.startswith(":") and rest.endswith("]") and rest[1:-1].isdigit()):
            raise UserError(f"data.hub: a streamed split is cut as NAME[:ROWS], found {split!r}")
        taken = int(rest[1:-1])
    try:
        with _quiet(bars=True):
            table = datasets.load_dataset(path, name, split=wanted, revision=revision, streaming=streaming)
    except Exception as error:  # offline, no such data set, configuration or split, damaged files
        shown = f"{path!r}" + (f", {name!r}" if name else "") + f", split {split!r}"
        raise UserError(f"data.hub: {shown} cannot be loaded: {_first_line(error)}") from None
    if taken is not None:
        table = table.take(taken)
    return table, lambda number: f"{path} ({split}), row {number + 1}"


def column_names(table: Any) -> list[str]:
    """The columns of a data set; of a stream that does not tell them, those of its first row."""
    if table.column_names is not None:
        return list(table.column_names)
    first = next(iter(table), None)
    return list(first or ())


def _csv_header(paths: Sequence[Path]) -> list[str]:
    first: list[str] = []
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                names = next(csv.reader(file), [])
        except (UnicodeDecodeError, csv.Error, OSError) as error:
            raise UserError(f"{path}: cannot be read: {_first_line(error)}") from None
        if first and names != first:
            raise UserError(f"{path}: its columns are {', '.join(names)}; those of {paths[0]} are {', '.join(first)}")
        first = names
    return first


def _unreadable(paths: Sequence[Path], kind: str, error: BaseException) -> str:
    if kind == "jsonl":
        for path in paths:
            with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
                for number, line in enumerate(file, 1):
                    problem = _json_problem(line)
                    if problem:
                        return f"{path}:{number}: {problem}"
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    places = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    return f"{places}: cannot be read as {kind}: {_first_line(cause)}"


def _json_problem(line: str) -> str | None:
    if not line.strip():
        return None
    try:
        return None if isinstance(json.loads(line), dict) else 'a row is an object, such as {"text": "…"}'
    except ValueError as error:
        return f"not JSON: {error}"


def _file_and_row(paths: Sequence[Path], kind: str, number: int, streaming: bool) -> str:
    """Finds the file of a row by counting: slow, and only needed for a message."""
    if len(paths) == 1 or streaming:
        return f"{paths[0]}, row {number + 1}" + (f" of {len(paths)} files" if len(paths) > 1 else "")
    rest = number
    for path in paths:
        size = len(read_files([path], kind)[0])
        if rest < size:
            return f"{path}, row {rest + 1}"
        rest -= size
    return f"row {number + 1}"


def _library() -> Any:
    """The `datasets` library; raises `UserError` where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "rows of files and data sets are read with the package datasets, not installed here: "
            "pip install 'sophia-integrations[recipes]'"
        ) from None
    return datasets


@contextlib.contextmanager
def _quiet(bars: bool = False) -> Iterator[None]:
    """Neither logs nor, unless `bars`, progress bars of `datasets`: errors are reported by us, once."""
    import datasets

    level, shown = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """Where `datasets` keeps its Arrow files of local ones: our cache, or a temporary folder when that is read-only."""
    folder = cache_dir() / "datasets"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        aside = tempfile.mkdtemp(prefix="sophia-datasets-")
        atexit.register(shutil.rmtree, aside, ignore_errors=True)
        yield aside
    else:
        yield str(folder)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
