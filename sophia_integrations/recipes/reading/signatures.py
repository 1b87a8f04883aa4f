"""Signatures of classes read from their text: fields and constructor parameters with their types, as far as it says.

Whatever the text does not settle is `Any`: the import, later, judges it.
"""

from __future__ import annotations

import ast
import enum
import functools
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .sources import ClassSource, Module, find, method, named

_PLAIN: dict[str, Any] = {
    "int": int, "float": float, "bool": bool, "str": str, "dict": dict, "list": list, "tuple": tuple, "None": None,
    "Dict": dict, "List": list, "Tuple": tuple, "Any": Any, "Optional": typing.Optional, "Union": typing.Union,
    "Literal": typing.Literal,
}  # fmt: skip
_DEEPEST = 12  # brackets inside brackets


def fields(source: ClassSource) -> dict[str, Any] | None:
    """Fields of a dataclass with their types, its ancestors' first; None when one of them is not known."""
    found: dict[str, Any] = {}
    for owner in reversed(source.line()):
        if owner is None:
            return None
        for item in owner.node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and _settable(item):
                found[item.target.id] = annotation(owner.module, item.annotation)
    return found


def _settable(item: ast.AnnAssign) -> bool:
    if ast.unparse(item.annotation).startswith(("ClassVar", "typing.ClassVar", "InitVar")):
        return False
    options = item.value.keywords if isinstance(item.value, ast.Call) else []
    return not any(
        word.arg == "init" and isinstance(word.value, ast.Constant) and word.value.value is False for word in options
    )


def annotation(home: Module, node: ast.expr | None, depth: int = 0) -> Any:
    """The type that an annotation's text stands for; `Any` for whatever it does not settle."""
    try:
        return _annotation(home, node, depth)
    except (SyntaxError, ValueError, TypeError):  # what typing would refuse too, or a literal that is a name
        return Any


def _annotation(home: Module, node: ast.expr | None, depth: int) -> Any:
    read: Callable[[ast.expr], Any] = lambda part: annotation(home, part, depth + 1)  # noqa: E731
    if node is None or depth > _DEEPEST:
        return Any
    if isinstance(node, ast.Constant):
        if node.value is None:
            return None
        return read(ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) else Any
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return typing.Union[read(node.left), read(node.right)]  # noqa: UP007
    if isinstance(node, ast.Subscript):
        return _subscripted(read, node)
    name = ast.unparse(node).removeprefix("typing.")
    if name in _PLAIN:
        return _PLAIN[name]
    return _enumeration(named(home, node))


def _subscripted(read: Callable[[ast.expr], Any], node: ast.Subscript) -> Any:
    origin = _PLAIN.get(ast.unparse(node.value).removeprefix("typing."), Any)
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if origin is typing.Literal:
        return typing.Literal[tuple(ast.literal_eval(part) for part in parts)]
    if origin in (typing.Union, typing.Optional):
        options = tuple(read(part) for part in parts)
        return typing.Union[(*options, None) if origin is typing.Optional else options]  # noqa: UP007
    if origin in (list, dict):
        return origin[tuple(read(part) for part in parts)]
    return Any


@functools.cache
def _members(path: str) -> Any:
    source = find(path)
    assert source is not None
    members = [item for item in source.node.body if isinstance(item, ast.Assign)]
    values = {
        ast.unparse(item.targets[0]): item.value.value for item in members if isinstance(item.value, ast.Constant)
    }
    return enum.Enum(source.node.name, values) if values and len(values) == len(members) else Any  # type: ignore[misc]


def _enumeration(source: ClassSource | None) -> Any:
    if source is None or not any("Enum" in ast.unparse(base) for base in source.node.bases):
        return Any
    return _members(source.path)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a constructor."""

    annotation: Any
    required: bool


def parameters(source: ClassSource) -> tuple[dict[str, Parameter], bool]:
    """The constructor's parameters without ``self``, and whether it may take others that the text does not name.

    What a constructor takes out of its ``**kwargs`` by name, and what its ancestors name, is among them.
    """
    found: dict[str, Parameter] = {}
    for owner in source.line():
        if owner is None:
            return found, True
        own = method(owner, "__init__")
        if own is not None:
            for name, parameter in _signature(owner.module, own).items():
                found.setdefault(name, parameter)
            if own.args.kwarg is None:
                return found, bool(own.decorator_list)
            for name in _popped(own):
                found.setdefault(name, Parameter(Any, required=False))
        elif any("dataclass" in ast.unparse(decorator) for decorator in owner.node.decorator_list):
            return found, True
    return found, True


def method_parameters(source: ClassSource, name: str) -> dict[str, Parameter]:
    """The parameters of a method that the class itself defines; empty when there is none."""
    own = method(source, name)
    return _signature(source.module, own) if own is not None else {}


def _popped(node: ast.FunctionDef) -> list[str]:
    """The names in ``kwargs.pop("name")``."""
    assert node.args.kwarg is not None
    return [
        call.args[0].value
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == f"{node.args.kwarg.arg}.pop"
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    ]


def _signature(home: Module, node: ast.FunctionDef) -> dict[str, Parameter]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args][1:]
    first = len(named) - len(arguments.defaults)
    found = {item.arg: Parameter(annotation(home, item.annotation), index < first) for index, item in enumerate(named)}
    for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found[item.arg] = Parameter(annotation(home, item.annotation), default is None)
    return found


def helps(source: ClassSource) -> dict[str, str]:
    """The first sentence of what a dataclass says of each field in ``metadata={"help": …}``."""
    found: dict[str, str] = {}
    for owner in reversed(source.line()):
        for item in owner.node.body if owner is not None else ():
            if isinstance(item, ast.AnnAssign) and isinstance(item.value, ast.Call):
                for word in item.value.keywords:
                    text = _help(word.value) if word.arg == "metadata" else None
                    if text:
                        found[ast.unparse(item.target)] = text
    return found


def _help(node: ast.expr) -> str | None:
    try:
        said = ast.literal_eval(node)
        return re.split(r"(?<=[.?!])\s", " ".join(said["help"].split()), maxsplit=1)[0]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
