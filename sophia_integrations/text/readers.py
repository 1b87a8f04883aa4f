"""Files and data sets as tables of rows, read with the `datasets` library, but for what it would guess.

Columns of Parquet and Arrow files have the types that they were written with.  JSON and CSV files have none, and a
reader that infers them changes text: their rows stay lines of JSON (``json_lines.py``), their cells text.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import functools
import itertools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .cache import cache_dir
from .file_streams import csv_rows, stream_files
from .hub_files import guessing_kind, local_copy
from .json_lines import JSON, lines_of, names_of, parse
from .rows import FILE, INDEX, Table
from .schemas import mixed_columns

_SEEN = 1000  # rows of JSON whose names are the columns


def read_files(paths: Sequence[Path], kind: str, *, streaming: bool = False) -> Table:
    """The rows of files of one `kind`, as a table (of a stream when `streaming`).

    Raises `UserError`, with the place where it can be known, when a file cannot be read.
    """
    _library()
    empty = next((path for path in paths if path.stat().st_size == 0), None)
    if empty is not None:
        raise UserError(f"{empty}: the file is empty")
    header = _csv_header(paths) if kind == "csv" else []
    files = [str(path) for path in paths]
    with _reading(files, kind):
        mixed = mixed_columns(files)
        if streaming:
            data = stream_files(files, kind, _unreadable)
        else:
            with _scratch() as folder:
                data = _load(files, kind, header, folder)
        where = functools.partial(_in_files, tuple(files), kind)
        return Table(data, _names(data, where), where, mixed=mixed)


def read_hub(path: str, name: str | None, split: str, revision: str | None, *, streaming: bool = False) -> Table:
    """One split of a data set by hub id or folder, as a table; raises `UserError`."""
    _library()
    taken: int | None = None
    wanted = split
    if streaming and "[" in split:
        wanted, _, rest = split.partition("[")
        if not (rest.startswith(":") and rest.endswith("]") and rest[1:-1].isdigit()):
            raise UserError(f"data.hub: a streamed split is cut as NAME[:ROWS], found {split!r}")
        taken = int(rest[1:-1])
    shown = f"{path!r}" + (f", {name!r}" if name else "") + f", split {split!r}"
    try:
        with _quiet(bars=True):
            place, revision = (path, revision) if streaming else local_copy(path, name, revision)
            data, features, mixed = _data_set(place, name, wanted, revision, streaming)
            data = data if taken is None else data.take(taken)
            where = functools.partial(_in_hub, f"{path} ({split})", streaming)
            return Table(data, _names(data, where), where, features, mixed)
    except UserError:
        raise
    except Exception as error:  # offline, no such data set, configuration or split, damaged files
        raise UserError(f"data.hub: {shown} cannot be loaded: {_first_line(error)}") from None


def _data_set(place: str, name: str | None, split: str, revision: str | None, streaming: bool) -> tuple[Any, Any, Any]:
    """The data, the features it declares, and its mixed columns."""
    import datasets

    builder = datasets.load_dataset_builder(place, name, revision=revision)
    kind, declared, config = guessing_kind(builder), builder.info.features or {}, builder.config
    files = {part: [str(file) for file in found] for part, found in (config.data_files or {}).items()}
    if kind == "json" and all(_is_lines(file) for found in files.values() for file in found):
        kind = "jsonl"
    json = {"encoding": config.encoding, "field": config.field} if kind in ("json", "jsonl") else {}
    cells = {**config.pd_read_csv_kwargs} if kind == "csv" else {}
    if streaming and kind is not None:
        if split not in files:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(files)}.')
        return stream_files(files[split], kind, _unreadable, **json, **cells), declared, {}
    if json:
        return _load_json(files, kind, split, **json), declared, {}
    options = {"split": split, "revision": revision, "streaming": streaming}
    if kind == "csv":
        with contextlib.closing(csv_rows(next(iter(files.values()))[0], **cells)) as rows:
            features = datasets.Features({column: datasets.Value("string") for column in next(rows, {})})
        data = datasets.load_dataset(place, name, features=features, keep_default_na=False, **options)
        return data, declared, {}
    data = datasets.load_dataset(place, name, **options)
    if streaming:
        return with_index(data), data.features or {}, {}
    here = files.get(split.partition("[")[0], []) if Path(place).is_dir() else []
    return data, data.features, mixed_columns(here)


def _is_lines(file: str) -> bool:
    return any(part in (".jsonl", ".ndjson") for part in Path(file).suffixes)


def with_index(data: Any) -> Any:
    """A stream whose rows know their number."""
    return data.map(_with_index, with_indices=True)


def _with_index(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {**row, INDEX: index}


def _load(files: Sequence[str], kind: str, header: Sequence[str], cache_dir: str) -> Any:
    import datasets

    if kind in ("json", "jsonl"):
        return _load_json({"train": files}, kind, "train", cache_dir=cache_dir)
    options: dict[str, Any] = {"data_files": {"train": list(files)}, "split": "train", "cache_dir": cache_dir}
    if kind == "csv":
        features = datasets.Features({name: datasets.Value("string") for name in header})
        options.update(features=features, keep_default_na=False)
    return datasets.load_dataset(kind, **options)


def _load_json(
    files: Mapping[str, Sequence[str]],
    kind: str,
    split: str,
    encoding: str = "utf-8",
    field: str | None = None,
    cache_dir: str | None = None,
) -> Any:
    """The lines of a split, which may be cut as `datasets` cuts them: ``train[:10%]+test``."""
    import datasets

    found = datasets.load_dataset(
        "text",
        data_files={part: list(paths) for part, paths in files.items()},
        features=datasets.Features({JSON: datasets.Value("string")}),
        encoding="utf-8-sig" if encoding == "utf-8" else encoding,
        sample_by="line" if kind == "jsonl" else "document",
        cache_dir=cache_dir,
    )
    if kind == "json":
        found = found.map(_rows_of_documents, batched=True, batch_size=1, fn_kwargs={"field": field})
    rows = {part: _without_blank(data) for part, data in found.items()}
    cuts = datasets.ReadInstruction.from_spec(split).to_absolute({part: len(data) for part, data in rows.items()})
    parts = [rows[cut.splitname].select(range(cut.from_, cut.to)) for cut in cuts]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _rows_of_documents(batch: dict[str, list[str]], field: str | None) -> dict[str, list[str]]:
    return {JSON: [line for document in batch[JSON] for line in lines_of(document, field)]}


def _without_blank(data: Any) -> Any:
    import numpy as np
    import pyarrow.compute as pc

    column = data.with_format("arrow").data.column(JSON)
    kept = [pc.not_equal(pc.utf8_trim_whitespace(chunk), "").to_numpy(False) for chunk in column.chunks]
    rows = np.flatnonzero(np.concatenate([np.zeros(0, bool), *kept]))
    return data if len(rows) == len(data) else data.select(rows)


def _names(data: Any, where: Any) -> list[str]:
    """The columns; of a stream that does not tell them those of its first row, of JSON those of its first rows."""
    first = next(iter(data), {})
    if JSON not in first:
        return [name for name in data.column_names or first if name not in (INDEX, FILE)]
    names = names_of(row[JSON] for row in itertools.islice(data, _SEEN))
    if not names:
        raise UserError(f"{where(first.get(INDEX, 0), first.get(FILE))}: {parse(first[JSON])}")
    return names


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


@contextlib.contextmanager
def _reading(files: Sequence[str], kind: str) -> Iterator[None]:
    """Turns whatever the readers of these formats raise into a sentence."""
    try:
        with _quiet():
            yield
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        raise UserError(_unreadable(files, kind, error)) from None


def _unreadable(files: Sequence[str], kind: str, error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, UnicodeDecodeError):
        for file in files:
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        line.decode()
                    except UnicodeDecodeError:
                        return f"{file}:{number}: not UTF-8 text; convert the file or leave it out"
    with contextlib.suppress(Exception):  # the same again
        for trouble in mixed_columns(files).values():
            return trouble
    places = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return f"{places}: cannot be read as {kind}: {_first_line(cause)}"


def _in_hub(origin: str, streaming: bool, number: int, file: str | None) -> str:
    return f"{file or origin}, row {number + 1}" + (" of the stream" if streaming and file is None else "")


def _in_files(files: Sequence[str], kind: str, number: int, file: str | None) -> str:
    """Finds the file of a row by counting, where it is not known: slow, and only needed for a message."""
    if file is None:
        for file in files[:-1]:
            rows = _count(file, kind, Path(file).stat().st_mtime_ns)
            if number < rows:
                break
            number -= rows
        else:
            file = files[-1]
    return f"{file}, row {number + 1}"


@functools.lru_cache(maxsize=4096)
def _count(file: str, kind: str, written: int) -> int:
    import pyarrow.parquet as pq

    if kind == "parquet":
        return pq.read_metadata(file).num_rows
    with _quiet(), _scratch() as folder:
        header = _csv_header([Path(file)]) if kind == "csv" else []
        return len(_load([file], kind, header, folder))


def _library() -> Any:
    """Raises `UserError` where the `datasets` library is not installed."""
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise UserError(
            "rows of files and data sets are read with the package datasets, not installed here: "
            "pip install 'sophia-integrations[recipes]'"
        ) from None


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
