"""How a wrong value is described: what was expected, what was found, the nearest known word."""

from __future__ import annotations

import difflib
import enum
import types
import typing
from collections.abc import Collection
from typing import Any

_PLAIN = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null",
    dict: "a mapping of keys", list: "a list",
}  # fmt: skip
_SCHEMA_KINDS = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "string_type": "text", "list_type": "a list", "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys", "too_short": "at least one entry", "string_too_short": "some text",
}  # fmt: skip
_BOUNDS = {
    "greater_than": ("gt", "a number above"), "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "a number below"), "less_than_equal": ("le", "at most"),
}  # fmt: skip


def did_you_mean(word: str, known: Collection[str]) -> str:
    """``, did you mean 'x'?`` or, with nothing near and few known words, ``; known: a, b``."""
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f", did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if len(known) <= 12 else ""


def found(value: Any) -> str:
    """A value as a reader of YAML would name it: ``'five' (text)``."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a mapping of keys"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value!r} (text)" if isinstance(value, str) else f"{value!r}"


def expected_found(kind: str, context: dict[str, Any], value: Any) -> str:
    """One sentence for a pydantic error of our own schema."""
    if kind == "literal_error":
        expected = context["expected"]
    elif kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        expected = f"{words} {context[name]:g}"
    else:
        expected = _SCHEMA_KINDS.get(kind, kind.replace("_", " "))
    return f"expected {expected}, found {found(value)}"


def describe(annotation: Any) -> str:
    """A type annotation in words: ``float | None`` is "a number"; enumerations list their values."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    words = [_describe_one(option, options) for option in options if option is not type(None)]
    return " or ".join(dict.fromkeys(word for word in words if word)) or "null"


def choices(annotation: Any) -> list[str]:
    """The texts that an annotation with an enumeration in it stands for; empty when it has none."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return [m.value for option in options if isinstance(option, enum.EnumMeta) for m in option]  # type: ignore[var-annotated]


def _is_union(annotation: Any) -> bool:
    return isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union


def _describe_one(option: Any, options: tuple[Any, ...]) -> str:
    origin = typing.get_origin(option) or option
    if isinstance(origin, enum.EnumMeta):
        return ""
    if origin is typing.Literal:
        return " or ".join(str(value).lower() for value in typing.get_args(option))
    if origin is str and any(isinstance(other, enum.EnumMeta) for other in options):
        return "one word of a fixed set"
    if origin is list and typing.get_args(option) == (str,):
        return "a list of text"
    return _PLAIN.get(origin, getattr(origin, "__name__", str(origin)))
