"""A recipe file and overrides to a checked recipe, or every problem at once, each with its location.

``read`` is light once the JSON Schema of the installed frameworks is known: it imports and runs nothing of theirs or of
the recipe's.  ``check`` adds what only the frameworks' own constructors can judge.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..catalog import find
from .draft import Draft
from .known import document
from .layers import BASE, apply_overrides, lay_over_base
from .lightning import is_lightning
from .problems import problems
from .rules import broken_rules
from .schema import Recipe
from .yaml_places import Location, Parsed, parse_file


def read(file: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Draft:
    """Reads a recipe and makes every light check.

    Args:
        file: a path, or the name of a shipped recipe, such as ``hf/pretrain-gpt2-stdlib``.
        overrides: ``key=value`` with dots in the key.

    Raises:
        UserError: there is no such text to read.
    """
    path = find(file)
    parsed = _parse(path)
    parsed.locations[()] = Location(0, 1, 1, str(path))
    draft = Draft(path, parsed)
    if not isinstance(parsed.value, dict):
        if not draft.problems:
            empty = "the recipe is empty; it needs framework, task, model, tokenizer, data and training"
            draft.add((), empty if parsed.value is None else "a recipe is a mapping of keys, such as 'framework: hf'")
        return draft
    draft.base = lay_over_base(parsed, path)
    apply_overrides(parsed, overrides)
    if parsed.value.pop(BASE, None) is not None:
        draft.add((BASE,), "a base is named in the file, not in an argument")
    draft.framework = "lightning" if is_lightning(parsed.value) else "hf"
    _judge(parsed.value, draft)
    return draft


def check(draft: Draft) -> Recipe:
    """The recipe, checked in full; for the Lightning dialect `draft.config` is what was checked.

    Raises:
        RecipeError: every problem; the frameworks are imported to find them.
    """
    if isinstance(draft.parsed.value, dict):
        from .construct import construct, construct_lightning

        (construct_lightning if draft.framework == "lightning" else construct)(draft.parsed.value, draft)
    draft.raise_problems()
    return draft.recipe  # type: ignore[return-value]


def _parse(path: Path) -> Parsed:
    try:
        return parse_file(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); a recipe is a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _judge(raw: dict[str, Any], draft: Draft) -> None:
    schema = document(draft.framework, _model_type(raw, draft.framework))
    for where, message in (*problems(schema, raw), *broken_rules(raw, draft.framework)):
        draft.add(where, message)
    if draft.problems:
        return
    if draft.framework == "lightning":
        draft.config = {key: value for key, value in raw.items() if key != "framework"}
    else:
        draft.recipe = Recipe.model_validate(raw)


def _model_type(raw: dict[str, Any], framework: str) -> str | None:
    """The kind of model of a new model's config; None where there is none."""
    value: Any = raw.get("model")
    for key in ("init_args", "config", "model_type") if framework == "lightning" else ("config", "model_type"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else None
