"""``key=value`` arguments laid over a parsed recipe; knows nothing of what the keys mean."""

from __future__ import annotations

from collections.abc import Sequence

from .yaml_places import Parsed, Path, dotted, parse


def apply_overrides(base: Parsed, overrides: Sequence[str]) -> None:
    """Sets each dotted key of `base` in place; problems and places are worded ``argument 2 (a.b=5)``.

    An argument is split at its first ``=``; the value is read as YAML, so ``[a, b]`` is a list and ``1e-4`` a number.
    """
    seen: dict[Path, int] = {}
    for number, argument in enumerate(overrides, 1):
        place = f"argument {number} ({argument})"
        key, equals, text = argument.partition("=")
        path: Path = tuple(key.strip().split("."))
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
    target = base.value
    for depth, part in enumerate(path[:-1], 1):
        if target.get(part) is None:
            target[part] = {}
            base.keys[path[:depth]] = base.values[path[:depth]] = place
        target = target[part]
        if not isinstance(target, dict):
            base.problems.append(f"{place}: {dotted(path[:depth])} holds a value, it has no keys below it")
            return
    target[path[-1]] = value.value
    for places in (base.keys, base.values):
        for stale in [known for known in places if known[: len(path)] == path]:
            del places[stale]
    base.keys[path] = base.values[path] = place
    for places, news in ((base.keys, value.keys), (base.values, value.values)):
        places.update({(*path, *sub): where for sub, where in news.items()})
