"""A folder of results that can be made again: found by content, written aside and then renamed."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from ..cache import cache_dir


def digest(parts: Iterable[str | bytes]) -> str:
    """SHA-256, in hexadecimal, of a sequence of texts; different splits of the same text differ."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big"))
        total.update(data)
    return total.hexdigest()


def write_aside(target: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `target`, then renames it: a reader sees all of it or nothing.

    Raises `OSError` when the folder cannot be written; nothing is left behind then.
    """
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    aside = Path(name)
    try:
        write(aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def store(name: str, write: Callable[[Path], object], say: Callable[[str], object]) -> bool:
    """Stores one cache entry, and says whether; a cache that cannot be written costs time, never the run."""
    target = cache_dir() / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_aside(target, write)
    except OSError as error:
        say(f"Cache: {cache_dir()} cannot be written ({error.strerror}); going on without it.")
        return False
    return True
