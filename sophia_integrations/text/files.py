"""Files as tables of rows: those of patterns, and the running Python's standard library; never tokens."""

from __future__ import annotations

import functools
import glob
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
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

    Raises `UserError` about `key` when a pattern names no file, the kinds are mixed, or a file of rows is empty.
    """
    hits = {pattern: matches(pattern) for pattern in patterns}
    for pattern in patterns:
        if not hits[pattern]:
            raise UserError(f"{key}: no file matches {pattern}")
    paths = sorted({hit.resolve() for found in hits.values() for hit in found})
    kind, origin = kind_of(paths, key), f"{key} ({', '.join(patterns)})"
    if kind != "text":
        empty = next((path for path in paths if path.stat().st_size == 0), None)
        if empty is not None:
            raise UserError(f"{empty}: the file is empty")
        files = [str(path) for path in paths]
        return RawTable(origin, files, functools.partial(rows_of_files, kind=kind), [kind, *file_keys(files)])
    base = Path(os.path.commonpath([path.parent for path in paths]))
    files = sorted((str(path) for path in paths), key=lambda file: Path(file).relative_to(base).as_posix())
    return RawTable(origin, files, functools.partial(_documents, base=base), file_keys(files), named=True)


def standard_library(say: Callable[[str], object]) -> RawTable:
    """The ``.py`` files of the running Python without its tests, each a document.

    Raises `UserError` when there are none; `say` is told of those that are not text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in _python_files(root))
    documents = [name for name in names if _python_text(root / name) is not None]
    if not documents:
        raise UserError(
            f"python-stdlib: {root} holds no .py files (a zipped Python?); use a full Python, or data.files"
        )
    if len(documents) < len(names):
        say(f"Skipping {len(names) - len(documents)} files that are not text in their declared encoding.")
    key = file_keys(str(root / name) for name in documents)
    origin = f"the standard library in {root}"
    return RawTable(origin, documents, functools.partial(_modules, root=root), key, named=True)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        unwanted = _SKIPPED_FOLDERS | _GENERATED_FOLDERS
        folders[:] = [name for name in folders if name not in unwanted and not name.startswith(_BUILD_SPECIFIC)]
        for name in files:
            if name.endswith(".py") and not name.startswith(_BUILD_SPECIFIC):
                yield Path(folder, name)


def _modules(names: Iterable[str], root: Path) -> Iterator[tuple[str, RawRow]]:
    for name in names:
        yield name, {"text": _python_text(root / name)}


def _python_text(path: Path) -> str | None:
    """The text of a module; None where it is not text in its declared encoding."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return None


def _documents(files: Iterable[str], base: Path) -> Iterator[tuple[str, RawRow]]:
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            yield file, f"not UTF-8 text (byte {error.start}), convert it"
        except OSError as error:
            yield file, f"cannot be read: {error.strerror}"
        else:
            yield Path(file).relative_to(base).as_posix(), {"text": text}
