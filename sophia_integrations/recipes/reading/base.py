"""``base: other.yaml``: a recipe laid over another one, a single level deep; knows nothing of what the keys mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .yaml_places import Parsed, parse_file

KEY = "base"


def lay_over_base(recipe: Parsed, file: Path) -> Path | None:
    """Replaces `recipe` by its base with `recipe` laid over it, both with their own places; returns the base's file.

    Mappings are merged, everything else is replaced.  The path of the base is relative to `file`.  What is wrong with
    the base is added to the problems of `recipe`.
    """
    if not isinstance(recipe.value, dict) or KEY not in recipe.value:
        return None
    wanted = recipe.value.pop(KEY)
    place = recipe.values[(KEY,)]
    if not isinstance(wanted, str) or not wanted:
        recipe.problems.append(f"{place}: {KEY}: expected the path of another recipe, relative to this file")
        return None
    path = file.parent / wanted
    try:
        under = parse_file(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        recipe.problems.append(f"{place}: {KEY}: {str(path)!r} cannot be read: {reason}")
        return None
    recipe.problems.extend(under.problems)
    if not isinstance(under.value, dict):
        if not under.problems:
            recipe.problems.append(f"{path}:1:1: a recipe is a mapping of keys, such as 'framework: hf'")
        return path
    if KEY in under.value:
        recipe.problems.append(f"{under.keys[(KEY,)]}: {KEY}: a base has no base of its own; write its keys here")
        del under.value[KEY]
    _lay(under, recipe)
    return path


def _lay(under: Parsed, over: Parsed) -> None:
    """Merges into `over`, whose places win wherever it says something."""
    over.value = _merged(under.value, over.value)
    over.keys = {**under.keys, **over.keys}
    over.values = {**under.values, **over.values}
    over.unread |= under.unread


def _merged(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    both = {key for key, value in upper.items() if isinstance(value, dict) and isinstance(lower.get(key), dict)}
    return {**lower, **{key: _merged(lower[key], value) if key in both else value for key, value in upper.items()}}
