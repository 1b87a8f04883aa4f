"""Text files as documents: the running Python's standard library, or the user's own files; never tokens."""

from __future__ import annotations

import functools
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .raw import RawRow, RawTable, file_keys

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_GENERATED_FOLDERS = {"encodings", "pydoc_data"}  # character tables and the language reference as data, not code
_BUILD_SPECIFIC = ("_sysconfigdata", "config-")


def standard_library() -> tuple[RawTable, list[str]]:
    """The ``.py`` files of the running Python without its tests, and the names of those that are not text.

    Raises `UserError` when there are none.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in _python_files(root))
    skipped = [name for name in names if _python_text(root / name) is None]
    documents = [name for name in names if name not in skipped]
    if not documents:
        raise UserError(
            f"python-stdlib: {root} holds no .py files (a zipped Python?); use a full Python, or data.files"
        )
    key = file_keys(str(root / name) for name in documents)
    origin = f"the standard library in {root}"
    return RawTable(origin, documents, functools.partial(_modules, root=root), key, named=True), skipped


def read_documents(paths: Sequence[Path], origin: str) -> RawTable:
    """One document of each file, named by its path below their common folder."""
    base = Path(os.path.commonpath([path.parent for path in paths]))
    files = sorted((str(path) for path in paths), key=lambda file: Path(file).relative_to(base).as_posix())
    return RawTable(origin, files, functools.partial(_documents, base=base), file_keys(files), named=True)


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
