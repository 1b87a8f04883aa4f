"""A recipe as far as it could be read, and its problems with their locations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import RecipeError
from .schema import Recipe
from .yaml_places import Parsed, Problem
from .yaml_places import Path as KeyPath


@dataclass
class Draft:
    """A recipe as far as it could be read.

    Attributes:
        file: the recipe file.
        parsed: its values, base and overrides included, and their locations.
        framework: which dialect it is written in.
        recipe: an ``hf`` recipe; None while it has problems, and for Lightning.
        config: a LightningCLI config; None while it has problems, and for ``hf``.
        base: the file that ``base:`` names.
    """

    file: Path
    parsed: Parsed
    framework: Literal["hf", "lightning"] = "hf"
    recipe: Recipe | None = None
    config: dict[str, Any] | None = None
    base: Path | None = None

    @property
    def problems(self) -> list[Problem]:
        """Every problem so far, in the order of the text; those of the base and of arguments last."""
        return sorted(self.parsed.problems, key=lambda problem: problem.location)

    def add(self, path: KeyPath, message: str) -> None:
        """Notes a problem of the key at `path`, unless it has one already."""
        if path not in (problem.path for problem in self.parsed.problems):
            self.parsed.problems.append(Problem(self.parsed.location(path), path, message))

    def has_problem(self, path: KeyPath) -> bool:
        """Whether a problem was noted at `path` or below it."""
        return any(problem.path[: len(path)] == path for problem in self.parsed.problems)

    def raise_problems(self) -> None:
        """Raises `RecipeError` with all problems, if any."""
        if self.problems:
            raise RecipeError(self.problems)
