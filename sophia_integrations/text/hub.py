"""Data sets by hub id or folder: their files read as they stand, where they are JSON, CSV, Parquet or Arrow.

What `datasets` makes of JSON and CSV has its types guessed.  So only its knowledge of which files belong to which
split is used; the hub's own client fetches them and keeps them for use offline.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from .raw import RawRow, RawTable, file_keys, rows_of_files


def read_hub(hub: Mapping[str, str | None], split: str, streaming: bool = False) -> list[RawTable]:
    """The parts of a split such as ``train[:10%]+test`` of a data set; raises `UserError`.

    Args:
        hub: ``path``, a hub id or a folder; ``name`` of a configuration and ``revision``, where it has several.
        split: which rows.
        streaming: fetch nothing before it is read.
    """
    if streaming and not re.fullmatch(r"[^[+]+(\[:\d+\])?", split):
        raise UserError(f"data.hub: a streamed split is cut as NAME[:ROWS], found {split!r}")
    path, name, revision = str(hub["path"]), hub.get("name"), hub.get("revision")
    try:
        place, revision = (path, revision) if streaming else _local_copy(path, name, revision)
        return list(_tables(place, name, split, revision, streaming, f"data.hub {path} ({split})"))
    except UserError:
        raise
    except Exception as error:  # offline, no such data set, configuration or split, damaged files
        shown = f"{path!r}" + (f", {name!r}" if name else "") + f", split {split!r}"
        raise UserError(f"data.hub: {shown} cannot be loaded: {first_line(error)}") from None


def _tables(
    place: str, name: str | None, split: str, revision: str | None, streaming: bool, origin: str
) -> Iterator[RawTable]:
    import datasets

    builder = datasets.load_dataset_builder(place, name, revision=revision)
    kind, config = _kind(builder), builder.config
    if kind is None:
        wanted = split.partition("[")[0] if streaming else split
        data = datasets.load_dataset(place, name, split=wanted, revision=revision, streaming=streaming)
        files = [file["filename"] for file in getattr(data, "cache_files", [])]
        read = functools.partial(_numbered, data=data)
        cut = split if streaming else None
        yield RawTable(origin, [origin], read, [origin, *files], data.features or {}, cut=cut)
        return
    options: dict[str, Any] = {}
    if kind == "json":
        options = {"encoding": config.encoding or "utf-8", "field": config.field}
    elif kind == "csv":
        options = dict(config.pd_read_csv_kwargs)
    known = {part: [str(file) for file in found] for part, found in config.data_files.items()}
    for cut in split.split("+"):
        part = cut.partition("[")[0].strip()
        if part not in known:
            raise ValueError(f'Unknown split "{part}". Should be one of {list(known)}.')
        files, read = known[part], functools.partial(rows_of_files, kind=kind, **options)
        features = builder.info.features
        if features is None and kind == "parquet":  # as `datasets` noted them in files that it wrote
            features = datasets.load_dataset(place, name, split=part, revision=revision, streaming=True).features
        key = files if streaming else [kind, str(options), str(features), *file_keys(files)]
        yield RawTable(origin, files, read, key, features or {}, cut=cut.strip())


def _kind(builder: Any) -> str | None:
    """json, csv, parquet or arrow; None where `datasets` reads something else."""
    names = {base.__name__ for base in type(builder).__mro__}
    kinds = ("json", "csv", "parquet", "arrow")
    return next((kind for kind in kinds if kind.capitalize() in names), None)


def _numbered(files: Iterable[str], data: Any) -> Iterator[tuple[str, RawRow]]:
    for file in files:
        for number, row in enumerate(data, 1):
            yield f"{file}, row {number}", row


def _local_copy(path: str, name: str | None, revision: str | None) -> tuple[str, str | None]:
    """The folder, and None, of a data set whose files are read here; `path` and `revision` of others."""
    import datasets
    from huggingface_hub import snapshot_download

    if Path(path).is_dir():
        return path, revision
    try:
        builder = datasets.load_dataset_builder(path, name, revision=revision)
    except Exception:  # offline; what it is else, loading the data set says
        builder = None
    fetch = functools.partial(snapshot_download, path, repo_type="dataset", revision=revision)
    if builder is not None and builder.config.data_files is not None:
        if _kind(builder) is None:
            return path, revision
        urls = (str(file) for files in builder.config.data_files.values() for file in files)
        inside = [url.partition("@")[2].partition("/")[2] for url in urls]  # hf://datasets/owner/name@revision/path
        return fetch(allow_patterns=["README.md", *inside]), None
    try:
        folder = fetch(local_files_only=True)
        kind = _kind(datasets.load_dataset_builder(folder, name))
    except Exception:  # nothing was fetched, or other files only
        kind = None
    kept_by_datasets = builder is not None and kind in ("parquet", "arrow")  # whole, which the folder may not be
    return (path, revision) if kind is None or kept_by_datasets else (folder, None)
