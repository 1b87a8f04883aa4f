"""Text files as documents: the running Python's standard library, or the user's own files; never tokens.

A document is one file.  It is held out or not by a hash of its name alone, so adding a file never moves another.
"""

from __future__ import annotations

import io
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import UserError
from .rows import Row

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_GENERATED_FOLDERS = {"encodings", "pydoc_data"}  # character tables and the language reference as data, not code
_BUILD_SPECIFIC = ("_sysconfigdata", "config-")


def standard_library() -> tuple[list[Row], list[str]]:
    """The ``.py`` files of the running Python without its tests, and the names of those that are not text.

    Raises `UserError` when there are none.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents, skipped = [], []
    for path in _python_files(root):
        name = path.relative_to(root).as_posix()
        try:
            text = _python_text(path.read_bytes())
        except (SyntaxError, UnicodeDecodeError, OSError):
            skipped.append(name)
        else:
            documents.append(Row(name, {"text": text}))
    if not documents:
        raise UserError(
            f"python-stdlib: {root} holds no .py files (a zipped Python?); use a full Python, or data.files"
        )
    return sorted(documents, key=lambda document: str(document.place)), sorted(skipped)


def _python_files(root: Path) -> Iterable[Path]:
    for folder, folders, files in os.walk(root):
        unwanted = _SKIPPED_FOLDERS | _GENERATED_FOLDERS
        folders[:] = [name for name in folders if name not in unwanted and not name.startswith(_BUILD_SPECIFIC)]
        for name in files:
            if name.endswith(".py") and not name.startswith(_BUILD_SPECIFIC):
                yield Path(folder, name)


def _python_text(data: bytes) -> str:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return _unix(data.decode(encoding))


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_documents(paths: Sequence[Path]) -> list[Row]:
    """One document of each file, named by its path below their common folder; one that is not UTF-8 is broken."""
    base = Path(os.path.commonpath([path.parent for path in paths]))
    documents = []
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            documents.append(Row(str(path), {}, f"not UTF-8 text (byte {error.start}), convert it"))
        except OSError as error:
            documents.append(Row(str(path), {}, f"cannot be read: {error.strerror}"))
        else:
            documents.append(Row(path.relative_to(base).as_posix(), {"text": _unix(text)}))
    return sorted(documents, key=lambda document: str(document.place))
