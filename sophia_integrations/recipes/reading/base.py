"""``base: other.yaml``: a recipe laid over another one, a single level deep; knows nothing of what the keys mean."""

from __future__ import annotations

from pathlib import Path as FilePath

from .yaml_places import Parsed, Path, parse_file

KEY = "base"


def lay_over_base(recipe: Parsed, file: FilePath) -> FilePath | None:
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
    replaced: list[Path] = []

    def merge(lower: dict, upper: dict, path: Path) -> dict:
        merged = dict(lower)
        for key, value in upper.items():
            here = (*path, key)
            if isinstance(value, dict) and isinstance(lower.get(key), dict):
                merged[key] = merge(lower[key], value, here)
            else:
                replaced.append(here)
                merged[key] = value
        return merged

    over.value = merge(under.value, over.value, ())
    for lower, upper in ((under.keys, over.keys), (under.values, over.values)):
        kept = {path: place for path, place in lower.items() if not any(path[: len(cut)] == cut for cut in replaced)}
        upper.update({**kept, **upper})
