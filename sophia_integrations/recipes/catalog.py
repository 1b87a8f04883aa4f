"""The recipes that come with the package: where they are, their names, and what their headers say of them.

In an installed package they lie in ``recipes/library/``; a checkout has them in its root folder ``recipes/``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Entry:
    """One shipped recipe; what its header does not say is empty.

    Attributes:
        name: such as ``hf/pretrain-gpt2-stdlib``.
        file: the YAML file.
        title: one sentence, what it is.
        task: such as ``pretrain``.
        framework: ``hf`` or ``lightning``.
        size, time, needs: as the header words them.
    """

    name: str
    file: Path
    title: str
    task: str
    framework: str
    size: str
    time: str
    needs: str


def library() -> Path | None:
    """The folder of the shipped recipes; None when the package came without them."""
    package = Path(__file__).parent
    for folder in (package / "library", package.parents[1] / "recipes"):
        if (folder / "hf").is_dir():
            return folder
    return None


def names() -> dict[str, Path]:
    """Every shipped recipe by its name, in order."""
    folder = library()
    if folder is None:
        return {}
    found = {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")}
    return dict(sorted(found.items()))


def entries() -> list[Entry]:
    """Every shipped recipe with what its header says."""
    return [_entry(name, file) for name, file in names().items()]


def schema_file(framework: str) -> Path | None:
    """The JSON Schema that the shipped recipes of a framework point their editors to."""
    folder = library()
    file = folder / f"schema-{framework}.json" if folder is not None else None
    return file if file is not None and file.is_file() else None


def find(wanted: str | os.PathLike[str]) -> Path:
    """The recipe file that a path or a name means.

    A file that exists is meant first; then a shipped recipe by its name, by its last part if no other ends so, or by
    its path in the project.

    Raises:
        UserError: nothing is meant; the nearest recipe is named.
    """
    try:
        return _find(Path(wanted), os.fspath(wanted))
    except (OSError, ValueError) as error:
        raise UserError(f"{os.fspath(wanted)!r}: {getattr(error, 'strerror', None) or error}") from None


def _find(path: Path, text: str) -> Path:
    if path.is_file() or path.is_symlink():
        return path
    known = names()
    name = re.sub(r"^recipes/", "", path.as_posix()).removesuffix(path.suffix if path.suffix in _SUFFIXES else "")
    if name in known and not path.is_absolute():
        return known[name]
    same = [file for full, file in known.items() if full.rpartition("/")[2] == text]
    if len(same) == 1:
        return same[0]
    if path.is_dir():
        inside = sorted(path.rglob("*.yaml"))
        hint = f"; it holds {', '.join(str(item) for item in inside[:5])}" if inside else ""
        raise UserError(f"{path}: this is a folder, a recipe is a YAML file{hint}")
    if same:
        options = ", ".join(full for full in known if known[full] in same)
        raise UserError(f"{text}: several recipes have this name: {options}; give the whole name")
    if path.exists():
        return path
    raise UserError(f"{text}: there is no such recipe{_nearest(path, known)}")


def listing(width: int | None = None) -> str:
    """The shipped recipes as a table: name, task, framework, size, time, needs.

    Where the table is wider than `width` columns, each recipe takes two lines instead of one.
    """
    rows = [("NAME", "TASK", "FRAMEWORK", "SIZE", "TIME", "NEEDS")]
    rows += [(item.name, item.task, item.framework, item.size, item.time, item.needs) for item in entries()]
    if len(rows) == 1:
        raise UserError("this installation holds no recipes; install the package anew")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if width is not None and max(map(len, lines)) > width:
        pairs = [f"{row[0]}  ({row[1]})\n    {'; '.join(cell for cell in row[3:] if cell)}" for row in rows[1:]]
        lines = [line[:width] for pair in pairs for line in pair.splitlines()]
    return "\n".join(lines) + "\n"


def copy(wanted: str | os.PathLike[str], dest: str | os.PathLike[str] = ".") -> list[Path]:
    """Copies a recipe, and the base that it names, to be changed; returns the files written.

    Its opening command and the schema for editors are made to fit the new place.

    Args:
        wanted: as for `find`.
        dest: a file, or an existing folder.

    Raises:
        UserError: there is no such recipe, or a file is already there.
    """
    source = find(wanted)
    target = Path(dest) / source.name if Path(dest).is_dir() else Path(dest)
    text = source.read_text(encoding="utf-8-sig")
    base = re.search(r"^base:[ \t]*[\"']?([^\"'#\n]+?)[\"']?[ \t]*(?:#.*)?$", text, re.MULTILINE)
    files = {target: _moved(text, source, target)}
    if base:
        under = source.parent / base[1]
        beside = target.parent / under.name
        files[target] = files[target].replace(base[0], base[0].replace(base[1], under.name), 1)
        content = under.read_text(encoding="utf-8-sig")
        if not beside.is_file() or beside.read_text(encoding="utf-8-sig") != content:
            files[beside] = content
    for path in files:
        if path.exists() or path.is_symlink():
            raise UserError(f"{path} is already there; choose another place: sophia cp {wanted} DEST")
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return list(files)


def _moved(text: str, source: Path, target: Path) -> str:
    name = next((name for name, file in names().items() if file == source), None)
    if name is None:
        return text
    schema = schema_file(name.partition("/")[0])
    editors = f"# yaml-language-server: $schema={schema}" if schema is not None else "#"
    text = re.sub(r"^# yaml-language-server:.*$", lambda _: editors, text, count=1, flags=re.MULTILINE)
    return text.replace(f"sophia train recipes/{name}.yaml", f"sophia train {target}", 1)


def _nearest(path: Path, known: dict[str, Path]) -> str:
    """The most similar of the YAML files nearby and the shipped names."""
    options: dict[str, str] = {}
    for root, pattern in ((path.parent, "*.yaml"), (Path("recipes"), "**/*.yaml"), (Path("."), "*.yaml")):
        for item in sorted(root.glob(pattern)):
            options.setdefault(item.stem, f"; the nearest one here is {item}")
    for name in known:
        options.setdefault(name.rpartition("/")[2], f"; the nearest one is {name} (sophia ls shows all)")
    nearest = difflib.get_close_matches(path.stem, options, n=1, cutoff=0.0)
    return options[nearest[0]] if nearest else ""


def header(text: str) -> Iterator[str]:
    """The lines of the opening comment, without ``#``."""
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        yield line[1:].strip()


def _entry(name: str, file: Path) -> Entry:
    text = file.read_text(encoding="utf-8")
    lines = [line for line in header(text) if not line.startswith("yaml-language-server:")]
    said = dict(match.groups() for line in lines if (match := re.match(r"(Size|Time|Needs|Task): *(.+)", line)))
    framework = name.partition("/")[0]
    task = said.get("Task") or _task(file)
    title = next((line for line in lines if line), "")
    return Entry(name, file, title, task, framework, said.get("Size", ""), said.get("Time", ""), said.get("Needs", ""))


def _task(file: Path) -> str:
    """The task that the recipe says; a Lightning recipe with pretrained weights fine-tunes them."""
    from .reading.base import lay_over_base
    from .reading.yaml_places import parse_file

    parsed = parse_file(file)
    lay_over_base(parsed, file)
    value: Any = parsed.value
    if isinstance(value, dict) and isinstance(value.get("task"), str):
        return value["task"]
    model = value.get("model") if isinstance(value, dict) else None
    options = model.get("init_args") if isinstance(model, dict) else None
    return "finetune" if isinstance(options, dict) and options.get("pretrained") else "pretrain"
