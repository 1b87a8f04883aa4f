"""Python's types and signatures as JSON Schema: what a constructor of an installed package takes."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

Schema = dict[str, Any]

_KINDS = {
    int: "integer", float: "number", bool: "boolean", str: "string", Path: "string", timedelta: "string",
    type(None): "null", dict: "object", Mapping: "object",
    list: "array", tuple: "array", Sequence: "array", Iterable: "array",
}  # fmt: skip


def arguments(chosen: type) -> tuple[dict[str, Schema], list[str]]:
    """The JSON Schema of each argument of a constructor by its name, and the names of those that have no default."""
    hints = {name: hint for owner in reversed(chosen.__mro__) for name, hint in _hints(owner).items()}
    helps = {item.name: item.metadata.get("help") for item in _fields(chosen)}
    properties, required = {}, []
    for name, parameter in inspect.signature(chosen).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name.startswith("_"):
            continue
        properties[name] = schema_of(hints.get(name, Any))
        if helps.get(name):
            first_sentence = re.split(r"(?<=[.?!])\s", " ".join(helps[name].split()), maxsplit=1)[0]
            properties[name]["description"] = first_sentence
        if parameter.default is parameter.empty:
            required.append(name)
    return properties, required


def _fields(chosen: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(chosen) if dataclasses.is_dataclass(chosen) else ()


def _hints(owner: type) -> dict[str, Any]:
    """The types of a class's own arguments; none where an annotation names what exists for type checkers only."""
    import torch

    try:
        return typing.get_type_hints(owner if _fields(owner) else owner.__init__, localns={"torch": torch})
    except Exception:
        return {}


def schema_of(hint: Any) -> Schema:
    """The JSON Schema of the values of a type; {} where the type does not settle it.

    Text beside an enumeration is taken for its members alone, as in ``IntervalStrategy | str``.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = typing.get_args(hint) if union else (hint,)
    if any(isinstance(part, enum.EnumMeta) for part in parts):
        parts = tuple(part for part in parts if part is not str)
    if float in parts:
        parts = tuple(part for part in parts if part is not int)
    known = [_one(part) for part in parts]
    if {} in known:
        return {}
    words = [word for part in known for word in part.get("enum", ())]
    plain = [part["type"] for part in known if part.keys() == {"type"}]
    nested = [part for part in known if "enum" not in part and part.keys() != {"type"}]
    found = [{"enum": words}] if words else []
    found += [{"type": plain[0] if len(plain) == 1 else sorted(set(plain))}] if plain else []
    found += nested
    return found[0] if len(found) == 1 else {"anyOf": found}


def _one(part: Any) -> Schema:
    origin, inner = typing.get_origin(part) or part, typing.get_args(part)
    if isinstance(origin, enum.EnumMeta):
        return {"enum": [member.value for member in origin]}  # type: ignore[var-annotated]
    if origin is typing.Literal:
        return {} if any("[" in str(word) for word in inner) else {"enum": list(inner)}  # 'name_[number]' is a pattern
    kind = _KINDS.get(origin)
    if kind is None:
        return {}
    if origin is tuple and inner and Ellipsis not in inner:
        return {"type": kind, "items": schema_of(typing.Union[inner]), "minItems": len(inner), "maxItems": len(inner)}  # noqa: UP007  # fmt: skip
    if kind == "array" and inner:
        return {"type": kind, "items": schema_of(inner[0])}
    if kind == "object" and inner and schema_of(inner[1]):
        return {"type": kind, "additionalProperties": schema_of(inner[1])}
    return {"type": kind}
