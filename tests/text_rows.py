"""Rows as a user wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def values(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of rows that were checked."""
    parts = ("text", "prompt", "completion", "messages", "label")
    found = [{part: row[part] for part in parts if part in row} for row in rows]
    return [{part: json.loads(v) if part in ("messages", "label") else v for part, v in row.items()} for row in found]
