"""The settings that a report speaks of, found in either framework's resolved recipe, each with its line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipes.reading.yaml_text import parse_file

_OPTIMIZER = ("model", "init_args", "optimizer", "init_args")
_GROUPS = ("model", "init_args", "groups")
_HF: dict[str, tuple[str, ...]] = {
    "learning_rate": ("training", "learning_rate"),
    "warmup_steps": ("training", "warmup_steps"),
    "warmup_ratio": ("training", "warmup_ratio"),
    "max_grad_norm": ("training", "max_grad_norm"),
    "max_steps": ("training", "max_steps"),
    "fraction": ("training", "optim_args", "hessian_fraction"),
    "units": ("training", "optim_args", "hessian_units"),
    "basis": ("training", "optim_args", "basis"),
    "pretrained": ("model", "pretrained"),
    "peft": ("model", "peft"),
    **{
        name: ("training", "optim_args", name)
        for name in ("rho", "eps", "noise_floor", "hessian_interval", "unclipped_start", "unclipped_end")
    },
}
_LIGHTNING: dict[str, tuple[str, ...]] = {
    "learning_rate": (*_OPTIMIZER, "lr"),
    "warmup_steps": ("model", "init_args", "warmup_steps"),
    "max_grad_norm": ("trainer", "gradient_clip_val"),
    "max_steps": ("trainer", "max_steps"),
    "fraction": ("callback", "fraction"),
    "units": ("callback", "units"),
    "basis": (*_GROUPS, "basis"),
    "pretrained": ("model", "init_args", "pretrained"),
    "peft": ("model", "init_args", "peft"),
    "hessian_interval": (*_OPTIMIZER, "hessian_interval"),
    **{name: (*_GROUPS, name) for name in ("rho", "eps", "noise_floor", "unclipped")},
}
_DEFAULTS: dict[str, Any] = {"fraction": 0.0625, "units": 8, "hessian_interval": 10}
"""Of both frameworks; `rho` and `eps` depend on the optimizer."""


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
    """A resolved recipe as nested mappings, `optim_args` split, and the lines of its keys.

    Attributes:
        settings: the recipe; empty where there is none.
        places: ``file:line`` by path of keys, and of the items of lists.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[tuple[str | int, ...], str] = field(default_factory=dict)

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
        settings = dict(parsed.value)
        training = settings.get("training")
        if isinstance(training, dict) and isinstance(training.get("optim_args"), str):
            pairs = (part.partition("=") for part in training["optim_args"].split(",") if part)
            options = {key.strip(): _number(value.strip()) for key, _, value in pairs}
            settings["training"] = {**training, "optim_args": options}
        places = {path: f"{place.source}:{place.line}" for path, place in parsed.locations.items() if path}
        return cls(settings, places)

    @property
    def found(self) -> bool:
        """Whether there is a recipe."""
        return bool(self.settings)

    @property
    def lightning(self) -> bool:
        """Whether it is a LightningCLI config."""
        return "trainer" in self.settings

    @property
    def optimizer(self) -> str | None:
        """``training.optim``, or the class of a Lightning recipe's optimizer; None without a recipe."""
        if self.lightning:
            name = str(self._at(_OPTIMIZER[:-1] + ("class_path",))).rpartition(".")[2]
            return f"{name} in the eigenbasis" if self.value("basis") == "eigen" else name
        name = self._at(("training", "optim"))
        return name if name or not self.found else "adamw_torch_fused"

    def value(self, name: str) -> Any:
        """A setting by its name in `TrainingArguments` or of `SophiaG`; the default, else None, where it is not set."""
        value = self._at(self._path(name))
        if value is None and name.startswith("unclipped_") and self.lightning:
            both = self._at(self._path("unclipped"))
            value = both[name == "unclipped_end"] if both else None
        return _DEFAULTS.get(name) if value is None else value

    def edit(self, name: str, proposed: Any, now: Any = None) -> Edit:
        """The change of a setting to `proposed`; `now` says what it is where the recipe does not."""
        if self.lightning and name.startswith("unclipped_"):
            return Edit(name, None, _shown(proposed), self._place(self._path("unclipped")))
        path = self._path(name)
        value = self._at(path)
        shown = None if (value if value is not None else now) is None else _shown(value if value is not None else now)
        if not self.found:
            return Edit(name, shown, _shown(proposed))
        if "optim_args" in path:
            pair = f"{path[-1]}={{}}"
            now_pair = pair.format(shown) if shown else None
            return Edit("training.optim_args", now_pair, pair.format(_shown(proposed)), self._place(path[:-1]))
        return Edit(".".join(map(str, path)), shown, _shown(proposed), self._place(path))

    def _path(self, name: str) -> tuple[str | int, ...]:
        path: tuple[str | int, ...] = (_LIGHTNING if self.lightning else _HF).get(name, (name,))
        if path[: len(_GROUPS)] == _GROUPS and self._at(path) is None and not self._at(_GROUPS):
            return (*_OPTIMIZER, *path[len(_GROUPS) :])
        if path[0] != "callback":
            return path
        callbacks = self._at(("trainer", "callbacks")) or []
        ours = [i for i, c in enumerate(callbacks) if str(c.get("class_path", "")).endswith("SophiaCallback")]
        return ("trainer", "callbacks", ours[0] if ours else 0, "init_args", *path[1:])

    def _at(self, path: tuple[str | int, ...]) -> Any:
        value: Any = self.settings
        for key in path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def _place(self, path: tuple[str | int, ...]) -> str | None:
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path)


def _number(text: str) -> Any:
    try:
        return float(text) if set(text) & set(".eE") else int(text)
    except ValueError:
        return text


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
