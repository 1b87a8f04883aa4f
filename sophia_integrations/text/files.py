"""Files as tables of rows: those of patterns, and the running Python's standard library; never tokens."""

from __future__ import annotations

import functools
import glob
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .raw import ROW_KINDS, RawRow, RawTable, file_keys, rows_of_files

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_GENERATED_FOLDERS = {"encodings", "pydoc_data"}  # character tables and the language reference as data, not code
_BUILD_SPECIFIC = ("_sysconfigdata", "config-")


def absolute_globs(patterns: Sequence[str], folder: Path) -> list[str]:
    """Patterns relative to `folder` as absolute ones, so that a resolved recipe works from anywhere."""
    base = glob.escape(str(folder))
    return [os.path.normpath(os.path.join(base, os.path.expanduser(pattern))) for pattern in patterns]


def matches(pattern: str) -> list[Path]:
    """The files that a pattern names; ``**`` crosses folders, ``~`` is the home folder."""
    hits = glob.glob(os.path.expanduser(pattern), recursive=True)
    return [Path(hit) for hit in hits if os.path.isfile(hit)]


def kind_of(paths: Sequence[Path], key: str) -> str:
    """The one kind of `paths`: "text", or what `ROW_KINDS` says; raises `UserError` when they are mixed."""
    kinds = {ROW_KINDS.get(path.suffix.lower(), "text"): path for path in reversed(paths)}
    if len(kinds) > 1:
        shown = " and ".join(f"{kind} ({path.name})" for kind, path in sorted(kinds.items()))
        raise UserError(f"{key}: the files are {shown}; give files of one kind")
    return next(iter(kinds))


def read_files(patterns: Sequence[str], key: str) -> RawTable:
    """The rows of all files of `patterns`; a text file is one document, named by its path below their common folder.

    Raises `UserError` about `key` when a pattern names no file or the kinds are mixed.
    """
    hits = {pattern: matches(pattern) for pattern in patterns}
    for pattern in patterns:
        if not hits[pattern]:
            raise UserError(f"{key}: no file matches {pattern}")
    paths = sorted({hit.resolve() for found in hits.values() for hit in found})
    kind, origin = kind_of(paths, key), f"{key} ({', '.join(patterns)})"
    if kind != "text":
        files = [str(path) for path in paths]
        return RawTable(origin, files, functools.partial(rows_of_files, kind=kind), [kind, *file_keys(files)])
    return _documents(origin, paths, Path(os.path.commonpath([path.parent for path in paths])))


def standard_library() -> RawTable:
    """The ``.py`` files of the running Python without its tests, each a document; raises `UserError` for none."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = list(_python_files(root))
    if not paths:
        raise UserError(
            f"python-stdlib: {root} holds no .py files (a zipped Python?); use a full Python, or data.files"
        )
    return _documents(f"the standard library in {root}", paths, root)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        unwanted = _SKIPPED_FOLDERS | _GENERATED_FOLDERS
        folders[:] = [name for name in folders if name not in unwanted and not name.startswith(_BUILD_SPECIFIC)]
        for name in files:
            if name.endswith(".py") and not name.startswith(_BUILD_SPECIFIC):
                yield Path(folder, name)


def _documents(origin: str, paths: Iterable[Path], base: Path) -> RawTable:
    """Each file as a document, named by its path below `base`."""
    files = sorted((str(path) for path in paths), key=lambda file: Path(file).relative_to(base).as_posix())
    return RawTable(origin, files, functools.partial(_texts, base=base), file_keys(files), named=True)


def _texts(files: Iterable[str], base: Path) -> Iterator[tuple[str, RawRow]]:
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            yield file, f"not UTF-8 text (byte {error.start}), convert it"
        except OSError as error:
            yield file, f"cannot be read: {error.strerror}"
        else:
            yield Path(file).relative_to(base).as_posix(), {"text": text}
