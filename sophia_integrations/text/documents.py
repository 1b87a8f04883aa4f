"""Text documents and their split into training and validation, the same on every machine; never tokens.

A document is one file.  It is held out or not by a hash of its name alone, so adding a file never moves another.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from .cache import digest

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_GENERATED_FOLDERS = {
    "encodings",
    "pydoc_data",
}  # character tables and the language reference as data, not code
_BUILD_SPECIFIC = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Document:
    """One file: `name` is its path relative to the source, with ``/``; `text` has ``\\n`` line ends."""

    name: str
    text: str


@dataclass
class Corpus:
    """Documents of both splits in the order of their names, and the names of files that are not text."""

    train: list[Document]
    validation: list[Document]
    skipped: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """Identifies the text and its split."""
        parts: list[str] = []
        for split in (self.train, self.validation):
            parts.append(str(len(split)))
            parts.extend(part for document in split for part in (document.name, document.text))
        return digest(parts)


def load_corpus(
    *,
    source: str | None = None,
    files: Sequence[str] | None = None,
    validation_files: Sequence[str] | None = None,
    validation_fraction: float = 0.05,
) -> Corpus:
    """Reads the documents of `source` ("python-stdlib") or `files`; `UserError` when a split would be empty."""
    if source == "python-stdlib":
        corpus = _standard_library(validation_fraction)
        origin = f"the standard library in {sysconfig.get_path('stdlib')}"
    else:
        assert files is not None
        origin = f"data.files ({', '.join(files)})"
        found = _matches(files, "data.files")
        if validation_files is None:
            corpus = split(_read_all(found), validation_fraction)
        else:
            held = _matches(validation_files, "data.validation_files")
            shared = sorted(set(found) & set(held))
            if shared:
                raise UserError(f"data.validation_files: {shared[0]} is also in data.files; a file may be in one only")
            corpus = Corpus(_read_all(found), _read_all(held))
    if not any(document.text for document in corpus.train):
        raise UserError(f"{origin}: there is no text to train on")
    if not any(document.text for document in corpus.validation):
        raise UserError(
            f"{origin}: none of its {len(corpus.train)} file(s) is held out at validation_fraction "
            f"{validation_fraction:g}; name some in data.validation_files, give more files, or raise the fraction"
        )
    return corpus


def held_out(name: str, fraction: float) -> bool:
    """Whether the document `name` belongs to validation: a fixed hash of the name falls below `fraction`."""
    number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return number < fraction * 2**64


def split(documents: Sequence[Document], fraction: float) -> Corpus:
    """Divides documents by `held_out`, keeping their order."""
    corpus = Corpus([], [])
    for document in documents:
        (corpus.validation if held_out(document.name, fraction) else corpus.train).append(document)
    return corpus


def _standard_library(fraction: float) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    documents, skipped = [], []
    for path in _python_files(root):
        name = path.relative_to(root).as_posix()
        try:
            text = _python_text(path.read_bytes())
        except (SyntaxError, UnicodeDecodeError, OSError):
            skipped.append(name)
        else:
            documents.append(Document(name, text))
    documents.sort(key=lambda document: document.name)
    if not documents:
        raise UserError(
            f"python-stdlib: {root} holds no .py files (a zipped Python?); use a full Python, or data.files"
        )
    corpus = split(documents, fraction)
    corpus.skipped = sorted(skipped)
    return corpus


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


def absolute_globs(patterns: Sequence[str], folder: Path) -> list[str]:
    """Patterns relative to `folder` as absolute ones, so that a resolved recipe works from anywhere."""
    base = glob.escape(str(folder))
    return [os.path.normpath(os.path.join(base, os.path.expanduser(pattern))) for pattern in patterns]


def matches(pattern: str) -> list[Path]:
    """The files that a pattern names; ``**`` crosses folders, ``~`` is the home folder."""
    hits = glob.glob(os.path.expanduser(pattern), recursive=True)
    return [Path(hit) for hit in hits if os.path.isfile(hit)]


def _matches(patterns: Sequence[str], key: str) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        hits = matches(pattern)
        if not hits:
            raise UserError(f"{key}: no file matches {pattern}")
        found.update(hit.resolve() for hit in hits)
    return sorted(found)


def _read_all(paths: Sequence[Path]) -> list[Document]:
    base = Path(os.path.commonpath([path.parent for path in paths]))
    documents = []
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert it or leave it out") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        documents.append(Document(path.relative_to(base).as_posix(), _unix(text)))
    return sorted(documents, key=lambda document: document.name)
