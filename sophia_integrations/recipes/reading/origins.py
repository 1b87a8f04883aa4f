"""A checked recipe as YAML, and where each value comes from: a line of the file or its base, an argument, a default."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import yaml

from .draft import Draft
from .yaml_places import Path, RecipeDumper

_WIDEST = 76  # where the comments stand at most, however long one value is


def describe_origins(draft: Draft) -> str:
    """The resolved recipe, runnable as it is; each value's origin stands in a comment behind it.

    Args:
        draft: a recipe without problems.
    """
    values = draft.config if draft.recipe is None else draft.recipe.settings()
    assert values is not None
    lines = _mapping(values, (), draft)
    column = min(max((len(text) for text, origin in lines if origin), default=0), _WIDEST)
    files = [draft.file] if draft.base is None else [draft.file, draft.base]
    head = f"# {draft.file}" + (f", laid over {draft.base}" if draft.base is not None else "")
    body = [f"{text:<{column}}  # {_shown(origin, files)}" if origin else text for text, origin in lines]
    return "\n".join([head, *body]) + "\n"


Lines = list[tuple[str, str]]


def _mapping(values: dict[str, Any], path: Path, draft: Draft) -> Lines:
    lines: Lines = []
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, dict) and value:
            lines += [(f"{_scalar(key)}:", ""), *_indented(_mapping(value, here, draft))]
        elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            lines.append((f"{_scalar(key)}:", ""))
            for index, entry in enumerate(value):
                lines += _indented(_entry(entry, (*here, index), draft))
        else:
            lines.append((f"{_scalar(key)}: {_scalar(value)}", _origin(here, draft)))
    return lines


def _entry(value: Any, path: Path, draft: Draft) -> Lines:
    if not isinstance(value, dict) or not value:
        return [(f"- {_scalar(value)}", _origin(path, draft))]
    (first, origin), *rest = _mapping(value, path, draft)
    return [(f"- {first}", origin), *_indented(rest)]


def _indented(lines: Lines) -> Lines:
    return [(f"  {text}", origin) for text, origin in lines]


def _scalar(value: Any) -> str:
    text = yaml.dump(value, Dumper=RecipeDumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _origin(path: Path, draft: Draft) -> str:
    return draft.parsed.values.get(path, "default")


def _shown(origin: str, files: list[FilePath]) -> str:
    if origin.startswith("argument "):
        return origin.partition(" (")[0]
    names = [file.name for file in files]
    for file in files:
        if origin.startswith(f"{file}:"):
            line = origin.removeprefix(f"{file}:").partition(":")[0]
            return f"{file.name if names.count(file.name) == 1 else file}:{line}"
    return origin
