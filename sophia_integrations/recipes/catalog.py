"""The recipes that come with the package: where they are, their names, and what their headers say of them.

In an installed package they lie in ``recipes/library/``; a checkout has them in its root folder ``recipes/``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest, one_line
from .reading.layers import BASE, lay_over_base
from .reading.yaml_text import parse_file

_HEAD = re.compile(r"^# ?(Size|Time|Needs|Task): *(.+)$", re.MULTILINE)
_EDITORS = re.compile(r"^(# yaml-language-server: \$schema=)(\..+)$", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One shipped recipe: its name, such as ``hf/pretrain-gpt2-stdlib``, its file, and what its header says of it."""

    name: str
    file: Path
    title: str
    task: str
    framework: str
    size: str
    time: str
    needs: str


def names() -> dict[str, Path]:
    """Every shipped recipe by its name, in order; none where the package came without them."""
    package = Path(__file__).parent
    for folder in (package / "library", package.parents[1] / "recipes"):
        if (folder / "hf").is_dir():
            found = {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")}
            return dict(sorted(found.items()))
    return {}


def entries() -> list[Entry]:
    """Every shipped recipe with what its header says."""
    return [_entry(name, file) for name, file in names().items()]


def find(wanted: str | os.PathLike[str]) -> Path:
    """The recipe file that a path or a name means.

    A file that exists is meant first; then a shipped recipe by its name, its path in the project, or the last part of
    its name if no other ends so.

    Raises:
        UserError: nothing is meant; the nearest recipe is named.
    """
    path, text, known = Path(wanted), os.fspath(wanted), names()
    try:
        if path.is_file() or path.is_symlink():
            return path
        name = re.sub(r"^recipes/|\.ya?ml$", "", text)
        same = [full for full in known if name in (full, full.rpartition("/")[2])]
        if len(same) == 1:
            return known[same[0]]
        if same:
            raise UserError(f"{text}: several recipes have this name: {', '.join(same)}; give the whole name")
        if path.exists():
            return path
        nearby = [str(item) for folder in (path.parent, Path()) for item in folder.glob("*.yaml")]
    except (OSError, ValueError) as error:
        raise UserError(f"{text!r}: {one_line(error)}") from None
    near = nearest(text, [*nearby, *known])
    raise UserError(f"{text}: there is no such recipe{f'; the nearest one is {near}' if near else ''} (sophia ls)")


def listing() -> str:
    """The shipped recipes as a table: name, task, framework, size, time, needs."""
    rows = [("NAME", "TASK", "FRAMEWORK", "SIZE", "TIME", "NEEDS")]
    rows += [(item.name, item.task, item.framework, item.size, item.time, item.needs) for item in entries()]
    if len(rows) == 1:
        raise UserError("this installation holds no recipes; install the package anew")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def copy(wanted: str | os.PathLike[str], dest: str | os.PathLike[str] = ".") -> list[Path]:
    """Copies a recipe, and the base that it names beside it; returns the files written.

    Args:
        wanted: as for `find`.
        dest: a file, or an existing folder.

    Raises:
        UserError: there is no such recipe, or a file is already there.
    """
    source = find(wanted)
    target = Path(dest) / source.name if Path(dest).is_dir() else Path(dest)
    text = source.read_text(encoding="utf-8-sig")
    text = _EDITORS.sub(lambda said: f"{said[1]}{(source.parent / said[2]).resolve()}", text)
    value = parse_file(source).value
    base = value.get(BASE) if isinstance(value, dict) else None
    files: dict[Path, str] = {}
    if isinstance(base, str):
        content, beside = (source.parent / base).read_text(encoding="utf-8-sig"), target.with_name(Path(base).name)
        text = re.sub(rf"(?m)^{BASE}:.*$", f"{BASE}: {beside.name}", text, count=1)
        if beside == target:
            raise UserError(f"{target} is the name of the recipe's base; choose another: sophia cp {wanted} DEST")
        if not beside.is_file() or beside.read_text(encoding="utf-8-sig") != content:
            files[beside] = content
    files = {target: text, **files}
    for path in files:
        if path.exists() or path.is_symlink():
            raise UserError(f"{path} is already there; choose another place: sophia cp {wanted} DEST")
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return list(files)


def _entry(name: str, file: Path) -> Entry:
    text = file.read_text(encoding="utf-8")
    said = dict(_HEAD.findall(text))
    title = text.splitlines()[0].removeprefix("#").strip()
    parsed = parse_file(file)
    lay_over_base(parsed, file)
    task = said.get("Task") or _task(parsed.value)
    framework = parsed.value.get("framework", "lightning")
    return Entry(name, file, title, task, framework, *(said.get(key, "") for key in ("Size", "Time", "Needs")))


def _task(recipe: Any) -> str:
    """The task that the recipe says; a Lightning recipe with pretrained weights fine-tunes them."""
    if "task" in recipe:
        return recipe["task"]
    return "finetune" if recipe["model"]["init_args"].get("pretrained") else "pretrain"
