"""A recipe file and overrides to a checked `Recipe`, or every problem at once, each with its place.

``read`` is light (no torch, no transformers) and checks our own keys; ``check`` adds what only transformers can
judge: ``training``, ``model.config``, the optimizer's arguments.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from ...errors import RecipeError, UserError
from .overrides import apply_overrides
from .schema import Recipe, combination_problems
from .wording import did_you_mean, expected_found
from .yaml_places import Parsed, dotted, parse
from .yaml_places import Path as KeyPath


@dataclass
class Draft:
    """A recipe as far as it could be read: ``recipe`` is None when its own keys have problems."""

    file: Path
    parsed: Parsed
    problems: list[str] = field(default_factory=list)
    recipe: Recipe | None = None

    def add(self, path: KeyPath, message: str, *, key: bool = False) -> None:
        """Notes a problem of the key at `path`; `key` points at the key itself instead of its value."""
        where = self.parsed.place(path, key=key)
        self.problems.append(f"{where}: {dotted(path)}: {message}" if path else f"{where}: {message}")

    def raise_problems(self) -> None:
        """Raises `RecipeError` with all problems in the order of the text, if there are any."""
        if self.problems:
            raise RecipeError(sorted(self.problems, key=_position))


def _position(problem: str) -> tuple[bool, int, int]:
    argument = re.match(r"argument (\d+) \(", problem)
    if argument:
        return True, int(argument[1]), 0
    place = re.search(r":(\d+):(\d+): ", problem)
    return (False, int(place[1]), int(place[2])) if place else (False, 0, 0)


def read(file: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Draft:
    """Reads a recipe and checks our own keys.  Raises `UserError` only when there is no such text to read."""
    path = Path(file)
    parsed = parse(_text(path), lambda line, column: f"{path}:{line}:{column}")
    draft = Draft(path, parsed, parsed.problems)
    parsed.values.setdefault((), f"{path}:1:1")
    if parsed.value is None and not draft.problems:
        draft.add((), "the recipe is empty; it needs framework, task, model, tokenizer, data and training")
    elif not isinstance(parsed.value, dict) and not draft.problems:
        draft.add((), "a recipe is a mapping of keys, such as 'framework: hf'")
    if not isinstance(parsed.value, dict):
        return draft
    apply_overrides(parsed, overrides)
    for where, message in combination_problems(parsed.value):
        draft.add(where, message, key=True)
    try:
        recipe = Recipe.model_validate(parsed.value)
    except pydantic.ValidationError as error:
        for item in error.errors(include_url=False):
            _add_schema_problem(draft, item)
    else:
        if not draft.problems:
            draft.recipe = recipe
    return draft


def check(draft: Draft) -> Recipe:
    """The recipe, checked in full.  Raises `RecipeError` with every problem; imports transformers."""
    if isinstance(draft.parsed.value, dict):
        from .checks import check_files, check_model, check_training

        raw = draft.parsed.value
        training, model, data = raw.get("training"), raw.get("model"), raw.get("data")
        if isinstance(training, dict):
            check_training(training, draft)
        if isinstance(model, dict) and isinstance(model.get("config"), dict):
            check_model(raw, draft)
        if isinstance(data, dict):
            check_files(data, draft)
    draft.raise_problems()
    assert draft.recipe is not None
    return draft.recipe


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); a recipe is a YAML file") from None
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: there is no such recipe{_nearest_file(path)}") from None
    except IsADirectoryError:
        inside = sorted(path.rglob("*.yaml"))
        hint = f"; it holds {', '.join(str(item) for item in inside[:5])}" if inside else ""
        raise UserError(f"{path}: this is a folder, a recipe is a YAML file{hint}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _nearest_file(path: Path) -> str:
    known: dict[str, Path] = {}
    for root, pattern in ((path.parent, "*.yaml"), (Path("recipes"), "**/*.yaml"), (Path("."), "*.yaml")):
        for item in sorted(root.glob(pattern)):
            known.setdefault(item.stem, item)
    nearest = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.0)
    return f"; the nearest one here is {known[nearest[0]]}" if nearest else ""


def _add_schema_problem(draft: Draft, item: Any) -> None:
    path: KeyPath = tuple(item["loc"])
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(path[:-1])
        draft.add(path, f"unknown key{did_you_mean(str(path[-1]), known)}", key=True)
    elif kind == "missing":
        draft.add(path[:-1], f"the key {path[-1]!r} is missing", key=True)
    else:
        draft.add(path, expected_found(kind, context, item["input"]))


def _known_keys(path: KeyPath) -> list[str]:
    model: Any = Recipe
    for part in path:
        annotation = model.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(one for one in options if isinstance(one, type) and issubclass(one, pydantic.BaseModel))
    return list(model.model_fields)
