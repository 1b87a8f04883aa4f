"""Reading ``metrics.jsonl``: light, so that reports can do it without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics file, oldest first; a line torn by a crash is left out, a missing file is empty."""
    if not path.is_file():
        return []
    events = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(text)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            events.append(event)
    return events
