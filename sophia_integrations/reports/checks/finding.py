"""What a check has found: one sentence, where, and the lines of the recipe to edit."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipe_lines import Edit

SEVERITIES = ("error", "warning")
"""An error says that the run is worth nothing as it is, a warning that it could be better; in the order of reports."""


@dataclass(frozen=True)
class Finding:
    """One thing that is off.

    Attributes:
        check: which check found it, such as ``win-rate``.
        severity: one of `SEVERITIES`.
        sentence: what is off, with the figures that say so, and what it means.
        steps: where; the first and the last step of a stretch, or single steps.
        edits: of the recipe, best first; none where no line of a recipe mends it.
    """

    check: str
    severity: str
    sentence: str
    steps: tuple[int, ...] = ()
    edits: tuple[Edit, ...] = ()
