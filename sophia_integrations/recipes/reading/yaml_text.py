"""YAML 1.2 text to plain values, remembering the location of every key and value; never builds other objects.

Differs from ``yaml.safe_load`` where that surprises people who write settings: ``1e-4`` is a number, ``no`` is text
(as in ``eval_strategy: no``), a key given twice is a problem.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, NamedTuple

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


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML 1.1 or our reader would take for something other than text."""


for _name, (_pattern, _first) in _CORE.items():
    _CoreLoader.add_implicit_resolver(_PREFIX + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_PREFIX + _name, _pattern, _first)


class Location(NamedTuple):
    """A place in the text; they sort as a reader meets them.

    Attributes:
        order: 0 for the recipe's own file, 1 for its base, 2 for the arguments.
        line, column: from 1; of an argument, its number and 0.
        source: the file, or the argument as it was given.
    """

    order: int
    line: int
    column: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.column else self.source


class Problem(NamedTuple):
    """One mistake: where, at which key, and a sentence."""

    location: Any
    path: Path
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.location), dotted(self.path), self.message) if part)


@dataclass
class Parsed:
    """A value, where each key of a mapping and each entry of a list stands, and what was wrong with the text."""

    value: Any = None
    locations: dict[Path, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, path: Path, message: str) -> None:
        """Notes a problem of the key at `path`, placed there or at its nearest ancestor that the text contains.

        A key that has a problem already gets no second one.
        """
        if path not in (problem.path for problem in self.problems):
            place = path
            while place and place not in self.locations:
                place = place[:-1]
            self.problems.append(Problem(self.locations.get(place), path, message))


def dotted(path: Path) -> str:
    """``("data", "files", 0)`` as ``data.files[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def to_yaml(value: Any) -> str:
    """A value as text that `parse` reads as the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def parse_file(file: FilePath, order: int = 0) -> Parsed:
    """Reads the YAML document in `file`; raises `OSError`, or `ValueError` for what is not UTF-8."""
    text = file.read_text(encoding="utf-8-sig")
    return parse(text, lambda line, column: Location(order, line, column, str(file)))


def parse(text: str, where: Callable[[int, int], Any]) -> Parsed:
    """Reads one YAML document; `where(line, column)`, both from 1, makes a location.  Never raises for bad text."""
    parsed = Parsed()

    def refuse(line: int, column: int, reason: str) -> None:
        parsed.value = None
        parsed.problems.append(Problem(where(line + 1, column + 1), (), f"not valid YAML: {reason}"))

    try:
        node = yaml.compose(text, Loader=_CoreLoader)
        if node is not None:
            parsed.value = _Builder(parsed, where).build(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        named = "alias" in f"{error.problem} {error.context}"
        hint = "; put quotes around text that begins with '*' or '&'" if named else ""
        refuse(mark.line if mark else 0, mark.column if mark else 0, f"{error.problem or error.context}{hint}")
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        code = error.character if isinstance(error.character, int) else ord(error.character)
        column = len(before) - before.rfind("\n") - 1
        refuse(before.count("\n"), column, f"the character U+{code:04X} is not allowed")
    except RecursionError:
        refuse(0, 0, "nested too deeply, or its aliases stand for too many values")
    return parsed


class _Builder:
    """Walks the node tree of one document and fills a `Parsed`."""

    def __init__(self, parsed: Parsed, where: Callable[[int, int], Any]) -> None:
        self.parsed, self.where = parsed, where

    def build(self, node: yaml.Node, path: Path, location: Any = None) -> Any:
        """The value of a node; `location` is where its key stands."""
        location = self.parsed.locations[path] = location or self._locate(node)
        if len(self.parsed.locations) > _MOST_VALUES:
            raise RecursionError
        if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path, location)
        return self._refuse(location, path, f"the tag {node.tag} is not allowed here")

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            location = self._locate(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _PREFIX + "str":
                self._refuse(location, path, "every key must be text")
                continue
            key = self._scalar(key_node, path, location)
            here = (*path, key)
            if key in mapping:
                first = self.parsed.locations[here]
                self._refuse(location, here, f"this key is given twice (first at {first}); keep one")
            elif key is not None:
                mapping[key] = self.build(value_node, here, location)
        return mapping

    def _scalar(self, node: yaml.ScalarNode, path: Path, location: Any) -> Any:
        kind, text = node.tag.removeprefix(_PREFIX), node.value
        if kind == "str":
            odd = next((letter for letter in text if letter == "\0" or "\ud800" <= letter <= "\udfff"), None)
            if odd is not None:
                return self._refuse(location, path, f"the character U+{ord(odd):04X} is not allowed")
            return text
        if kind not in _CORE or not _CORE[kind][0].match(text):
            return self._refuse(location, path, f"the tag {node.tag} does not fit {text!r}")
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if len(text) > _MOST_DIGITS:
            return self._refuse(location, path, f"a number of more than {_MOST_DIGITS} digits")
        if kind == "int":
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        return float(re.sub(r"\.(?=[in])", "", text.lower()))  # .inf and .nan

    def _locate(self, node: yaml.Node) -> Any:
        return self.where(node.start_mark.line + 1, node.start_mark.column + 1)

    def _refuse(self, location: Any, path: Path, message: str) -> None:
        self.parsed.problems.append(Problem(location, path, message))
