"""The figures of a measurement as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..markdown import table


def as_text(found: dict[str, Any]) -> str:
    """Markdown: the machine, the title, and a table of the rows."""
    machine = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        machine_line(machine),
        versions,
        "",
        found["title"],
        "",
    ]
    header = list(found["rows"][0])
    lines += table([header, *([_cell(row[name]) for name in header] for row in found["rows"])])
    return "\n".join(lines)


def machine_line(machine: Mapping[str, Any]) -> str:
    """What `timing.machine` says, such as ``some processor, 2 cores, 1 thread, load 1.2``."""
    counts = [f"{n} {what}{'' if n == 1 else 's'}" for what in ("core", "thread") if (n := machine[f"{what}s"])]
    load = [] if machine["load"] is None else [f"load {machine['load']}"]
    return ", ".join([machine["device"], *counts, *load])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)
