"""Where results that can be made again are kept, one folder for each user; how they are named and written."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def cache_dir() -> Path:
    """``$SOPHIA_CACHE``, or ``sophia-integrations`` in the user's cache folder (``~/.cache`` by default)."""
    if os.environ.get("SOPHIA_CACHE"):
        return Path(os.environ["SOPHIA_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sophia-integrations"


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
