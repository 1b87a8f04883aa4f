"""The JSON Schema of ``hf`` recipes, for editors: our keys, and the words of the installed transformers and peft.

It is for completing and catching typos while writing; ``sophia validate`` knows more.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from . import signatures, sources, words
from .checks import NOT_HERE
from .schema import Recipe
from .wording import choices, enumerated, options

_KINDS = {
    int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null", dict: "object", list: "array",
}  # fmt: skip


def recipe_schema() -> dict[str, Any]:
    """The schema; its ``$comment`` names the versions whose words it holds."""
    schema = Recipe.model_json_schema()
    parts = [schema, *schema["$defs"].values()]
    for part in parts:
        part.pop("required", None)  # a base may give what is missing
        for item in part["properties"].values():
            item.pop("title", None)
            if item.get("default", "") is None:
                del item["default"]
            if all(option.keys() == {"type"} for option in item.get("anyOf", [{}])):
                item["type"] = [option["type"] for option in item.pop("anyOf")]
    schema["properties"]["base"] = {"type": "string", "description": "Another recipe, relative to this file, to lay this one over."}  # noqa: E501  # fmt: skip
    schema["properties"]["training"] = {
        "type": "object",
        "description": "transformers.TrainingArguments, word for word.",
        "properties": _training(),
        "additionalProperties": False,
    }
    schema["$defs"]["Model"]["properties"] |= {"config": model_config(), "peft": adapters()}
    return document(schema, "hf", ("transformers", "peft"))


def document(schema: dict[str, Any], framework: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """A whole schema: `schema` with its title and the versions of those `packages` that are installed."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages if sources.module(name) is not None)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": f"Made by sophia schema --framework {framework} with {versions}",
        **{key: value for key, value in schema.items() if key != "title"},
        "title": f"A recipe of sophia-integrations (framework: {framework})",
    }


def model_config() -> dict[str, Any]:
    """A transformers config: the kinds of model that it may name."""
    return {"type": ["object", "null"], "properties": {"model_type": {"enum": _all_types()}}}


def adapters() -> dict[str, Any]:
    """The words of `peft.LoraConfig`, as far as peft is installed."""
    lora = words.lora_words()
    if lora is None:
        return {"type": ["object", "null"]}
    described = _helps("peft.LoraConfig")
    keys = {name: property_of(name, kind, described) for name, kind in lora.items()}
    return {"type": ["object", "null"], "properties": keys, "additionalProperties": False}


def _training() -> dict[str, Any]:
    described = _helps("transformers.training_args.TrainingArguments")
    return {
        name: property_of(name, kind, described)
        for name, kind in words.training_words().items()
        if name not in NOT_HERE
    }


def _helps(dotted: str) -> dict[str, str]:
    source = sources.find(dotted)
    return signatures.helps(source) if source is not None else {}


def property_of(name: str, kind: Any, described: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The schema of one argument, of the type `kind`; {} where the type does not settle it."""
    found = _typed(kind, words.choices(name))
    if described and name in described:
        found["description"] = described[name]
    return found


def _typed(annotation: Any, more: tuple[str, ...] = ()) -> dict[str, Any]:
    parts = options(annotation)
    known = [*choices(annotation), *more] if choices(annotation) else []
    kinds: set[str] = set()  # typing gives Union[int, float] for Union[float, int] once the first was made
    for part in parts:
        origin = typing.get_origin(part) or part
        if origin in _KINDS and not (origin is str and enumerated(annotation)):
            kinds.add(_KINDS[origin])
        elif not known or origin is Any:
            return {}
    found = sorted(kinds)
    if not known:
        return {"type": found[0] if len(found) == 1 else found}
    return {"anyOf": [{"enum": known}, *({"type": kind} for kind in found)]} if found else {"enum": known}


def _all_types() -> list[str]:
    return sorted(set().union(*(words.model_types(task) or () for task in words.TASKS)))
