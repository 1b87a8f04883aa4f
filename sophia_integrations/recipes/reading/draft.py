"""A recipe as far as it could be read, and its problems with their places."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import RecipeError
from .schema import Recipe
from .yaml_places import Parsed, dotted
from .yaml_places import Path as KeyPath


@dataclass
class Draft:
    """A recipe as far as it could be read.

    Attributes:
        file: the recipe file.
        parsed: its values, base and overrides included, and their places.
        problems: one line each.
        framework: which dialect it is written in.
        recipe: an ``hf`` recipe; None while it has problems, and for Lightning.
        config: a LightningCLI config; None while it has problems, and for ``hf``.
        base: the file that ``base:`` names.
    """

    file: Path
    parsed: Parsed
    problems: list[str] = field(default_factory=list)
    framework: Literal["hf", "lightning"] = "hf"
    recipe: Recipe | None = None
    config: dict[str, Any] | None = None
    base: Path | None = None
    _paths: set[KeyPath] = field(default_factory=set)

    def add(self, path: KeyPath, message: str, *, key: bool = False) -> None:
        """Notes a problem of the key at `path`; `key` points at the key itself instead of its value."""
        if path in self.parsed.unread:
            return
        where = self.parsed.place(path, key=key)
        self.problems.append(f"{where}: {dotted(path)}: {message}" if path else f"{where}: {message}")
        self._paths.add(path)

    def has_problem(self, path: KeyPath) -> bool:
        """Whether a problem was added at `path` or below it."""
        return any(known[: len(path)] == path for known in self._paths)

    def raise_problems(self) -> None:
        """Raises `RecipeError` with all problems, if any: in the order of the text, base and arguments last."""
        if self.problems:
            raise RecipeError(sorted(dict.fromkeys(self.problems), key=self._position))

    def _position(self, problem: str) -> tuple[int, int, int]:
        argument = re.match(r"argument (\d+) \(", problem)
        if argument:
            return 2, int(argument[1]), 0
        place = re.match(rf"({re.escape(str(self.file))})?.*?:(\d+):(\d+): ", problem)
        return (0 if place[1] else 1, int(place[2]), int(place[3])) if place else (0, 0, 0)
