"""What lies over or under a recipe: the file that ``base:`` names, and ``key=value`` arguments.

Knows nothing of what the keys mean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

from ...errors import one_line
from .yaml_text import Location, Parsed, Path, Problem, dotted, parse, parse_file

BASE = "base"


def lay_over_base(recipe: Parsed, file: FilePath) -> None:
    """Replaces `recipe` by its base with `recipe` laid over it, each with its own locations.

    Mappings are merged, everything else is replaced.  The path of the base is relative to `file`; a base has none of
    its own.  What is wrong with the base is added to the problems of `recipe`.
    """
    if BASE not in recipe.value:
        return
    wanted = recipe.value.pop(BASE)
    if not isinstance(wanted, str) or not wanted:
        return recipe.add((BASE,), "expected the path of another recipe, relative to this file")
    path = file.parent / wanted
    try:
        under = parse_file(path, order=1)
    except (OSError, ValueError) as error:
        return recipe.add((BASE,), f"{str(path)!r} cannot be read: {one_line(error)}")
    if not isinstance(under.value, dict):
        if not under.problems:
            under.problems.append(Problem(Location(1, 1, 1, str(path)), (), "a recipe is a mapping of keys"))
        under.value = {}
    if BASE in under.value:
        del under.value[BASE]
        under.add((BASE,), "a base has no base of its own; write its keys here")
    recipe.problems.extend(under.problems)
    recipe.value = _merged(under.value, recipe.value)
    recipe.locations = {**under.locations, **recipe.locations}
    return None


def _merged(lower: Any, upper: Any) -> Any:
    if not isinstance(lower, dict) or not isinstance(upper, dict):
        return upper
    return {**lower, **{key: _merged(lower.get(key), value) for key, value in upper.items()}}


def apply_overrides(recipe: Parsed, overrides: Sequence[str]) -> None:
    """Sets each dotted key of `recipe` in place; problems and locations are worded ``argument 2 (a.b=5)``.

    An argument is split at its first ``=``; the value is read as YAML, so ``[a, b]`` is a list and ``1e-4`` a number.
    A number in the key counts the entries of a list from 0: ``data.files.0=…`` or ``data.files[0]=…``.
    """
    given: dict[str, int] = {}
    for number, argument in enumerate(overrides, 1):
        here = Location(2, number, 0, f"argument {number} ({argument})")
        key, equals, text = argument.partition("=")
        key = re.sub(r"\[(\d+)\]", r".\1", key.strip())
        value = parse(text, lambda line, column, here=here: here)
        if not equals or not all(key.split(".")):
            message = "expected key=value with dots in the key, such as training.max_steps=50"
        elif key in given:
            message = f"{key} is already set by argument {given[key]}; keep one"
        elif value.problems:
            message = f"{value.problems[0].message}; if it is meant as text, write it as {key}='\"…\"'"
        else:
            message = _set(recipe, key.split("."), value, here)
        given[key] = number
        if message:
            recipe.problems.append(Problem(here, (), message))


def _set(recipe: Parsed, parts: list[str], value: Parsed, here: Location) -> str:
    """Sets one key; returns what is wrong with it, or nothing."""
    path: Path = ()
    target = recipe.value
    for depth, part in enumerate(parts, 1):
        step: str | int = part
        if isinstance(target, list):
            if not part.isdecimal() or len(part) > 9 or int(part) >= len(target):
                return f"{dotted(path)} is a list with {len(target)} entries, counted from 0; it has no {part!r}"
            step = int(part)
        elif not isinstance(target, dict):
            return f"{dotted(path)} holds a value, it has no keys below it"
        path = (*path, step)
        if depth == len(parts):
            target[step] = value.value
        elif (target[step] if isinstance(target, list) else target.get(step)) is None:
            target[step] = {}
        else:
            target = target[step]
            continue
        recipe.locations[path] = here
        target = target[step]
    recipe.locations |= {(*path, *inner): here for inner in value.locations}
    return ""
