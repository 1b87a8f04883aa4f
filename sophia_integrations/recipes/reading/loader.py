"""A recipe file and overrides to a checked recipe, or every problem at once, each with its place.

``read`` is light (no torch, no transformers, nothing of the recipe is run): our own keys, and the frameworks' words as
their installed text defines them.  ``check`` adds what only the frameworks' own constructors can judge.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from ...errors import UserError
from ..catalog import find
from .base import KEY, lay_over_base
from .checks import check_framework_words
from .combinations import combination_problems
from .draft import Draft
from .homes import TOP, unknown_key
from .lightning import check_lightning_words, is_lightning
from .overrides import apply_overrides
from .schema import Recipe
from .wording import expected_found
from .yaml_places import Parsed, dotted, parse_file
from .yaml_places import Path as KeyPath


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
    draft = Draft(path, parsed, parsed.problems)
    parsed.values.setdefault((), f"{path}:1:1")
    if parsed.value is None and not draft.problems:
        draft.add((), "the recipe is empty; it needs framework, task, model, tokenizer, data and training")
    elif not isinstance(parsed.value, dict) and not draft.problems:
        draft.add((), "a recipe is a mapping of keys, such as 'framework: hf'")
    if not isinstance(parsed.value, dict):
        return draft
    draft.base = lay_over_base(parsed, path)
    apply_overrides(parsed, overrides)
    if KEY in parsed.value:
        draft.add((KEY,), "a base is named in the file, not in an argument", key=True)
        del parsed.value[KEY]
    if is_lightning(parsed.value):
        draft.framework = "lightning"
        check_lightning_words(parsed.value, draft)
        if not draft.problems:
            draft.config = {key: value for key, value in parsed.value.items() if key != "framework"}
    else:
        _check_hf(parsed.value, draft)
    return draft


def check(draft: Draft) -> Recipe:
    """The recipe, checked in full; for the Lightning dialect `draft.config` is what was checked.

    Raises:
        RecipeError: every problem; the frameworks are imported to find them.
    """
    if isinstance(draft.parsed.value, dict):
        if draft.framework == "lightning":
            from .lightning_types import check_lightning_types

            check_lightning_types(draft.parsed.value, draft)
        else:
            from .constructors import construct

            construct(draft.parsed.value, draft)
    draft.raise_problems()
    return draft.recipe  # type: ignore[return-value]


def _parse(path: Path) -> Parsed:
    try:
        return parse_file(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); a recipe is a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _check_hf(raw: dict[str, Any], draft: Draft) -> None:
    for where, message in combination_problems(raw):
        draft.add(where, message, key=True)
    try:
        recipe = Recipe.model_validate(raw)
    except pydantic.ValidationError as error:
        for item in error.errors(include_url=False):
            _add_schema_problem(draft, item, raw)
        recipe = None
    check_framework_words(raw, draft)
    if not draft.problems:
        draft.recipe = recipe


def _add_schema_problem(draft: Draft, item: Any, raw: dict[str, Any]) -> None:
    path: KeyPath = tuple(item["loc"])
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        section = dotted(path[:-1]) or TOP
        draft.add(path, unknown_key(str(path[-1]), section, set(_known_keys(path[:-1])), raw), key=True)
    elif kind == "missing":
        such = ", such as framework: hf" if path == ("framework",) else ""
        draft.add(path[:-1], f"the key {path[-1]!r} is missing{such}", key=True)
    elif path == ("framework",):
        draft.add(path, expected_found(kind, {"expected": "'hf' or 'lightning'"}, item["input"]))
    else:
        draft.add(path, expected_found(kind, context, item["input"]))


def _known_keys(path: KeyPath) -> list[str]:
    model: Any = Recipe
    for part in path:
        annotation = model.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(one for one in options if isinstance(one, type) and issubclass(one, pydantic.BaseModel))
    return list(model.model_fields)
