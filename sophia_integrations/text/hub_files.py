"""Data sets of the hub whose files are JSON or CSV: local copies of the files, to be read as they stand.

`datasets` keeps what it made of them, types guessed; the hub's own cache keeps the files, for use offline too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def guessing_kind(builder: Any) -> str | None:
    """ "json" or "csv" where the reader of a data set infers the types of its columns, else None."""
    names = {base.__name__ for base in type(builder).__mro__}
    return next((kind for kind in ("json", "csv") if kind.capitalize() in names), None)


def local_copy(path: str, name: str | None, revision: str | None) -> tuple[str, str | None]:
    """The folder, and None, of a data set by hub id whose types would be guessed; `path` and `revision` of others."""
    import datasets

    if Path(path).is_dir():
        return path, revision
    try:
        builder = datasets.load_dataset_builder(path, name, revision=revision)
    except Exception:  # offline; what it is else, loading the data set says
        builder = None
    folder = None
    if guessing_kind(builder) is not None:
        folder = _fetched(path, revision, [_inside(file) for file in _files(builder)])
    elif builder is None or builder.config.data_files is None:
        folder = _kept(path, name, revision)
    return (path, revision) if folder is None else (folder, None)


def _files(builder: Any) -> list[str]:
    return [str(file) for files in builder.config.data_files.values() for file in files]


def _inside(url: str) -> str:
    """The path of ``hf://datasets/owner/name@revision/path`` inside its repository."""
    return url.partition("@")[2].partition("/")[2]


def _fetched(path: str, revision: str | None, files: list[str]) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(path, repo_type="dataset", revision=revision, allow_patterns=["README.md", *files])


def _kept(path: str, name: str | None, revision: str | None) -> str | None:
    """The files that were fetched before, where the hub cannot be asked."""
    import datasets
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(path, repo_type="dataset", revision=revision, local_files_only=True)
        builder = datasets.load_dataset_builder(folder, name)
    except Exception:  # nothing was fetched, or other files only
        return None
    return folder if guessing_kind(builder) is not None else None
