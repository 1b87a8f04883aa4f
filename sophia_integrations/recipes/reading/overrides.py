"""``key=value`` arguments laid over a parsed recipe; knows nothing of what the keys mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .yaml_places import Parsed, Path, dotted, parse


def apply_overrides(base: Parsed, overrides: Sequence[str]) -> None:
    """Sets each dotted key of `base` in place; problems and places are worded ``argument 2 (a.b=5)``.

    An argument is split at its first ``=``; the value is read as YAML, so ``[a, b]`` is a list and ``1e-4`` a number.
    A number in the key counts the entries of a list from 0: ``data.files.0=…`` or ``data.files[0]=…``.
    """
    seen: dict[Path, int] = {}
    for number, argument in enumerate(overrides, 1):
        place = f"argument {number} ({argument})"
        key, equals, text = argument.partition("=")
        path: Path = tuple(re.sub(r"\[(\d+)\]", r".\1", key.strip()).split("."))
        if not equals or not all(path):
            base.problems.append(f"{place}: expected key=value with dots in the key, such as training.max_steps=50")
            continue
        if path in seen:
            base.problems.append(f"{place}: {key} is already set by argument {seen[path]}; keep one")
            continue
        seen[path] = number
        value = parse(text, lambda line, column, place=place: place)
        if value.problems:
            quoting = "; if it is meant as text, write it as " + f"{key}='\"…\"'"
            base.problems.extend(problem + quoting for problem in value.problems)
            continue
        _set(base, path, value, place)


def _set(base: Parsed, path: Path, value: Parsed, place: str) -> None:
    if not isinstance(base.value, dict):
        return  # the loader reports a recipe that is not a mapping
    target, here = base.value, ()
    for part, following in zip(path, path[1:], strict=False):
        found = _entry(base, target, here, part, place)
        if found is None:
            return
        key, inner = found
        here = (*here, key)
        if inner is None and following.isdecimal():
            base.problems.append(
                f"{place}: {dotted(here)} has no entries; give the whole list, as {dotted(here)}=[a, b]"
            )
            return
        if inner is None:
            target[key] = inner = {}
            base.keys[here] = base.values[here] = place
        target = inner
    found = _entry(base, target, here, path[-1], place)
    if found is None:
        return
    here = (*here, found[0])
    target[found[0]] = value.value
    base.keys[here] = base.values[here] = place
    for places, news in ((base.keys, value.keys), (base.values, value.values)):
        places.update({(*here, *sub): where for sub, where in news.items()})


def _entry(base: Parsed, target: Any, here: Path, part: str, place: str) -> tuple[str | int, Any] | None:
    """The key or index that `part` means in `target`, and what is there now; None after noting a problem."""
    if isinstance(target, dict):
        return part, target.get(part)
    if not isinstance(target, list):
        base.problems.append(f"{place}: {dotted(here)} holds a value, it has no keys below it")
    elif not part.isdecimal() or len(part) > 9 or int(part) >= len(target):
        base.problems.append(f"{place}: {dotted(here)} is a list with the entries {_span(len(target))}, not {part!r}")
    else:
        return int(part), target[int(part)]
    return None


def _span(length: int) -> str:
    return f"0 to {length - 1}" if length else "(none)"
