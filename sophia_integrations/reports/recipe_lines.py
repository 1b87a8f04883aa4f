"""A resolved recipe with the lines of its keys, and the line to edit for a setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipes.reading.yaml_text import parse_file
from .places import Keys, at, is_lightning, path_of, value_of


@dataclass(frozen=True)
class Edit:
    """A line of a recipe to change.

    Attributes:
        key: dotted, such as ``training.learning_rate``; a bare name where there is no recipe.
        now, proposed: as the line would have them; `now` is None where it is not known.
        place: ``file:line`` of the key, or of what it would stand in; None without a recipe.
    """

    key: str
    now: str | None
    proposed: str
    place: str | None = None

    def __str__(self) -> str:
        change = f"{self.key}: {self.now} → {self.proposed}" if self.now else f"{self.key}: {self.proposed}"
        return f"{change}   ({self.place})" if self.place else change


@dataclass(frozen=True)
class RecipeLines:
    """A resolved recipe and the lines of its keys.

    Attributes:
        settings: the recipe; empty where there is none.
        places: ``file:line`` by path of keys, and of the items of lists.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[Keys, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> RecipeLines:
        """The recipe in `file`; empty where there is no such file; raises `UserError` when it is damaged."""
        if not file.is_file():
            return cls()
        try:
            parsed = parse_file(file)
        except ValueError:
            parsed = None
        if parsed is None or parsed.problems or not isinstance(parsed.value, dict):
            raise UserError(f"{file} is damaged; restore it, or take it away to go without the recipe")
        places = {path: f"{place.source}:{place.line}" for path, place in parsed.locations.items() if path}
        return cls(parsed.value, places)

    @property
    def found(self) -> bool:
        """Whether there is a recipe."""
        return bool(self.settings)

    @property
    def lightning(self) -> bool:
        """Whether it is a LightningCLI config."""
        return is_lightning(self.settings)

    @property
    def optimizer(self) -> str | None:
        """``training.optim``, or the class of a Lightning recipe's optimizer; None without a recipe."""
        if self.lightning:
            name = str(at(self.settings, ("model", "init_args", "optimizer", "class_path"))).rpartition(".")[2]
            return f"{name} in the eigenbasis" if self.value("basis") == "eigen" else name
        name = at(self.settings, ("training", "optim"))
        return name if name or not self.found else "adamw_torch_fused"

    def value(self, name: str) -> Any:
        """A setting by its name in `TrainingArguments` or of `SophiaG`; the default, else None, where it is not set."""
        if self.lightning and name.startswith("unclipped_"):
            both = value_of(self.settings, "unclipped")
            return both[name == "unclipped_end"] if both else None
        return value_of(self.settings, name)

    def edit(self, name: str, proposed: Any, now: Any = None) -> Edit:
        """The change of a setting to `proposed`; `now` says what it is where the recipe does not."""
        if self.lightning and name.startswith("unclipped_"):
            return Edit(name, None, _shown(proposed), self._place(path_of(self.settings, "unclipped")))
        path = path_of(self.settings, name)
        value = at(self.settings, path)
        shown = None if (value if value is not None else now) is None else _shown(value if value is not None else now)
        if not self.found:
            return Edit(name, shown, _shown(proposed))
        if "optim_args" in path:
            pair = f"{path[-1]}={{}}"
            now_pair = pair.format(shown) if shown else None
            return Edit("training.optim_args", now_pair, pair.format(_shown(proposed)), self._place(path[:-1]))
        return Edit(".".join(map(str, path)), shown, _shown(proposed), self._place(path))

    def _place(self, path: Keys) -> str | None:
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
