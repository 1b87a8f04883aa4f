"""Classes of installed packages read from their source text: names, types and defaults, with nothing imported.

Importing torch and transformers takes seconds, and importing what a recipe names runs its code; a reader of recipes
needs neither to know which words exist.  Whatever the text does not settle is `Any`: the import, later, judges it.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_DEEPEST = 12  # re-exports and base classes followed from one name
_FUNCTION = re.compile(r"( {0}| {4})(?:async )?def (\w+)\(")
_KEPT_FUNCTIONS = ("__init__", "fit")


@dataclass(frozen=True)
class Module:
    """One source file; `package` is the dotted package that its relative imports start from."""

    name: str
    package: str
    text: str = field(repr=False)

    @functools.cached_property
    def tree(self) -> ast.Module:
        """The text parsed; empty when it is no Python."""
        try:
            return _outline(self.text)
        except (SyntaxError, ValueError, RecursionError):
            return ast.Module([], [])

    def definitions(self) -> Iterator[ast.stmt]:
        """Top-level statements, those inside ``if`` and ``try`` included."""
        pending: list[ast.stmt] = list(self.tree.body)
        while pending:
            item = pending.pop(0)
            yield item
            for block in ("body", "orelse", "handlers", "finalbody"):
                if isinstance(item, (ast.If, ast.Try, ast.ExceptHandler)):
                    pending.extend(getattr(item, block, []))


@dataclass(frozen=True)
class ClassSource:
    """A class as its text defines it."""

    module: Module
    node: ast.ClassDef = field(repr=False)

    @property
    def path(self) -> str:
        """The dotted path of its definition."""
        return f"{self.module.name}.{self.node.name}"

    def bases(self) -> list[ClassSource | None]:
        """The base classes in order; None for one that the text does not settle."""
        return [named(self.module, base) for base in self.node.bases]

    def line(self) -> list[ClassSource | None]:
        """The class and its ancestors, nearest first; None where one is not known."""
        found: list[ClassSource | None] = []
        pending: list[ClassSource | None] = [self]
        while pending and len(found) < 4 * _DEEPEST:
            item = pending.pop(0)
            found.append(item)
            if item is not None:
                pending.extend(item.bases())
        return found


def module(name: str) -> Module | None:
    """The module's text; None when there is none to read, as for compiled modules.

    Like an import by ``python -m``, it looks among the installed packages and in the current folder.
    """
    if not all(part.isidentifier() and len(part) < 100 for part in name.split(".")):
        return None
    return _module(name, Path.cwd())


@functools.cache
def _module(name: str, folder: Path) -> Module | None:
    file, package = _file(name, folder)
    if file.suffix != ".py":
        return None
    try:
        return Module(name, package, file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _file(name: str, folder: Path) -> tuple[Path, str]:
    """The file of a module, and the package that its relative imports start from; an empty path when not found."""
    head, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(head)  # of a top-level name: this imports nothing
    except (ImportError, ValueError):
        return Path(), ""
    if spec is not None:
        folders = [Path(place) for place in spec.submodule_search_locations or ()]
        file, package = Path(spec.origin or ""), head if folders else ""
    else:
        folders, rest, file, package = [folder], [head, *rest], Path(), ""
    parts = name.split(".")
    for index, part in enumerate(rest, len(parts) - len(rest) + 1):
        inside = [place / part for place in folders]
        folders = [place for place in inside if place.is_dir()]
        files = [place / "__init__.py" for place in folders] + [place.with_suffix(".py") for place in inside]
        file = next((item for item in files if item.is_file()), Path())
        package = ".".join(parts[: index if file.name == "__init__.py" else index - 1])
    return file, package


def _outline(text: str) -> ast.Module:
    """The module without the bodies of functions that nobody asks for: parsing them would take most of the time."""
    kept: list[str] = []
    inside: int | None = None
    for line in text.splitlines():
        start = len(line) - len(line.lstrip())
        if inside is not None and (start > inside or not line.strip() or line[start] in ")]"):
            continue
        inside = None
        found = _FUNCTION.match(line)
        if found and found[2] not in _KEPT_FUNCTIONS:
            inside = start
            kept.append(f"{found[1]}def {found[2]}(): pass")
        else:
            kept.append(line)
    try:
        return ast.parse("\n".join(kept))
    except SyntaxError:  # such as a line of a text in quotes that looks like a function
        return ast.parse(text)


def find(dotted: str) -> ClassSource | None:
    """The class at a dotted path, re-exports followed; None when the text does not settle it."""
    where, _, name = dotted.rpartition(".")
    home = module(where) if where else None
    return _lookup(home, name) if home is not None else None


def names(home: Module) -> set[str] | None:
    """What a module defines or imports; None when it may hold more than its text names."""
    found: set[str] = set()
    if re.search(r"\bglobals\(\)|\bsys\.modules\b", home.text):
        return None
    for item in home.definitions():
        if isinstance(item, (ast.With, ast.For, ast.While)):
            return None
        if isinstance(item, (ast.ClassDef, ast.FunctionDef)):
            if item.name == "__getattr__":
                return None
            found.add(item.name)
        elif isinstance(item, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in item.names}
        elif isinstance(item, (ast.Assign, ast.AnnAssign)):
            found |= {
                node.id for node in ast.walk(item) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            }
    return None if "*" in found else found


def _lookup(home: Module, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> ClassSource | None:
    if (home.name, name) in seen or len(seen) > _DEEPEST:
        return None
    seen |= {(home.name, name)}
    origins: list[tuple[Module, str]] = []
    for item in home.definitions():
        if isinstance(item, ast.ClassDef) and item.name == name:
            return ClassSource(home, item)
        if isinstance(item, ast.ImportFrom):
            original = {alias.asname or alias.name: alias.name for alias in item.names}
            origin = module(_absolute(home, item)) if name in original or "*" in original else None
            if origin is not None:
                origins.append((origin, original.get(name, name)))
    return next((found for origin, called in origins if (found := _lookup(origin, called, seen))), None)


def _assigns(item: ast.stmt, name: str) -> bool:
    targets = item.targets if isinstance(item, ast.Assign) else [item.target] if isinstance(item, ast.AnnAssign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _absolute(home: Module, item: ast.ImportFrom) -> str:
    if not item.level:
        return item.module or ""
    parts = home.package.split(".")
    return ".".join([*parts[: len(parts) - item.level + 1], *([item.module] if item.module else [])])


def named(home: Module, node: ast.expr) -> ClassSource | None:
    """The class that a name or a dotted name in a module's text means; None when the text does not settle it."""
    if isinstance(node, ast.Name):
        return _lookup(home, node.id)
    if isinstance(node, ast.Attribute):
        dotted = ast.unparse(node)
        head, _, rest = dotted.partition(".")
        for item in home.definitions():
            for alias in item.names if isinstance(item, (ast.Import, ast.ImportFrom)) else ():
                if (alias.asname or alias.name.partition(".")[0]) == head:
                    start = alias.name if alias.asname else head
                    prefix = f"{_absolute(home, item)}." if isinstance(item, ast.ImportFrom) else ""
                    return find(f"{prefix}{start}.{rest}")
    return None


