"""The four formats of a row: which parts it has, which one a task reads, and what makes a row bad."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..errors import UserError
from ..tasks import TASKS

PARTS = {
    "text": ("text",),
    "prompt-completion": ("prompt", "completion"),
    "chat": ("messages",),
    "classification": ("text", "label"),
}
"""The parts of a row of each format; a part is read from the column of its name, or the one given for it."""

JSON = ("messages", "label")
"""The parts that are no plain text: a row that was checked holds them as JSON."""

_BROKEN = "holds half a character (bytes that are not UTF-8, or a lone surrogate)"


def choose_format(
    task: str, given: str | None, names: Collection[str], columns: Mapping[str, str] | None = None
) -> str:
    """The format of the data: the one given, else the last one of the task whose columns there are, else its first.

    Args:
        task: pretrain, finetune, classify, seq2seq or masked-lm.
        given: what the user asked for.
        names: the columns there are.
        columns: part to column, where they differ.
    """
    known = {*names, *(columns or {})}
    own, *others = TASKS[task].formats
    fitting = (name for name in reversed(others) if known.issuperset(PARTS[name]))
    return given or next(fitting, own)


def choose_columns(
    format: str, names: Collection[str], columns: Mapping[str, str] | None, origin: str
) -> dict[str, str]:
    """The column of each part of `format`; raises `UserError` naming the columns there are when one is missing."""
    chosen = {}
    for part in PARTS[format]:
        column = (columns or {}).get(part) or part
        if column not in names:
            raise UserError(
                f"data.columns.{part}: {origin} has no column {column!r}; its columns are {', '.join(names)}"
            )
        chosen[part] = column
    return chosen


def problem(format: str, values: Mapping[str, Any]) -> str | None:
    """What is wrong with a row, or None.  An empty text is no problem where text is joined: it is left out."""
    if format == "chat":
        return _chat_problem(values["messages"])
    for part in PARTS[format]:
        value = values[part]
        if part == "label":
            if not isinstance(value, (str, int)) and not (isinstance(value, float) and value.is_integer()):
                return f"the label is {_shown(value)}, expected text or a whole number"
        elif not isinstance(value, str):
            hint = " (format chat reads messages)" if isinstance(value, list) else ""
            return f"the {part} is {_shown(value)}, expected text{hint}"
        elif _is_broken(value):
            return f"the {part} {_BROKEN}"
        elif not value.strip() and format != "text" and part != "prompt":
            return f"the {part} is empty"
    return None


def texts(format: str, row: Mapping[str, Any]) -> Iterator[str]:
    """All text of a row that was checked: what a tokenizer is trained on, and what is counted in bytes."""
    if format == "chat":
        yield from (message["content"] for message in json.loads(row["messages"]))
    else:
        yield from (row[part] for part in PARTS[format] if part not in JSON)


def _chat_problem(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"messages is {_shown(messages)}, expected a list of {{role, content}}"
    for number, message in enumerate(messages, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            return f"message {number} is {_shown(message)}, expected a role and a content of text"
        if _is_broken(role) or _is_broken(content):
            return f"message {number} {_BROKEN}"
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return "no message is the assistant's, so there is nothing to learn"
    return None


def _is_broken(text: str) -> bool:
    """Whether half of a character is left, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
