"""The figures of a measurement as text."""

from __future__ import annotations

from typing import Any

from ..markdown import table


def as_text(found: dict[str, Any]) -> str:
    """Markdown: the machine, the title, and a table of the rows."""
    machine = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = "" if machine["load"] is None else f", load {machine['load']}"
    lines = [
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads{load}",
        versions,
        "",
        found["title"],
        "",
    ]
    header = list(found["rows"][0])
    lines += table([header, *([_cell(row[name]) for name in header] for row in found["rows"])])
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)
