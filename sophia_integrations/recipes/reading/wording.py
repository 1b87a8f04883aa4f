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
_LISTS = {(str,): "text", (int,): "whole numbers", (float,): "numbers"}
_BOUNDS = {
    "greater_than": ("gt", "a number above"), "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "a number below"), "less_than_equal": ("le", "at most"),
}  # fmt: skip


def near(word: str, known: Collection[str], cutoff: float = 0.6) -> str | None:
    """The known word that is most like `word`, or None."""
    return next(iter(difflib.get_close_matches(word, sorted(known), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, known: Collection[str]) -> str:
    """``, did you mean 'x'?`` or, with nothing near and few known words, ``; known: a, b``."""
    nearest = near(word, known)
    if nearest is not None:
        return f", did you mean {nearest!r}?"
    return f"; known: {', '.join(sorted(known))}" if 0 < len(known) <= 12 else ""


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
    parts = options(annotation)
    if float in parts:
        parts = tuple(part for part in parts if part is not int)
    words = [_describe_one(part, parts) for part in parts if part is not type(None)]
    return " or ".join(dict.fromkeys(word for word in words if word)) or "null"


def options(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; any other annotation by itself."""
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    return typing.get_args(annotation) if union else (annotation,)


def enumerated(annotation: Any) -> bool:
    """Whether an enumeration says which texts are known."""
    return any(isinstance(option, enum.EnumMeta) for option in options(annotation))


def choices(annotation: Any) -> list[str]:
    """The texts that an annotation's enumerations and literals stand for; empty when it has none."""
    found: list[str] = []
    for option in options(annotation):
        if isinstance(option, enum.EnumMeta):
            found += [member.value for member in option]  # type: ignore[var-annotated]
        elif typing.get_origin(option) is typing.Literal:
            found += [value for value in typing.get_args(option) if isinstance(value, str)]
    return found


def plain(name: str) -> str:
    """The name of a built-in type in words: ``int`` is "a whole number"."""
    return next((words for kind, words in _PLAIN.items() if kind.__name__ == name), name)


def _describe_one(option: Any, parts: tuple[Any, ...]) -> str:
    origin = typing.get_origin(option) or option
    if isinstance(origin, enum.EnumMeta):
        return "" if str in parts else "one word of a fixed set"
    if origin is typing.Literal:
        return " or ".join(str(value).lower() for value in typing.get_args(option))
    if origin is str and any(isinstance(part, enum.EnumMeta) for part in parts):
        return "one word of a fixed set"
    if origin is list and typing.get_args(option) in _LISTS:
        return f"a list of {_LISTS[typing.get_args(option)]}"
    if origin is tuple:
        return f"a list of {len(typing.get_args(option))} entries"
    return _PLAIN.get(origin, getattr(origin, "__name__", str(origin)))
