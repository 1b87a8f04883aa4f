"""What a JSON Schema refuses, as sentences: what was expected, what was found, the nearest known key."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jsonschema

from ...errors import did_you_mean, nearest
from .yaml_text import Path, dotted

_KINDS = {
    "integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text", "null": "null",
    "object": "a mapping of keys", "array": "a list",
}  # fmt: skip
_LIMITS = {
    "minimum": "at least {}", "maximum": "at most {}", "exclusiveMinimum": "a number above {}",
    "exclusiveMaximum": "a number below {}", "minLength": "some text", "minItems": "a list of at least {}",
    "maxItems": "a list of at most {}",
}  # fmt: skip
_MANY = 8  # words that one sentence can list
_ELSEWHERE = 0.85  # a likeness that makes another section likelier than a key of this one


def _is_whole(_: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(checker: Any, value: Any) -> bool:
    return _is_whole(checker, value) or isinstance(value, float) and math.isfinite(value)


_Draft = jsonschema.Draft202012Validator
_Validator = jsonschema.validators.extend(
    _Draft, type_checker=_Draft.TYPE_CHECKER.redefine_many({"integer": _is_whole, "number": _is_number})
)

Found = tuple[Path, str]
"""Where, and a sentence."""


def problems(document: dict[str, Any], value: Any) -> list[Found]:
    """Everything in `value` that a JSON Schema refuses.

    ``1.0`` is no whole number, and what is not finite no number.  A ``title`` says what is expected, and the
    ``description`` of a ``not`` why it is.
    """
    explain = _Explainer(document)
    return [found for error in _Validator(document).iter_errors(value) for found in explain(error)]


def shown(value: Any) -> str:
    """A value as a reader of YAML would name it: ``'five' (text)``."""
    if isinstance(value, (dict, list)):
        return f"a list of {len(value)}" if isinstance(value, list) else "a mapping of keys"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value!r} (text)" if isinstance(value, str) else repr(value)


class _Explainer:
    """Words the errors of one document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def __call__(self, error: Any) -> Iterator[Found]:
        path, value, rule, wanted = tuple(error.absolute_path), error.instance, error.validator, error.validator_value
        if rule == "additionalProperties":
            for key in value.keys() - error.schema["properties"].keys():
                yield (*path, key), self._unknown(key, path, error.schema)
        elif rule == "required":
            for key in wanted:
                if key not in value and nearest(key, value, 0.8) is None:
                    yield (*path, key), "this key is missing"
        elif rule == "anyOf":
            yield from self._alternatives(error)
        elif rule == "not":
            yield path, error.schema["description"]
        elif rule in ("enum", "const") and isinstance(value, str):
            what = f"no {error.schema['title']}" if "title" in error.schema else "not known"
            yield path, f"{value!r} is {what}{did_you_mean(value, _words(error.schema))}"
        else:
            expected = _LIMITS[rule].format(wanted) if rule in _LIMITS else _expected(error.schema)
            yield path, f"expected {expected}, found {shown(value)}"

    def _alternatives(self, error: Any) -> Iterator[Found]:
        """The errors of the first alternative for a value of this kind, or what kinds there are."""
        alternatives: dict[int, list[Any]] = {}
        for inner in error.context:
            alternatives.setdefault(inner.schema_path[0], []).append(inner)
        for errors in alternatives.values():
            at_top = {inner.validator for inner in errors if not inner.path}
            if not at_top & {"type", "enum"} or at_top == {"enum"} and isinstance(error.instance, str):
                for inner in errors:
                    yield from self(inner)
                return
        yield tuple(error.absolute_path), f"expected {_expected(error.schema)}, found {shown(error.instance)}"

    def _unknown(self, key: str, path: Path, schema: dict[str, Any]) -> str:
        """Names another section that has this very key, else the nearest key here, else the nearest key elsewhere."""
        here = _section(path)
        same = [_at(section) for section, keys in self.sections.items() if section != here and key in keys]
        if same:
            return f"unknown key here, it belongs {' or '.join(same[:2])}"
        known = _keys(schema)
        if nearest(key, known) is None:
            for section, keys in self.sections.items():
                near = nearest(key, keys, _ELSEWHERE)
                if near is not None:
                    return f"unknown key here, did you mean {near!r} {_at(section)}?"
        return f"unknown key{did_you_mean(key, known)}"

    @functools.cached_property
    def sections(self) -> dict[str, set[str]]:
        """Every section of the document with its keys, the outer ones first; an entry of a list counts as the list."""
        found: dict[str, set[str]] = {}

        def walk(schema: Any, path: Path) -> None:
            if not isinstance(schema, dict):
                return
            if "$ref" in schema:
                schema = self.document["$defs"][schema["$ref"].removeprefix("#/$defs/")]
            if "properties" in schema:
                found.setdefault(_section(path), set()).update(_keys(schema))
            for name, inner in schema.get("properties", {}).items():
                walk(inner, (*path, name))
            for inner in (*schema.get("anyOf", ()), *schema.get("allOf", ()), schema.get("then"), schema.get("items")):
                walk(inner, path)

        walk(self.document, ())
        return dict(sorted(found.items(), key=lambda section: section[0].count(".")))


def _section(path: Path) -> str:
    return dotted(tuple(part for part in path if isinstance(part, str)))


def _at(section: str) -> str:
    return f"under {section!r}" if section else "at the top level"


def _keys(schema: dict[str, Any]) -> set[str]:
    return {name for name, inner in schema["properties"].items() if "not" not in inner}


def _words(schema: dict[str, Any]) -> list[str]:
    words = schema["enum"] if "enum" in schema else [schema["const"]]
    return [word for word in words if isinstance(word, str)]


def _expected(schema: dict[str, Any]) -> str:
    """What values a schema is for, in words."""
    if "title" in schema:
        return schema["title"]
    if "anyOf" in schema:
        kinds = [_expected(inner) for inner in schema["anyOf"] if inner != {"type": "null"}]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        few = len(schema["enum"]) <= _MANY
        return " or ".join(map(repr, schema["enum"])) if few else "one word of a fixed set"
    kinds = schema.get("type", "object")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return " or ".join(_KINDS[kind] for kind in kinds if kind != "null" or kinds == ["null"])
