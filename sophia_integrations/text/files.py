"""File patterns: which files they name, and of which one kind those are."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

ROW_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Suffixes of files whose rows are documents or examples; any other file is one document of text."""


def absolute_globs(patterns: Sequence[str], folder: Path) -> list[str]:
    """Patterns relative to `folder` as absolute ones, so that a resolved recipe works from anywhere."""
    base = glob.escape(str(folder))
    return [os.path.normpath(os.path.join(base, os.path.expanduser(pattern))) for pattern in patterns]


def matches(pattern: str) -> list[Path]:
    """The files that a pattern names; ``**`` crosses folders, ``~`` is the home folder."""
    hits = glob.glob(os.path.expanduser(pattern), recursive=True)
    return [Path(hit) for hit in hits if os.path.isfile(hit)]


def find(patterns: Sequence[str], key: str) -> list[Path]:
    """All files of `patterns`, sorted; raises `UserError` about `key` when one of them names no file."""
    found: set[Path] = set()
    for pattern in patterns:
        hits = matches(pattern)
        if not hits:
            raise UserError(f"{key}: no file matches {pattern}")
        found.update(hit.resolve() for hit in hits)
    return sorted(found)


def kind_of(paths: Sequence[Path], key: str) -> str:
    """The one kind of `paths`: "text", or what `ROW_KINDS` says; raises `UserError` when they are mixed."""
    kinds = {ROW_KINDS.get(path.suffix.lower(), "text"): path for path in reversed(paths)}
    if len(kinds) > 1:
        shown = " and ".join(f"{kind} ({path.name})" for kind, path in sorted(kinds.items()))
        raise UserError(f"{key}: the files are {shown}; give files of one kind")
    return next(iter(kinds))