def constant(dotted: str) -> Any:
    """The value of a module's literal constant: a dict, or the pairs inside ``OrderedDict([...])``; None otherwise."""
    where, _, name = dotted.rpartition(".")
    home = module(where)
    return _constant(home, name) if home is not None else None


def _constant(home: Module, name: str, depth: int = 0) -> Any:
    for start in re.finditer(rf"^{name}\b[^=\n]*=", home.text, re.MULTILINE):
        end = re.compile(r"^[^\s)\]}]", re.MULTILINE).search(home.text, start.end())
        value = _literal(home.text[start.end() : end.start() if end else None])
        if value is not None:
            return value
    for item in home.definitions() if depth < _DEEPEST else ():
        if isinstance(item, ast.ImportFrom) and any(alias.name == name for alias in item.names):
            origin = module(_absolute(home, item))
            return _constant(origin, name, depth + 1) if origin is not None else None
    return None


def _literal(text: str) -> Any:
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("OrderedDict") and len(node.args) == 1:
            return dict(ast.literal_eval(node.args[0]))
        return ast.literal_eval(node)
    except (SyntaxError, ValueError, TypeError):
        return None


def class_constant(source: ClassSource, name: str) -> Any:
    """The literal value of a class attribute, of the class or its nearest ancestor that sets it; None otherwise."""
    for owner in source.line():
        for item in owner.node.body if owner is not None else ():
            if _assigns(item, name):
                try:
                    return ast.literal_eval(item.value)  # type: ignore[attr-defined]
                except (ValueError, TypeError):
                    return None
    return None


def method(source: ClassSource, name: str) -> ast.FunctionDef | None:
    """A method that the class itself defines, or None."""
    own = [item for item in source.node.body if isinstance(item, ast.FunctionDef) and item.name == name]
    return own[-1] if own else None
