"""Signatures as JSON Schema: what a constructor of an installed package takes; pydantic knows the types."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import types
import typing
from typing import Any, Literal, Union

from pydantic import ConfigDict, TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import SchemaError

Schema = dict[str, Any]


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


class _Lenient(GenerateJsonSchema):
    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Schema:
        return {}  # an object of Python: YAML may have its own way to write it


def schema_of(hint: Any) -> Schema:
    """The JSON Schema of the values of a type; {} where the type does not settle it.

    Text beside an enumeration is taken for its members alone, as in ``IntervalStrategy | str``.
    """
    parts = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    enums = [part for part in parts if isinstance(part, enum.EnumMeta)]
    literals = [part for part in parts if typing.get_origin(part) is Literal]
    words = [member.value for part in enums for member in part]
    words += [word for part in literals for word in typing.get_args(part)]
    if any("[" in str(word) for word in words):
        return {}  # 'name_[number]' is a pattern
    said_by_others = ([str] if enums else []) + ([int] if float in parts else [])
    known = [part for part in parts if part not in [*enums, *literals, *said_by_others]]
    known += [Literal[tuple(words)]] if words else []
    try:
        adapter = TypeAdapter(Union[tuple(known)], config=ConfigDict(arbitrary_types_allowed=True))  # noqa: UP007
        schema = adapter.json_schema(schema_generator=_Lenient)
    except (PydanticUserError, SchemaError):
        return {}
    if "anyOf" in schema:
        schema["anyOf"].sort(key=str)  # Python may give the parts of a union in the order of an equal one
    return {} if "$defs" in schema or {} in schema.get("anyOf", ()) else schema
