"""YAML 1.2 text to plain values, remembering the place of every key and value; never builds other objects.

Differs from ``yaml.safe_load`` where that surprises people who write settings: ``1e-4`` is a number, ``no`` is text
(as in ``eval_strategy: no``), a key given twice is a problem.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

Path = tuple[str | int, ...]

_MOST_VALUES = 100_000  # an alias can repeat what holds aliases: a short text may stand for any number of values
_MOST_DIGITS = 1000
_PREFIX = "tag:yaml.org,2002:"
_CORE = {
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    "float": (
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
}


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of the YAML 1.2 core schema instead of those of YAML 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class RecipeDumper(yaml.SafeDumper):
    """Quotes whatever either YAML 1.1 or our reader would take for something other than text."""


for _name, (_pattern, _first) in _CORE.items():
    _CoreLoader.add_implicit_resolver(_PREFIX + _name, _pattern, _first)
    RecipeDumper.add_implicit_resolver(_PREFIX + _name, _pattern, _first)


@dataclass
class Parsed:
    """A value, where its keys and values stand, and what was wrong with the text.

    ``keys[path]`` and ``values[path]`` are printable places such as ``file.yaml:3:1``.  ``unread`` are the paths whose
    value stands as None because of a problem.
    """

    value: Any = None
    keys: dict[Path, str] = field(default_factory=dict)
    values: dict[Path, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unread: set[Path] = field(default_factory=set)

    def place(self, path: Path, *, key: bool = False) -> str:
        """The place of `path`, or of its nearest ancestor that the text contains."""
        while path and path not in self.values:
            path = path[:-1]
        return (self.keys if key and path in self.keys else self.values).get(path, "")


def dotted(path: Path) -> str:
    """``("data", "files", 0)`` as ``data.files[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def parse_file(file: FilePath) -> Parsed:
    """Reads the YAML document in `file`; raises `OSError`, or `ValueError` for what is not UTF-8."""
    return parse(file.read_text(encoding="utf-8-sig"), lambda line, column: f"{file}:{line}:{column}")


def parse(text: str, where: Callable[[int, int], str]) -> Parsed:
    """Reads one YAML document; `where(line, column)`, both from 1, words a place.  Never raises for bad text."""
    parsed = Parsed()
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = where(mark.line + 1, mark.column + 1) if mark else where(1, 1)
        named = "alias" in f"{error.problem} {error.context}"
        hint = "; put quotes around text that begins with '*' or '&'" if named else ""
        parsed.problems.append(f"{place}: not valid YAML: {error.problem or error.context}{hint}")
        return parsed
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        parsed.problems.append(f"{where(line, column)}: not valid YAML: the character U+{code:04X} is not allowed")
        return parsed
    except RecursionError:
        parsed.problems.append(f"{where(1, 1)}: not valid YAML: nested too deeply")
        return parsed
    if node is not None:
        builder = _Builder(parsed, where)
        parsed.value = builder.build(node, ())
        if builder.built > _MOST_VALUES:
            parsed.value = None
    return parsed


class _Builder:
    """Walks the node tree of one document and fills a `Parsed`."""

    def __init__(self, parsed: Parsed, where: Callable[[int, int], str]) -> None:
        self.parsed, self.where, self.open = parsed, where, set[int]()
        self.built = 0

    def build(self, node: yaml.Node, path: Path) -> Any:
        place = self.parsed.values[path] = self._place(node)
        if id(node) in self.open:
            return self._unread(place, path, "an alias may not contain itself")
        self.built += 1
        if self.built > _MOST_VALUES:
            if self.built == _MOST_VALUES + 1:
                self._unread(place, path, f"the text stands for more than {_MOST_VALUES:,} values")
            return None
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
                return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, place, path)
            return self._unread(place, path, f"the tag {node.tag} is not allowed here")
        finally:
            self.open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _PREFIX + "str":
                self._problem(place, path, "every key must be text")
                continue
            key = self._scalar(key_node, place, (*path, "?"))
            if key is None:
                continue
            here = (*path, key)
            if key in mapping:
                first = self.parsed.keys[here]
                self._problem(place, here, f"this key is given twice (first at {first}); keep one")
                continue
            mapping[key] = self.build(value_node, here)
            self.parsed.keys[here] = place
        return mapping

    def _scalar(self, node: yaml.ScalarNode, place: str, path: Path) -> Any:
        kind, text = node.tag.removeprefix(_PREFIX), node.value
        if kind == "str":
            odd = next((letter for letter in text if letter == "\0" or "\ud800" <= letter <= "\udfff"), None)
            return text if odd is None else self._unread(place, path, f"the character U+{ord(odd):04X} is not allowed")
        if kind not in _CORE or not _CORE[kind][0].match(text):
            return self._unread(place, path, f"the tag {node.tag} does not fit {text!r}")
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            if len(text) > _MOST_DIGITS:
                return self._unread(place, path, f"a number of more than {_MOST_DIGITS} digits")
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        special = {"inf": math.inf, "nan": math.nan}.get(text.lower().lstrip("+-.")[:3])
        if special is None:
            return float(text)
        return -special if text.startswith("-") else special

    def _place(self, node: yaml.Node) -> str:
        return self.where(node.start_mark.line + 1, node.start_mark.column + 1)

    def _unread(self, place: str, path: Path, message: str) -> None:
        self.parsed.unread.add(path)
        self._problem(place, path, message)

    def _problem(self, place: str, path: Path, message: str) -> None:
        self.parsed.problems.append(f"{place}: {dotted(path)}: {message}" if path else f"{place}: {message}")
