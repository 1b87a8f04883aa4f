"""A recipe file and overrides to a checked recipe, or every problem at once, each with its location.

Light once the JSON Schema of the installed frameworks is known: nothing of theirs or of the recipe's is imported or
run.  What only a constructor can judge, the run says when it constructs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RecipeError, UserError
from ..catalog import find
from .layers import BASE, apply_overrides, lay_over_base
from .problems import problems
from .rules import broken_rules
from .schema import Recipe
from .schema_cache import document
from .yaml_text import Location, Parsed, parse_file


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe without problems, of either framework.

    Attributes:
        file: where it was read.
        settings: plain values, with its base, the overrides and our defaults; for Lightning a LightningCLI config.
        recipe: the same for the Trainer's runner; None for Lightning.
    """

    file: Path
    settings: dict[str, Any]
    recipe: Recipe | None = None


def read(file: str | os.PathLike[str], overrides: Sequence[str] = ()) -> CheckedRecipe:
    """Reads and checks a recipe.

    Args:
        file: a path, or the name of a shipped recipe, such as ``hf/pretrain-gpt2-stdlib``.
        overrides: ``key=value`` with dots in the key.

    Raises:
        UserError: there is no such text to read.
        RecipeError: every problem, in the order of the text; those of the base and of arguments last.
    """
    path = find(file)
    parsed = _parse(path)
    parsed.locations[()] = Location(0, 1, 1, str(path))
    lightning = False
    if isinstance(parsed.value, dict):
        lay_over_base(parsed, path)
        apply_overrides(parsed, overrides)
        if parsed.value.pop(BASE, None) is not None:
            parsed.add((BASE,), "a base is named in the file, not in an argument")
        lightning = is_lightning(parsed.value)
        _judge(parsed, "lightning" if lightning else "hf")
    elif not parsed.problems:
        empty = "the recipe is empty; it needs framework, task, model, tokenizer, data and training"
        parsed.add((), empty if parsed.value is None else "a recipe is a mapping of keys, such as 'framework: hf'")
    if parsed.problems:
        raise RecipeError(sorted(parsed.problems, key=lambda problem: problem.location))
    if lightning:
        return CheckedRecipe(path, {key: value for key, value in parsed.value.items() if key != "framework"})
    recipe = Recipe.model_validate(parsed.value)
    return CheckedRecipe(path, recipe.settings(), recipe)


def is_lightning(raw: dict[str, Any]) -> bool:
    """Whether a recipe is meant as a LightningCLI config: it says so, or it has a ``trainer`` or no ``training``."""
    if raw.get("framework") in ("hf", "lightning"):
        return raw["framework"] == "lightning"
    return "trainer" in raw or "training" not in raw


def _parse(path: Path) -> Parsed:
    try:
        return parse_file(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); a recipe is a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _judge(parsed: Parsed, framework: str) -> None:
    raw = parsed.value
    schema = document(framework, _model_type(raw, framework))
    for where, message in (*problems(schema, raw), *broken_rules(raw, framework)):
        parsed.add(where, message)


def _model_type(raw: dict[str, Any], framework: str) -> str | None:
    """The kind of model of a new model's config; None where there is none."""
    value: Any = raw.get("model")
    for key in ("init_args", "config", "model_type") if framework == "lightning" else ("config", "model_type"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else None
