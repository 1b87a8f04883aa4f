"""Where results that can be made again are kept: one folder for each user."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$SOPHIA_CACHE``, or ``sophia-integrations`` in the user's cache folder (``~/.cache`` by default)."""
    if os.environ.get("SOPHIA_CACHE"):
        return Path(os.environ["SOPHIA_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sophia-integrations"
