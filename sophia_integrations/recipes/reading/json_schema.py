"""The JSON Schema of ``hf`` recipes, for editors: our keys, and the words of the installed transformers and peft.

It is for completing and catching typos while writing; ``sophia validate`` knows more.
"""

from __future__ import annotations

import json
import typing
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
    model = schema["$defs"]["Model"]["properties"]
    model["config"] = {"type": ["object", "null"], "properties": {"model_type": {"enum": _all_types()}}}
    lora = words.lora_words()
    if lora is not None:
        described = _helps("peft.LoraConfig")
        keys = {name: _property(name, kind, described) for name, kind in lora.items()}
        model["peft"] = {"type": ["object", "null"], "properties": keys, "additionalProperties": False}
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _installed())
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": f"Made by sophia schema with {versions}",
        **{key: value for key, value in schema.items() if key != "title"},
        "title": "A recipe of sophia-integrations (framework: hf)",
    }


def schema_text() -> str:
    """The schema as the text of a file."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def _installed() -> list[str]:
    return [name for name in ("transformers", "peft") if sources.module(name) is not None]


def _training() -> dict[str, Any]:
    described = _helps("transformers.training_args.TrainingArguments")
    return {
        name: _property(name, kind, described) for name, kind in words.training_words().items() if name not in NOT_HERE
    }


def _helps(dotted: str) -> dict[str, str]:
    source = sources.find(dotted)
    return signatures.helps(source) if source is not None else {}


def _property(name: str, kind: Any, described: dict[str, str]) -> dict[str, Any]:
    found = _typed(kind, words.choices(name))
    if name in described:
        found["description"] = described[name]
    return found


def _typed(annotation: Any, more: tuple[str, ...] = ()) -> dict[str, Any]:
    parts = options(annotation)
    known = [*choices(annotation), *more] if choices(annotation) else []
    kinds = []
    for part in parts:
        origin = typing.get_origin(part) or part
        if origin in _KINDS and not (origin is str and enumerated(annotation)):
            kinds.append(_KINDS[origin])
        elif not known or origin is Any:
            return {}
    if not known:
        return {"type": kinds[0] if len(kinds) == 1 else kinds}
    return {"anyOf": [{"enum": known}, *({"type": kind} for kind in kinds)]} if kinds else {"enum": known}


def _all_types() -> list[str]:
    return sorted(set().union(*(words.model_types(task) or () for task in words.TASKS)))
