"""One value against one type, strictly: ``5`` is no text and ``"5"`` no number, but a list may stand for a tuple."""

from __future__ import annotations

import json
from typing import Any

import pydantic

from .wording import choices, describe, did_you_mean, enumerated, found, options


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value from YAML is one of the type `annotation`; `Any` accepts everything."""
    try:
        adapter = pydantic.TypeAdapter(annotation, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError:
        return False
    return True


def type_problem(value: Any, annotation: Any, words: tuple[str, ...] = ()) -> str | None:
    """The sentence about a value that is not of the type `annotation`, or not one of its words; None when it is.

    `words` are further texts that are known besides those of an enumeration in the annotation.
    """
    known = [*choices(annotation), *words]
    if isinstance(value, str) and choices(annotation) and value not in known:
        if str not in options(annotation) or enumerated(annotation):
            return f"{value!r} is not known{did_you_mean(value, known)}"
    if not fits(value, annotation):
        return f"expected {describe(annotation)}, found {found(value)}"
    return None
